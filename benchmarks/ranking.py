"""PRO on lists of K answers to one prompt: shared rows next to padded ones, for K = 2 to 8.

    python benchmarks/ranking.py                    # a Llama of SmolLM2-135M's shape with random weights
    python benchmarks/ranking.py --layers 6         # a fifth of it, for a quick look

A step is one list: a prompt of 1,024 tokens with K scored answers of 128, forward and backward, with PRO's loss. Each
way of computing runs in a process of its own; speeds are ratios within one run, since machines are noisy. The losses
of both ways stand side by side: they must agree.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from layouts import build, items_of
from workers import keep, measure, wait_for_device

WAYS = ("padded", "shared")
SIZES = tuple(range(2, 9))


def ranked(answers: int, prompt: int, reply: int) -> list:
    """One list with the scores K, K - 1 ... 1, halved so that temperatures stay moderate."""
    ((encoded, name),) = items_of("ranked", answers, prompt, reply)
    paths = tuple(replace(path, score=(answers - rank) / 2) for rank, path in enumerate(encoded.paths))
    return [(replace(encoded, paths=paths), name)]


def worker(options: argparse.Namespace) -> None:
    """Measure one way at every K and print the figures as JSON."""
    import torch

    from luthier.data.layout import collate
    from luthier.model.policy import PolicySetup
    from luthier.objectives.pro import Pro

    device = "cuda" if torch.cuda.is_available() else "cpu"
    setup, objective = PolicySetup(build(options.layers).train().to(device)), Pro()
    found = {}
    for answers in options.sizes:
        items = ranked(answers, options.prompt, options.reply)
        batch = collate(items, layout=options.worker, pad_id=0).to(device)
        seconds = []
        for _ in range(options.repeats + 1):
            start = time.perf_counter()
            setup.model.zero_grad()
            loss, _ = objective.loss(setup.bind(), batch)
            loss.backward()
            wait_for_device()
            seconds.append(time.perf_counter() - start)
        # The first step pays for warming up.
        found[answers] = {"tokens": batch.ids.numel(), "seconds": min(seconds[1:]), "loss": loss.item()}
    print(json.dumps(found))


def main() -> None:
    """Print a table; --json FILE keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="the K to measure")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--reply", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from rich.console import Console
    from rich.table import Table

    same = ("sizes", "layers", "prompt", "reply", "repeats")
    found = {way: measure(__file__, options, same, worker=way) for way in WAYS}
    table = Table(title=f"PRO, one list a step, {options.layers} layers")
    for column in ("K", "tokens padded", "shared", "s/step padded", "shared", "speed", "loss padded", "shared"):
        table.add_column(column, justify="right")
    for size in map(str, options.sizes):
        padded, shared = found["padded"][size], found["shared"][size]
        table.add_row(
            size,
            *(f"{way['tokens']:,}" for way in (padded, shared)),
            *(f"{way['seconds']:.2f}" for way in (padded, shared)),
            f"{padded['seconds'] / shared['seconds']:.2f}x",
            *(f"{way['loss']:.4f}" for way in (padded, shared)),
        )
    Console().print(table)
    if options.json:
        keep(options.json, __file__, found)


if __name__ == "__main__":
    main()
