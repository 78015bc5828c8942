"""Padded, packed and shared rows side by side, next to a plain transformers.Trainer on the same rows.

    python benchmarks/layouts.py                    # a Llama of SmolLM2-135M's shape with random weights
    python benchmarks/layouts.py --layers 6         # a fifth of it, for a quick look

Two cases. `ranked`: K answers of 128 tokens to one prompt of 1,024 (preference and ranking data). `chat`: the demo's
own rows, a few to a micro-batch. Each way of computing runs in a process of its own, so that its peak memory is its
own; speeds are ratios within one run, since machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from workers import keep, measure, peak_bytes, wait_for_device

WAYS = ("transformers", "padded", "packed", "shared")
ROOT = Path(__file__).resolve().parent.parent


def items_of(case: str, answers: int, prompt: int, reply: int) -> list:
    """Encoded examples of a case: one optimiser step's worth."""
    import random

    from luthier.core.types import Encoded
    from luthier.core.types import Path as TokenPath

    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10, 49000) for _ in range(count)]

    if case == "ranked":
        stem = tokens(prompt)
        paths = [TokenPath(stem + tokens(reply), [0.0] * prompt + [1.0] * reply) for _ in range(answers)]
        return [(Encoded(tuple(paths)), "ranked")]
    return chat_rows()


def chat_rows() -> list:
    """The first 16 examples of the demo: its data, template and tokenizer."""
    from luthier.preview import rows_of
    from luthier.run import resolve

    os.chdir(ROOT)
    run = resolve("examples/demo.yaml")
    if not Path(run.model.model_name_or_path).is_dir():
        raise SystemExit(
            "the chat case reads the demo's tokenizer: luthier fetch-model smollm2-135m models/smollm2-135m"
        )
    _, _, examples = rows_of(run, 16)
    return [(encoded, origin) for _, encoded, origin in examples]


def build(layers: int):
    """A Llama of SmolLM2-135M's shape."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
        )
    )  # fmt: skip


def luthier_step(model, items, way: str):
    """A function that does one forward and backward pass in a layout; and the tokens it computes."""
    from luthier.data.layout import collate
    from luthier.model.policy import PolicySetup

    setup = PolicySetup(model)
    batch = collate(items, layout=way, pad_id=0)

    def step():
        batch.mean(setup.bind().nll(batch), over="token").backward()

    return step, batch.ids.numel()


def transformers_step(model, items):
    """The same rows through transformers.Trainer's own training step."""
    import tempfile

    import torch
    from transformers import Trainer, TrainingArguments

    paths = [path for encoded, _ in items for path in encoded.paths]
    width = max(len(path.ids) for path in paths)
    inputs = {
        name: torch.zeros(len(paths), width, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")
    }
    inputs["labels"] -= 100
    for row, path in enumerate(paths):
        ids = torch.tensor(path.ids)
        inputs["input_ids"][row, : len(ids)] = ids
        inputs["attention_mask"][row, : len(ids)] = 1
        inputs["labels"][row, : len(ids)] = torch.where(torch.tensor(path.weights) > 0, ids, -100)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), report_to="none"
    )
    trainer = Trainer(model=model, args=arguments)
    count = (inputs["labels"] != -100).sum()
    return lambda: trainer.training_step(model, dict(inputs), count), inputs["input_ids"].numel()


def worker(options: argparse.Namespace) -> None:
    """Measure one way and print the figures as JSON."""
    import torch

    model = build(options.layers).train()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    items = items_of(options.case, options.answers, options.prompt, options.reply)
    make = transformers_step if options.worker == "transformers" else luthier_step
    step, tokens = make(model, items) if options.worker == "transformers" else make(model, items, options.worker)
    step()
    wait_for_device()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        step()
        wait_for_device()
        seconds.append(time.perf_counter() - start)
    plain = sum(len(path.ids) for encoded, _ in items for path in encoded.paths)
    print(json.dumps({"tokens": tokens, "plain_tokens": plain, "seconds": min(seconds), "peak_bytes": peak_bytes()}))


def main() -> None:
    """Print a table per case; --json FILE keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--answers", type=int, default=8, help="K of the ranked case")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--case", choices=["ranked", "chat"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from rich.console import Console
    from rich.table import Table

    found = {}
    for case in [options.case] if options.case else ["ranked", "chat"]:
        same = ("layers", "answers", "prompt", "reply", "repeats")
        found[case] = {way: measure(__file__, options, same, worker=way, case=case) for way in WAYS}
        padded = found[case]["padded"]["seconds"]
        table = Table(title=f"{case}: one forward and backward pass, {options.layers} layers")
        for column in ("way", "tokens computed", "seconds", "answer tokens/s", "peak memory", "speed against padded"):
            table.add_column(column, justify="left" if column == "way" else "right")
        for way, figures in found[case].items():
            table.add_row(
                way,
                f"{figures['tokens']:,}",
                f"{figures['seconds']:.2f}",
                f"{figures['plain_tokens'] / figures['seconds']:,.0f}",
                f"{figures['peak_bytes'] / 2**30:.2f} GiB",
                f"{padded / figures['seconds']:.2f}x",
            )
        Console(width=110).print(table)
    if options.json:
        keep(options.json, __file__, found)


if __name__ == "__main__":
    main()
