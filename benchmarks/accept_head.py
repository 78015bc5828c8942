"""AcceptHead: the rounds of one request in a token tree, next to one row a round.

    python benchmarks/accept_head.py                # a Llama of SmolLM2-135M's shape with random weights, LoRA r 8
    python benchmarks/accept_head.py --layers 6     # a fifth of it, for a quick look

A case is one request: rounds of 5 draft tokens that leave its context at places spread from 300 to 1,300 tokens, one
scored mismatch each. `tree` computes all of them in one forward and backward pass. `rows` is the plain way: context,
separator, draft, separator, verifier in a padded row of its own, through the model's own forward, at the batch sizes
given; since it takes minutes on a CPU, every Nth round is timed (--sample), and speeds are rounds per second. Every
way runs in a process of its own, so that its peak memory is its own; the losses of both over the same sampled rounds
stand side by side.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from layouts import build
from workers import keep, measure, peak_bytes, wait_for_device

SEP, DRAFT = 2, 5


def rounds_of(count: int, shortest: int, longest: int) -> list[tuple[list[int], list[int], list[int], int, float]]:
    """(context, draft, verifier, mismatch, target) of each round of one request."""
    rng = random.Random(0)
    text = [rng.randrange(10, 49000) for _ in range(longest)]
    found = []
    for nth in range(count):
        draft = [rng.randrange(10, 49000) for _ in range(DRAFT)]
        wrong = rng.randrange(DRAFT)
        verifier = [*draft, rng.randrange(10, 49000)]
        verifier[wrong] += 1
        length = shortest + nth * (longest - shortest) // max(count - 1, 1)
        found.append((text[:length], draft, verifier, wrong, rng.randrange(11) / 10))
    return found


def prepared(layers: int):
    """The model with LoRA on every linear layer, and an accept head."""
    import torch
    from peft import LoraConfig, get_peft_model

    from luthier.model import heads

    model = get_peft_model(build(layers), LoraConfig(r=8, target_modules="all-linear"))
    head = heads.attach(model, "accept", seed=1)
    torch.nn.init.normal_(head.fc2.weight)
    return model.train().to("cuda" if torch.cuda.is_available() else "cpu"), head


def tree_step(model, head, rounds):
    """(forward and backward of all rounds as one tree, tokens computed)."""
    from luthier.core.types import NAN, Encoded
    from luthier.core.types import Path as TokenPath
    from luthier.data.layout import collate
    from luthier.model.policy import PolicySetup
    from luthier.objectives.accept_head import SCORE, AcceptHead

    paths = []
    for context, draft, _, wrong, target in rounds:
        ids = [*context, SEP, *draft[: wrong + 1]]
        plain = len(ids) - 1
        paths.append(TokenPath(ids, [0.0] * plain + [1.0], columns={SCORE: [NAN] * plain + [target]}))
    batch = collate([(Encoded(tuple(paths)), "request")], layout="shared", pad_id=0, columns=[SCORE])
    batch = batch.to(next(model.parameters()).device)
    setup, objective = PolicySetup(model, head=head), AcceptHead()

    def step() -> float:
        loss, _ = objective.loss(setup.bind(), batch)
        loss.backward()
        return loss.item()

    return step, batch.tokens


def rows_step(model, head, rounds, size: int):
    """(forward and backward of all rounds, a padded row each, `size` at a time; tokens computed)."""
    import torch
    import torch.nn.functional as F

    base = model.get_base_model().model
    device = next(model.parameters()).device
    batches, computed = [], 0
    for start in range(0, len(rounds), size):
        rows = [([*c, SEP, *d, SEP, *v], len(c) + 1 + w, t) for c, d, v, w, t in rounds[start : start + size]]
        width = max(len(ids) for ids, _, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _, _ in rows], device=device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _, _ in rows], device=device)
        at = torch.tensor([at for _, at, _ in rows], device=device)
        batches.append((ids, mask, at, torch.tensor([t for _, _, t in rows], device=device)))
        computed += ids.numel()

    def step() -> float:
        total = 0.0
        for ids, mask, at, target in batches:
            hidden = base(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logit = head(hidden[torch.arange(len(ids), device=device), at].float())[:, 0]
            loss = F.binary_cross_entropy_with_logits(logit, target, reduction="sum") / len(rounds)
            loss.backward()
            total += loss.item()
        return total

    return step, computed


def worker(options: argparse.Namespace) -> None:
    """Measure one way and print the figures as JSON."""
    model, head = prepared(options.layers)
    everything = rounds_of(options.rounds, options.shortest, options.longest)
    sample = everything[:: max(1, options.rounds // options.sample)]
    way, _, size = options.worker.partition(":")
    if way == "tree":
        loss = tree_step(model, head, sample)[0]()
        step, tokens = tree_step(model, head, everything)
        count = len(everything)
    else:
        step, tokens = rows_step(model, head, sample, int(size))
        loss, count = None, len(sample)
    seconds = []
    for nth in range(options.repeats + (way == "tree")):
        model.zero_grad()
        start = time.perf_counter()
        found = step()
        wait_for_device()
        # The first tree pays for warming up; the plain way is slow enough not to notice.
        if nth or way != "tree":
            seconds.append(time.perf_counter() - start)
    best = min(seconds)
    figures = {"rounds": count, "tokens": tokens, "seconds": best, "rounds_per_second": count / best}
    print(json.dumps(figures | {"peak_bytes": peak_bytes(), "loss": found if loss is None else loss}))


def main() -> None:
    """Print a table; --json FILE keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--cases", type=int, nargs="+", default=(100, 200), help="rounds of the request")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=(1, 4, 8), help="rows at a time, the plain way")
    parser.add_argument("--shortest", type=int, default=300, help="tokens of the shortest context")
    parser.add_argument("--longest", type=int, default=1300)
    parser.add_argument("--sample", type=int, default=10, help="rounds that the plain way is timed on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    from rich.console import Console
    from rich.table import Table

    ways = ["tree", *(f"rows:{size}" for size in options.batch_sizes)]
    same = ("layers", "shortest", "longest", "sample", "repeats")
    found = {
        f"{count} rounds": {way: measure(__file__, options, same, worker=way, rounds=count) for way in ways}
        for count in options.cases
    }
    table = Table(
        title=f"AcceptHead, contexts of {options.shortest} to {options.longest} tokens, {options.layers} layers"
    )
    for column in (
        "case",
        "way",
        "rounds timed",
        "tokens a round",
        "rounds/s",
        "tree is",
        "peak GiB",
        "loss of the sample",
    ):
        table.add_column(column, justify="right")
    for case, figures in found.items():
        for way, seen in figures.items():
            table.add_row(
                case,
                way,
                str(seen["rounds"]),
                f"{seen['tokens'] / seen['rounds']:,.1f}",
                f"{seen['rounds_per_second']:.3g}",
                f"{figures['tree']['rounds_per_second'] / seen['rounds_per_second']:.1f}x",
                f"{seen['peak_bytes'] / 2**30:.2f}",
                f"{seen['loss']:.6f}",
            )
    Console(width=130).print(table)
    if options.json:
        keep(options.json, __file__, found)


if __name__ == "__main__":
    main()
