"""Micro-batches that could not be trained, kept in a file to be looked at: JSON lines, a header and then examples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.core.types import NAN, Encoded
from luthier.core.types import Path as TokenPath

KIND = "luthier batch"


def write(
    file: Path, header: Mapping[str, Any], micro_batches: Mapping[int, Sequence[Sequence[tuple[Encoded, str]]]]
) -> None:
    """Keep micro-batches. header: step, why, and what the rows are shown with (`tokenizer`, `columns`).

    micro_batches: by their number in the step, each as the rows it was laid out from.
    """
    with file.open("w", encoding="utf-8") as lines:
        lines.write(json.dumps({"kind": KIND, **header}) + "\n")
        for number, rows in micro_batches.items():
            for row, examples in enumerate(rows):
                for encoded, origin in examples:
                    paths = [_as_json(path) for path in encoded.paths]
                    line = {"micro_batch": number, "row": row, "origin": origin, "paths": paths}
                    lines.write(json.dumps(line) + "\n")


def is_one(file: Path) -> bool:
    """Whether this is such a file."""
    if not file.is_file():
        return False
    with file.open(encoding="utf-8", errors="replace") as lines:
        return KIND in lines.readline(200)


def read(file: Path) -> tuple[dict[str, Any], Iterator[tuple[dict[str, Any], Encoded]]]:
    """The header, and (line, example) of every example. Raises DataError for a file that is broken."""
    try:
        header, *lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no file of a batch any more: {error}.") from error
    return header, ((line, Encoded(tuple(_path(path) for path in line["paths"]))) for line in lines)


def _as_json(path: TokenPath) -> dict[str, Any]:
    return {
        "name": path.name,
        "score": _or_null(path.score),
        "ids": [int(token) for token in path.ids],
        "weights": [float(weight) for weight in path.weights],
        "columns": {name: [_or_null(float(value)) for value in values] for name, values in path.columns.items()},
        "block": path.block,
    }


def _path(stored: Mapping[str, Any]) -> TokenPath:
    columns = {name: [NAN if v is None else v for v in values] for name, values in stored["columns"].items()}
    score = NAN if stored["score"] is None else stored["score"]
    return TokenPath(stored["ids"], stored["weights"], stored["name"], score, columns, stored["block"])


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
