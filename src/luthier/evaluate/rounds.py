"""Rounds of speculative decoding as predictions hold them, flattened into arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core.errors import DataError

Record = tuple[str, Sequence[Mapping[str, Any]]]
"""Where a tree came from, and one dict per round: req_id, draft, mismatches, unscored."""
SIGNS = {"kl": -1.0, "prob": 1.0, "rank": -1.0}
"""What the target itself says about a mismatch, and whether more of it speaks for (1) or against (-1) the token."""
GOOD_ENOUGH = 0.5
"""A mismatch with this score or more should be accepted."""


@dataclass(frozen=True)
class Rounds:
    """R rounds with M scored mismatches, in the order of their rounds and of their places in the draft.

    A mismatch that nobody scored ends its round: what would come of accepting it is not known, so every rule rejects
    it.
    """

    target: np.ndarray
    """float64 [M] the true score, 0..1."""
    probability: np.ndarray
    """float64 [M] what the head says."""
    rivals: Mapping[str, np.ndarray]
    """float64 [M] by a name of `SIGNS`, signed so that more speaks for the token; only what every mismatch has."""
    lacking: Mapping[str, int]
    """How many mismatches lack each of the others."""
    place: np.ndarray
    """int64 [M] index in the draft."""
    owner: np.ndarray
    """int64 [M] which round the mismatch belongs to."""
    length: np.ndarray
    """int64 [R] positions of the draft before the first mismatch that nobody scored."""
    open: np.ndarray
    """bool [R] whether there is such a mismatch."""
    request: np.ndarray
    """int64 [R] which request the round belongs to, counted from 0."""

    @property
    def accept(self) -> np.ndarray:
        """bool [M] whether a mismatch is good enough."""
        return self.target >= GOOD_ENOUGH

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return int(self.request.max(initial=-1)) + 1

    @property
    def reached(self) -> np.ndarray:
        """bool [M] whether decoding can come to the mismatch at all: nothing before it is without a score."""
        return self.place < self.length[self.owner]


def rounds_of(records: Iterable[Record]) -> Rounds:
    """All rounds of all trees. Raises DataError for a judgement that is no judgement, and if nothing was judged."""
    rounds, rows = [], []
    requests: dict[str, int] = {}
    for origin, answers in records:
        for answer in answers:
            mismatches = sorted(answer["mismatches"], key=lambda mismatch: mismatch["index"])
            rows += [_row(mismatch, len(rounds), f"{origin}: {_name(answer)}") for mismatch in mismatches]
            open_at = answer.get("unscored")
            length = answer["draft"] if open_at is None else open_at
            rounds.append((length, open_at is not None, requests.setdefault(str(answer["req_id"]), len(requests))))
    if not rows:
        raise DataError(
            f"None of the {len(rounds)} rounds has a scored mismatch, so there is nothing to measure. Mismatches are "
            "what mismatch_index and mismatch_score say."
        )
    table = np.array(rows, np.float64)
    length, is_open, request = (np.array(column) for column in zip(*rounds))
    lacking = {name: int(np.isnan(table[:, 4 + nth]).sum()) for nth, name in enumerate(SIGNS)}
    return Rounds(
        target=table[:, 2],
        probability=table[:, 3],
        rivals={name: sign * table[:, 4 + nth] for nth, (name, sign) in enumerate(SIGNS.items()) if not lacking[name]},
        lacking={name: count for name, count in lacking.items() if count},
        place=table[:, 1].astype(np.int64),
        owner=table[:, 0].astype(np.int64),
        length=length.astype(np.int64),
        open=is_open.astype(bool),
        request=request.astype(np.int64),
    )


def _row(mismatch: Mapping[str, Any], owner: int, place: str) -> tuple[float, ...]:
    found = [_number(mismatch.get(name)) for name in ("target", "probability")]
    for name, value in zip(("target", "probability"), found):
        if not 0 <= value <= 1:
            raise DataError(
                f"{place}, mismatch {mismatch['index']}: {name} is {mismatch.get(name)!r}, and should be a number from "
                "0 to 1. Predictions come from `luthier eval` or from training with do_predict: true."
            )
    return (owner, mismatch["index"], *found, *(_number(mismatch.get(name)) for name in SIGNS))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _name(answer: Mapping[str, Any]) -> str:
    return f"request {answer['req_id']}, round at line {answer.get('row')}"
