"""What the tests of both ranking stages stand on: random lists, a policy that says what it is told, plain forwards."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tests.conftest import build_model
from tests.exact.conftest import gradients, in_double, plain_nll
from torch import Tensor

from luthier.core.batch import Batch, total_units
from luthier.core.types import Encoded, Path
from luthier.data.layout import collate
from luthier.model.policy import PolicySetup
from luthier.train import by_hand

LAYOUTS = ("padded", "packed", "shared")


def double_model():
    """A tiny Llama that computes in float64 throughout."""
    return in_double(build_model("llama", dtype=torch.float64)).eval()


def lists(*scores: list[float], seed: int = 0) -> list[tuple[Encoded, str]]:
    """One example per list of scores, with random prompts and replies of different lengths."""
    rng = random.Random(seed)
    items = []
    for number, marks in enumerate(scores):
        prompt = [rng.randrange(7, 400) for _ in range(rng.randint(2, 9))]
        paths = []
        for k, score in enumerate(marks):
            reply = [rng.randrange(7, 400) for _ in range(rng.randint(1, 8))]
            weights = [0.0] * len(prompt) + [1.0] * len(reply)
            paths.append(Path(prompt + reply, weights, f"candidate-{k}", score))
        items.append((Encoded(tuple(paths)), f"row {number}"))
    return items


def lay_out(items, layout: str = "padded") -> Batch:
    return collate(items, layout=layout, pad_id=3)


@dataclass
class Told:
    """A policy of one-token answers with these log-probs, [N]."""

    values: Tensor

    def logps(self, batch):
        return self.values[batch.answer]

    def nll(self, batch):
        return -self.values[batch.answer]


def told(scores: list[list[float]]) -> Batch:
    """A batch of one-token answers, for `Told`."""
    one = [Encoded(tuple(Path([1, 10 + k], [0.0, 1.0], str(k), s) for k, s in enumerate(marks))) for marks in scores]
    return lay_out([(encoded, "row") for encoded in one])


def plain_logps(model, encoded: Encoded) -> list[list[Tensor]]:
    """Log-probs of the tokens of every answer, best answer first, each from a forward pass of its own."""
    ordered = sorted(encoded.paths, key=lambda path: -path.score)
    return [[-nll for _, nll in plain_nll(model, path)] for path in ordered]


def luthier_loss(objective, model, items, layout: str = "padded", progress: float = 1.0, cut=None):
    """(loss, gradients) of one optimiser step, cut into micro-batches of the sizes in `cut`."""
    setup = PolicySetup(model)
    sizes, start, batches = cut or [len(items)], 0, []
    for size in sizes:
        batches.append(lay_out(items[start : start + size], layout))
        start += size
    totals = total_units(batches) | by_hand.survey(setup.bind, objective, batches)
    loss = sum(objective.loss(setup.bind(), batch.with_totals(totals, progress))[0] for batch in batches)
    found = gradients(model, loss)
    setup.close()
    return loss.item(), found


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
