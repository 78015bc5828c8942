"""What a row's first token is: never supervised, since nothing comes before it. The rest is in tests/exact."""

from __future__ import annotations

import pytest

from luthier.core.types import Encoded, Path
from luthier.data.layout import LAYOUTS, collate


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_token_of_a_path_is_never_supervised(layout):
    batch = collate([(Encoded((Path([5, 6, 7], [1.0, 1.0, 1.0]),)), "row")] * 2, layout=layout, pad_id=0)
    assert batch.weight.tolist() == [1.0] * 4
    assert (batch.source >= 0).all()
    assert batch.ids.reshape(-1)[batch.target].tolist() == [6, 7, 6, 7]
    assert batch.ids.reshape(-1)[batch.source].tolist() == [5, 6, 5, 6]
