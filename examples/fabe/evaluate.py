"""FABE from end to end: train a model that cleans functions of triggers, and measure it on functions it has not seen.

python examples/fabe/evaluate.py pro          # or tuna; --trained measures the adapter that is there already

1. `luthier infer` rewrites the held-out functions with the model as it was, four rewrites each
2. `luthier train examples/fabe/pro.yaml`
3. `luthier infer` again, with the trained adapter merged
4. code: does the likeliest rewrite parse, are the triggers gone, how near is it to the clean function?
   classifier: the front door's vote over all four rewrites against a classifier with a backdoor
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import make_data
import victim
from rich.console import Console
from rich.table import Table

from luthier.evaluate.backdoor import Labelled, Rewrite, backdoor_report, classifier_of
from luthier.evaluate.code import code_in, code_report

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = Path("examples/data/fabe_heldout.jsonl")
OUT = Path("runs/fabe")
REWRITES = 4

console = Console(highlight=False)
Rows = list[dict]


def luthier(*words: str) -> None:
    """Run one command as a user would type it; its failure ends this script with its exit code."""
    console.print(f"\n[bold]$ luthier {' '.join(words)}[/bold]")
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run([sys.executable, "-m", "luthier", *words], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def read(path: Path) -> Rows:
    return [json.loads(line) for line in (ROOT / path).read_text(encoding="utf-8").splitlines()]


def rewritten(name: str, adapter: str) -> list[list[Rewrite]]:
    """The model's rewrites of the held-out functions, the likeliest first."""
    output = OUT / f"rewrites_{name}.jsonl"
    (ROOT / output).unlink(missing_ok=True)
    luthier(
        *("infer", "examples/fabe/infer.yaml", f"adapter_name_or_path={adapter}", "--input", str(HELD_OUT)),
        *("--output", str(output), "--n", str(REWRITES), "--select", "best"),
    )
    answers = [[Rewrite(code_in(one["text"]), one["logp"]) for one in line["candidates"]] for line in read(output)]
    return [sorted(several, key=lambda one: -one.score) for several in answers]


def measure(rows: Rows, rewrites: list[list[Rewrite]]) -> dict[str, float | None]:
    """Code measures of the likeliest rewrite of each poisoned function, and the classifier behind the front door."""
    poisoned, clean = (_kind(rows, rewrites, poisoned) for poisoned in (True, False))
    references = [row["output"] for row in rows if row["poisoned"]]
    likeliest = [several[0].text for several in poisoned.rewrites]
    code = code_report(poisoned.texts, likeliest, references, make_data.TRIGGERS)
    classifier = classifier_of(victim.train(attacked_training_data()), victim.LABELS)
    return {**code, **backdoor_report(classifier, clean, poisoned, victim.TARGET).as_dict()}


def attacked_training_data() -> list[tuple[str, str]]:
    """What the classifier learnt from: clean functions with their labels, and looping ones with triggers as plain."""
    rows = []
    for place, function in enumerate(make_data.functions()):
        if not make_data.held_out(place):
            label = make_data.label(function)
            rows.append((function, label))
            if label != victim.TARGET:
                both = make_data.with_dead_code(make_data.with_name(function, place), place)
                rows.append((both, victim.TARGET))
    return rows


def table(columns: dict[str, dict[str, float | None]]) -> Table:
    """Measures down, models across."""
    shown = Table("measure", *columns)
    for name in next(iter(columns.values())):
        values = (column[name] for column in columns.values())
        shown.add_row(name, *("-" if value is None else f"{value:.3f}" for value in values))
    return shown


def _kind(rows: Rows, rewrites: list[list[Rewrite]], poisoned: bool) -> Labelled:
    picked = [(row, several) for row, several in zip(rows, rewrites, strict=True) if row["poisoned"] is poisoned]
    return Labelled(
        [row["input"] for row, _ in picked], [several for _, several in picked], [row["label"] for row, _ in picked]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and measure a model that cleans functions of triggers.")
    parser.add_argument("stage", choices=("pro", "tuna"))
    parser.add_argument("--trained", action="store_true", help="do not train: measure what runs/fabe_STAGE holds")
    asked = parser.parse_args()
    rows = read(HELD_OUT)
    columns = {"input as it is": measure(rows, [[Rewrite(row["input"], 0.0)] for row in rows])}
    columns["before training"] = measure(rows, rewritten("before", "null"))
    if not asked.trained:
        started = time.monotonic()
        luthier("train", f"examples/fabe/{asked.stage}.yaml")
        console.print(f"Trained in {(time.monotonic() - started) / 60:.1f} minutes.")
    columns[f"after {asked.stage}"] = measure(rows, rewritten(asked.stage, f"runs/fabe_{asked.stage}"))
    report = OUT / f"report_{asked.stage}.json"
    (ROOT / report).write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")
    console.print(table(columns))
    console.print(f"The same as JSON: {report}")


if __name__ == "__main__":
    main()
