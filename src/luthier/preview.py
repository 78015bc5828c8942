"""`luthier preview`: what the model will see, token by token. Loads no weights."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core import log as logging
from luthier.core.tree import grow
from luthier.core.types import Encoded, Path
from luthier.run import Run, resolve

if TYPE_CHECKING:
    from rich.text import Text

    from luthier.data.encode import Prepared
    from luthier.data.source import DataConfig

log = logging.get_logger("preview")


def prepare_data(run: Run, data: DataConfig) -> tuple[Any, Prepared]:
    """The tokenizer of a run, and its data encoded as training would encode them."""
    from luthier.data.encode import prepare
    from luthier.data.template import make_renderer
    from luthier.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    renderer = make_renderer(run.template, tokenizer)
    run.objective.start(renderer)
    seed = int(run.training.get("seed", 42))
    return tokenizer, prepare(data, run.objective, renderer, cutoff_len=run.layout.cutoff_len, seed=seed)


def rows_of(run: Run, count: int | None) -> tuple[Any, Prepared, Iterator[tuple[int, Encoded, str]]]:
    """The tokenizer, what was prepared, and the first `count` encoded examples as (row, encoded, file:row).

    Rows are numbered from 0 in the order of the data; a row that had to be cut into several examples comes several
    times. Nothing is shuffled or split off; examples are as the stage trains them.
    """
    data = dataclasses.replace(run.data, val_size=0.0, eval_dataset=None)
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


def _branch(path: Path, columns: Sequence[str]) -> dict[str, Any]:
    labels: list[Any] = [
        token if weight and i else -100 for i, (token, weight) in enumerate(zip(path.ids, path.weights))
    ]
    for name in columns:
        values = path.column(name)
        labels = [None if math.isnan(value) else value for value in values]
    score = None if math.isnan(path.score) else path.score
    return {"name": path.name, "input_ids": path.ids, "labels": labels, "score": score}


def as_text(tokenizer: Any, row: int, encoded: Encoded, origin: str) -> Text:
    """One example for people: what is trained in green, what is only read dimmed, a shared beginning shown once."""
    from rich.text import Text

    tree, nodes = grow([path.ids for path in encoded.paths])
    total = sum(len(path.ids) for path in encoded.paths)
    shared = f", {total - len(tree)} of them shared" if total > len(tree) else ""
    cut = f", {encoded.truncated} cut away" if encoded.truncated else ""
    text = Text(f"row {row}  {origin}  {total} tokens{shared}{cut}\n", style="bold")
    shown: set[int] = set()
    for path, at in zip(encoded.paths, nodes):
        trained = sum(1 for weight in path.weights[1:] if weight)
        score = "" if math.isnan(path.score) else f", score {path.score:g}"
        text.append(f"{path.name}: {len(path.ids)} tokens, {trained} trained{score}\n", style="cyan")
        skipped = sum(1 for node in at.tolist() if node in shown)
        if skipped:
            text.append(f"[{skipped} tokens as above] ", style="magenta")
        for start, stop, weight in _stretches(path, skipped):
            piece = tokenizer.decode(path.ids[start:stop], skip_special_tokens=False)
            style = "dim" if not weight else "green" if weight == 1 else "yellow"
            text.append(piece, style=style)
        text.append("\n")
        shown.update(at.tolist())
    return text


def _stretches(path: Path, start: int) -> Iterator[tuple[int, int, float]]:
    """(start, stop, weight) of neighbouring tokens of the same weight."""
    while start < len(path.ids):
        stop = start + 1
        while stop < len(path.ids) and path.weights[stop] == path.weights[start]:
            stop += 1
        yield start, stop, path.weights[start]
        start = stop


def main(argv: Sequence[str]) -> int:
    """`luthier preview CONFIG [key=value ...] [--rows N] [--format text|jsonl]`."""
    from rich.console import Console

    from luthier.cli import parse_command

    command = parse_command(argv, "preview")
    run = resolve(command.config, command.overrides, verb="preview")
    for warning in run.warnings:
        log.warning("%s", warning)
    machine = command.flags["format"] == "jsonl"
    rows = command.flags["rows"]
    tokenizer, prepared, examples = rows_of(run, rows if rows is not None or machine else 3)
    columns = [column.name for column in run.objective.columns]
    if machine:
        for row, encoded, _ in examples:
            sys.stdout.write(json.dumps(as_json(row, encoded, columns)) + "\n")
        return 0
    console = Console(soft_wrap=True)
    for row, encoded, origin in examples:
        console.print(as_text(tokenizer, row, encoded, origin))
    console.print("green: trained   dim: read only   yellow: trained with another weight than 1", style="bold")
    console.print(prepared.report)
    return 0
