"""`luthier preview`: what the model will see, token by token. Loads no weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.commands import parse_command
from luthier.core import log as logging
from luthier.core.errors import ConfigError
from luthier.core.types import Encoded
from luthier.core.types import Path as TokenPath
from luthier.run import Run, resolve

if TYPE_CHECKING:
    from luthier.data.encode import Prepared
    from luthier.data.source import DataConfig

log = logging.get_logger("preview")

PICTURE = "lengths.png"
"""What `--plot` draws, in output_dir."""
WIDE = 100_000


def prepare_data(run: Run, data: DataConfig) -> tuple[Any, Prepared]:
    """The tokenizer of a run, and its data encoded as training would encode them."""
    from luthier.assemble import read_data

    return read_data(run, data, seed=int(run.training.get("seed", 42)))


def rows_of(run: Run, count: int | None) -> tuple[Any, Prepared, Iterator[tuple[int, Encoded, str]]]:
    """The tokenizer, what was prepared, and the first `count` encoded examples as (row, encoded, file:row).

    Rows are numbered from 0 in the order of the data; a row that had to be cut into several examples comes several
    times. Nothing is shuffled or split off; examples are as the stage trains them.
    """
    whole = {"val_size": 0.0, "eval_dataset": None, "streaming": False, "buffer_size": type(run.data).buffer_size}
    data = dataclasses.replace(run.data, **whole)
    if count is not None:
        fewest = count if data.max_samples is None else min(count, data.max_samples)
        data = dataclasses.replace(data, max_samples=fewest, tokenized_path=None)
    tokenizer, prepared = prepare_data(run, data)
    examples = prepared.train
    order = range(len(examples) if count is None else min(count, len(examples)))
    return tokenizer, prepared, ((examples.row(i), *run.objective.complete(i, examples)) for i in order)


def as_json(row: int, encoded: Encoded, columns: Sequence[str]) -> dict[str, Any]:
    """One example in the machine-readable form: full root-to-leaf ids, and labels at the same index."""
    return {"row": row, "branches": [_branch(path, columns) for path in encoded.paths]}


def _branch(path: TokenPath, columns: Sequence[str]) -> dict[str, Any]:
    labels: list[Any] = [
        token if weight and i else -100 for i, (token, weight) in enumerate(zip(path.ids, path.weights))
    ]
    for name in columns:
        values = path.column(name)
        labels = [None if math.isnan(value) else value for value in values]
    score = None if math.isnan(path.score) else path.score
    return {"name": path.name, "input_ids": path.ids, "labels": labels, "score": score}


def chosen(which: np.ndarray, count: int) -> list[int]:
    """The examples to show: the first ones, of each data set in turn. which: int [N], the data set of each example."""
    queues = [np.flatnonzero(which == nth).tolist() for nth in np.unique(which)]
    turns = [index for turn in itertools.zip_longest(*queues) for index in turn if index is not None]
    return turns[:count]


def write_json(run: Run, rows: int | None) -> None:
    """One JSON object per example on stdout, and nothing else."""
    _, _, examples = rows_of(run, rows)
    columns = [column.name for column in run.objective.columns]
    for row, encoded, _ in examples:
        sys.stdout.write(json.dumps(as_json(row, encoded, columns)) + "\n")


def show(run: Run, *, rows: int, count: int, plot: str | bool, full: bool) -> None:
    """Examples, counters and lengths on the terminal. count: rows of each data set that are read, 0 for all."""
    from rich.console import Console

    from luthier import preview_counts, preview_view

    if plot:
        preview_counts.check_drawing()
    tokenizer, prepared, _ = rows_of(run, max(count, rows) if count else None)
    examples = prepared.train
    console = Console(highlight=False)
    if not console.is_terminal:
        # Nothing is broken or cropped on the way into a file.
        console = Console(highlight=False, width=WIDE)
    column = next((column.name for column in run.objective.columns), None)
    look = preview_view.Look.of(console, tokenizer, full=full, column=column, word=prepared.report.word)
    console.print(preview_view.legend(look))
    for index in chosen(examples.which, rows):
        encoded, origin = run.objective.complete(index, examples)
        console.print(preview_view.example(look, examples.row(index), encoded, origin), "")
    limit = max(count, rows) if count else None
    console.print(preview_counts.counters(prepared.report, limit))
    console.print(preview_counts.histogram(examples.longest, run.layout.cutoff_len, ascii_only=look.ascii))
    if plot:
        where = Path(plot) if isinstance(plot, str) else Path(run.training.get("output_dir") or ".") / PICTURE
        drawn = preview_counts.draw(examples.longest, run.layout.cutoff_len, where)
        console.print(f"Drawn: {drawn}", soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    """`luthier preview CONFIG`, or a batch that training kept; its flags are in `luthier preview --help`."""
    from luthier import preview_batch
    from luthier.train import bad_batch

    command = parse_command(argv, "preview")
    flags = command.flags
    for name in ("rows", "count"):
        if flags[name] is not None and flags[name] < 0:
            raise ConfigError(f"--{name} {flags[name]}: expected 0 or more.")
    if isinstance(command.config, str) and bad_batch.is_one(Path(command.config)):
        preview_batch.show(Path(command.config), rows=flags["rows"], form=flags["format"], full=flags["full"])
        return 0
    run = resolve(command.config, command.overrides, verb="preview")
    for warning in run.warnings:
        log.warning("%s", warning)
    if flags["format"] == "jsonl":
        write_json(run, flags["rows"])
    else:
        rows = 3 if flags["rows"] is None else flags["rows"]
        show(run, rows=rows, count=flags["count"], plot=flags["plot"], full=flags["full"])
    return 0
