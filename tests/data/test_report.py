"""What the report on the data says the rows are for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.data.report import DataReport


@pytest.mark.parametrize(
    "report, trained, measured",
    [
        (DataReport({}, 7), "Training on 7 examples.", "Evaluating on 7 examples."),
        (DataReport({}, 7, {"": 2}), "Training on 7 examples, evaluating on 2.", "Evaluating on 2."),
        (DataReport({}, 7, {"a": 2, "b": 3}), "Training on 7 examples, evaluating on 2 in a, 3 in b.",
         "Evaluating on 2 in a, 3 in b."),
    ],
)  # fmt: skip
def test_it_says_what_the_rows_are_for(report, trained, measured):
    assert str(report).rstrip().endswith(trained)
    assert str(replace(report, trains=False)).rstrip().endswith(measured)
