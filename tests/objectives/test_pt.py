"""Pre-training trains every token after the first, once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from luthier.core.types import Example, Message
from luthier.objectives.pt import Pt


def encode(ids: list[int], cutoff_len: int):
    renderer = SimpleNamespace(document=lambda text: ids)
    return Pt().encode(Example((Message("user", "text"),), ()), renderer, cutoff_len=cutoff_len)


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("cutoff_len", [2, 3, 5, 20])
def test_every_token_is_predicted_exactly_once(length, cutoff_len):
    ids = list(range(100, 100 + length))
    paths = [encoded.paths[0] for encoded in encode(ids, cutoff_len)]
    assert all(2 <= len(path.ids) <= cutoff_len for path in paths)
    trained = [token for path in paths for token, weight in zip(path.ids, path.weights) if weight]
    assert trained == ids[1:]


def test_a_document_of_one_token_has_nothing_to_train():
    assert encode([7], 10) == []


def test_pieces_of_one_token_have_nothing_to_train():
    assert encode([7, 8, 9], 1) == []
