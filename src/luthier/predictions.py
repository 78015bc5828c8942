"""`do_predict`: what the trained model thinks of each answer of the evaluation rows, as a file."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.log import get_logger

if TYPE_CHECKING:
    from luthier.core.objective import Objective
    from luthier.train.sampler import Bundles
    from luthier.train.trainer import Trainer

log = get_logger("fit")

FILE = "generated_predictions.jsonl"
"""LLaMA-Factory's name for it."""

Record = tuple[str, list[dict[str, Any]]]
"""Where an example came from, and what is recorded about each of its answers."""


def write_predictions(trainer: Trainer, dataset: Bundles | Mapping[str, Bundles], folder: Path) -> Path:
    """Write `generated_predictions.jsonl`: one object {"row", "answers": [{...}]} per example, in the set's order.

    Of several sets each object names its own under "set". Every rank takes its part; rank 0 writes, and the file
    is complete or absent.
    """
    sets = dataset if isinstance(dataset, Mapping) else {"": dataset}
    lines: list[str] = []
    for name, part in sets.items():
        mine = list(trainer.records(part))
        for row, answers in _in_order(_of_all_ranks(mine, trainer), trainer.args.eval_batch_size):
            line = {"row": row, "answers": [_answer(answer) for answer in answers]}
            lines.append(json.dumps(line | ({"set": name} if name else {}), ensure_ascii=False))
    target = folder / FILE
    if trainer.is_world_process_zero():
        _write(target, "".join(line + "\n" for line in lines))
        log.info("%d predictions are in %s.", len(lines), target)
    return target


def report(predictions: Path, objective: Objective) -> dict[str, float]:
    """What the objective's own module in `evaluate/` measures of its predictions; tables and pictures lie beside them.

    Of several sets each has its own folder and its name in the measures. Keys begin with `eval_`.
    """
    module = importlib.import_module(f"luthier.evaluate.{objective.report}")
    sets: dict[str, list[Record]] = {}
    for line in predictions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        sets.setdefault(row.get("set", ""), []).append((row["row"], row["answers"]))
    found: dict[str, float] = {}
    for name, records in sets.items():
        folder = predictions.parent / f"{objective.report}-{name}" if name else predictions.parent
        prefix = f"eval_{name}_" if name else "eval_"
        found |= {prefix + key: value for key, value in module.report(records, folder, objective).items()}
    return found


def _of_all_ranks(mine: list[Record], trainer: Trainer) -> list[list[Record]]:
    if trainer.args.world_size == 1:
        return [mine]
    from torch import distributed

    found: list[Any] = [None] * trainer.args.world_size
    distributed.all_gather_object(found, mine)
    return found


def _in_order(ranks: Sequence[Sequence[Record]], batch: int) -> list[Record]:
    """The records of all ranks in the set's own order: batch after batch, the ranks take turns (`RankSampler`)."""
    batches = [[records[i : i + batch] for i in range(0, len(records), batch)] for records in ranks]
    return [record for turn in zip_longest(*batches, fillvalue=()) for part in turn for record in part]


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can hold it, without the score of an answer that nobody scored."""
    known = _plain(answer)
    return {name: value for name, value in known.items() if name != "score" or value is not None}


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null, at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(target: Path, text: str) -> None:
    staged = target.with_name(f".partial-{target.name}")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, target)
