"""`make demo`: fetch a small real model, ask it three questions, fine-tune it, ask again.

Every step is a command that can be typed; each is shown before it runs. None of the questions is trained on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/demo")
QUESTIONS = Path("examples/data/demo_prompts.jsonl")
IDENTITY = ("Stradi", "Luthier workshop")
"""What the answers did not say before and should say afterwards."""

console = Console(stderr=True, highlight=False)


def luthier(*words: str) -> None:
    """Run one command as a user would type it; its failure ends the demo with its exit code."""
    console.print(f"\n[bold]$ luthier {' '.join(words)}[/bold]")
    # On a machine that does other work too, threads that spin while they wait for each other lose a factor of ten.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run([sys.executable, "-m", "luthier", *words], cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


def ask(output: Path, *keys: str) -> list[str]:
    """The model's answers to the three questions, by `luthier infer`."""
    (ROOT / output).unlink(missing_ok=True)
    luthier("infer", "examples/demo_chat.yaml", *keys, "--input", str(QUESTIONS), "--output", str(output))
    return [json.loads(line)["predict"].strip() for line in (ROOT / output).read_text().splitlines()]


def compare(before: list[str], after: list[str]) -> Table:
    """The three questions with both answers."""
    table = Table("question", "before", "after", show_lines=True)
    questions = [json.loads(line)["instruction"] for line in (ROOT / QUESTIONS).read_text().splitlines()]
    for row in zip(questions, before, after, strict=True):
        table.add_row(*row)
    return table


def main() -> int:
    """0 if the new identity shows in the answers, 1 if it does not."""
    luthier("fetch-model", "smollm2-135m", "models/smollm2-135m")
    before = ask(OUT / "answers_before.jsonl", "adapter_name_or_path=null")
    started = time.monotonic()
    luthier("train", "examples/demo.yaml")
    minutes = (time.monotonic() - started) / 60
    after = ask(OUT / "answers_after.jsonl")
    console.print()
    console.print(compare(before, after))
    carried = sum(any(name in answer for name in IDENTITY) for answer in after)
    console.print(
        f"\nTrained in {minutes:.1f} minutes. The new identity shows in {carried} of {len(after)} answers; "
        "the last question is there to see that the model kept its manners.\n"
        f"  adapter    {OUT / 'adapter_model.safetensors'}\n"
        f"  loss plot  {OUT / 'training_loss.png'}\n"
        f"  log        {OUT / 'trainer_log.jsonl'}\n"
        "\nTalk to it:     [bold].venv/bin/luthier chat examples/demo_chat.yaml[/bold]"
        "\nMake it yours:  change examples/data/identity_luthier.jsonl and run `make demo` again."
    )
    return 0 if carried else 1


if __name__ == "__main__":
    sys.exit(main())
