"""Rounds of speculative decoding: what a draft proposed, what the target said to it, how good the mismatches are.

train.jsonl, one round a row:
    {"req_id": "8", "context_len": 606, "spd_round_draft_ids": [311, 279], "spd_round_verifier_ids": [311, 3230],
     "mismatch_index": [1], "mismatch_score": ["4"]}
context.jsonl beside it, one request a row:
    {"req_id": "8", "user_text": "...", "assistant_text": "..."}

The context of a round is the first `context_len` characters of "USER: {user_text}\\nASSISTANT:{assistant_text}"; rows
that `luthier collect` wrote say it in token ids too: the first `context_ids_len` of prompt_ids + answer_ids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core.types import Example
from luthier.data.groups import PLACE, Join
from luthier.data.source import BadRow, Columns, excerpt

JOIN = Join(key="req_id", sibling="context.jsonl")

EXTRAS = {"mismatch_kl": "kl", "mismatch_prob": "prob", "mismatch_rank": "rank"}
"""Measures of a mismatch that `luthier collect` writes, and what they are called in predictions."""


def read(row: Mapping[str, Any], columns: Columns) -> Example:
    """A round; `extra` has req_id, place, draft, verifier, mismatches ({index, target, ...}), text or context_ids."""
    if row.get("req_id") is None:
        raise BadRow("no req_id")
    draft, verifier = _ids(row, "spd_round_draft_ids"), _ids(row, "spd_round_verifier_ids")
    if len(verifier) not in (len(draft), len(draft) + 1):
        raise BadRow(
            "spd_round_verifier_ids has another length than spd_round_draft_ids",
            f"{len(verifier)} and {len(draft)}; there may be one more, the bonus token",
        )
    mismatches = _mismatches(row, draft, verifier)
    differs = [i for i, (d, v) in enumerate(zip(draft, verifier)) if d != v]
    scored = {mismatch["index"] for mismatch in mismatches}
    extra = {
        "req_id": str(row["req_id"]),
        "place": row.get(PLACE, ""),
        "draft": draft,
        "verifier": verifier,
        "mismatches": mismatches,
        "unscored": next((i for i in differs if i not in scored), None),
    }
    return Example((), (), extra=extra | _context(row))


def _ids(row: Mapping[str, Any], name: str) -> list[int]:
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise BadRow(f"{name} is no list of token ids", excerpt(values))
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise BadRow(f"{name} holds something that is no token id", excerpt(values))
    return values


def _mismatches(row: Mapping[str, Any], draft: Sequence[int], verifier: Sequence[int]) -> list[dict[str, Any]]:
    index, scores = row.get("mismatch_index", []), row.get("mismatch_score", [])
    for name, values in (("mismatch_index", index), ("mismatch_score", scores)):
        if not isinstance(values, list):
            raise BadRow(f"{name} is no list", excerpt(values))
    if len(index) != len(scores):
        raise BadRow("mismatch_index and mismatch_score have unequal lengths", f"{len(index)} and {len(scores)}")
    if len(set(map(str, index))) != len(index):
        raise BadRow("mismatch_index names a position twice", excerpt(index))
    found = []
    for nth, (i, score) in enumerate(zip(index, scores)):
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(draft):
            raise BadRow("mismatch_index is out of range", f"{excerpt(i)}, and the draft has {len(draft)} tokens")
        if draft[i] == verifier[i]:
            raise BadRow(
                "draft and verifier are equal at a mismatch", f"both have token {draft[i]} at mismatch_index {i}"
            )
        extras = {name: _extra(row, column, nth, len(index)) for column, name in EXTRAS.items() if column in row}
        found.append({"index": i, "target": _score(score) / 10} | extras)
    return sorted(found, key=lambda mismatch: mismatch["index"])


def _score(value: Any) -> float:
    """0 to 10, as a number or as text."""
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= 10:
        raise BadRow("mismatch_score is no number from 0 to 10", excerpt(value))
    return score


def _extra(row: Mapping[str, Any], column: str, nth: int, count: int) -> float:
    values = row[column]
    if not isinstance(values, list) or len(values) != count:
        raise BadRow(f"{column} and mismatch_index have unequal lengths", excerpt(values))
    if isinstance(values[nth], bool) or not isinstance(values[nth], int | float):
        raise BadRow(f"{column} holds something that is no number", excerpt(values[nth]))
    return values[nth]


def _context(row: Mapping[str, Any]) -> dict[str, Any]:
    """The context of a round, as ids where they were logged, else as text."""
    if "context_ids_len" in row and "prompt_ids" in row:
        length = row["context_ids_len"]
        ids = _ids(row, "prompt_ids") + (_ids(row, "answer_ids") if row.get("answer_ids") else [])
        _length(length, len(ids), "context_ids_len", "ids")
        return {"context_ids": ids[:length]}
    if not isinstance(row.get("user_text"), str) or not isinstance(row.get("assistant_text"), str):
        known = [name for name in ("user_text", "assistant_text") if name in row]
        raise BadRow(
            "its req_id has no context" if not known else "user_text or assistant_text is no text",
            f"req_id {row.get('req_id')!r}",
        )
    text = f"USER: {row['user_text']}\nASSISTANT:{row['assistant_text']}"
    _length(row.get("context_len"), len(text), "context_len", "characters")
    return {"text": text[: row["context_len"]]}


def _length(value: Any, most: int, name: str, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadRow(f"{name} is no whole number of 1 or more", excerpt(value))
    if value > most:
        raise BadRow(f"{name} is beyond the end of the context", f"{value}, and there are {most} {unit}")
