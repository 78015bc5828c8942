"""The first batch checks itself: the layout's log-probs against one plain forward pass per answer.

Architectures that do not honour the mask (state-space layers, remote code) or that do something unknown to their logits
show here, before the first step, and not as a model that learnt the wrong thing.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luthier.core.batch import Batch
from luthier.model.policy import PolicySetup, media_arguments

TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest |difference| in nats per token; rounding stays far below, a lost mask far above (0.3 and more)."""

MOST_TOKENS = 4096
"""Answers are compared until this many tokens have been recomputed."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison found."""

    difference: float
    """Largest |log-prob difference| over the compared tokens."""
    tolerance: float
    compared: int
    """Supervised tokens compared."""
    refusal: str = ""
    """What the model said where it would not compute the layout at all."""

    @property
    def holds(self) -> bool:
        """Whether the layout computes what the plain computation does."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return self.refusal or f"log-probs differ by {self.difference:.3g} nats, tolerance {self.tolerance:g}"


@torch.no_grad()
def verify(setup: PolicySetup, batch: Batch, padded: Batch | None = None) -> Verdict:
    """Compare a batch's log-probs with those of the same answers, one at a time, through the model's own forward.

    padded: the same answers in padded rows, where some show images: which is whose cannot be told from other rows.
    """
    model = setup.model
    # The model's own forward is causal: whether masks are honoured shows without the blocks.
    batch = replace(batch, block=None)
    training = model.training
    model.eval()
    formats = {weight.dtype for weight in model.parameters()}
    try:
        with _one_format(formats, batch.ids.device.type), setup.autocast():
            shared = setup.bind().logps(batch)
            batch = batch if padded is None else padded
            rows = _rows(setup, batch) if batch.media else None
            worst, compared, tokens = 0.0, 0, 0
            for answer in range(batch.answers):
                path = path_of(batch, answer)
                edges = (batch.answer == answer).nonzero()[:, 0]
                if not len(edges):
                    continue
                if tokens and tokens + len(path) > MOST_TOKENS:
                    break
                tokens += len(path)
                plain = _plain(setup, batch, path, edges, rows)
                difference = (plain - shared[edges].to(plain.dtype)).abs().max()
                # NaN compares false with everything and must not pass for equal.
                worst = max(worst, float(torch.nan_to_num(difference, nan=float("inf"))))
                compared += len(edges)
    finally:
        model.train(training)
    return Verdict(worst, max(TOLERANCE.get(dtype, TOLERANCE[torch.float32]) for dtype in formats), compared)


def _one_format(formats: set[torch.dtype], device: str) -> Any:
    """A float32 embedding that is trained over 16-bit layers meets them under autocast only, as in training."""
    half = formats & {torch.bfloat16, torch.float16}
    if not half or torch.float32 not in formats:
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=half.pop())


def path_of(batch: Batch, answer: int) -> Tensor:
    """Flat indices of an answer's tokens, root first, int64 [length]."""
    width = batch.ids.shape[1]
    last = int(batch.last[answer])
    row, column = divmod(last, width)
    index = torch.arange(width, device=batch.ids.device)
    on_path = (index <= column) & (column < batch.end[row])
    return index[on_path] + row * width


def _plain(setup: PolicySetup, batch: Batch, path: Tensor, edges: Tensor, rows: Tensor | None) -> Tensor:
    ids = batch.ids.reshape(-1)[path]
    if rows is not None:
        logits = rows[int(path[0]) // batch.ids.shape[1], : len(path)]
    else:
        logits = setup.model(input_ids=ids[None], use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nodes = batch.target[batch.edge[edges]]
    depth = torch.searchsorted(path, nodes)
    return logits[depth - 1].log_softmax(-1).gather(-1, ids[depth][:, None])[:, 0]


def _rows(setup: PolicySetup, batch: Batch) -> Tensor:
    """The model's logits of padded rows, [R, T, V], the padding masked: of rows with images, since which image is
    whose cannot be told from here."""
    real = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.end[:, :1]
    dtype = setup.model.get_input_embeddings().weight.dtype
    media = media_arguments(batch, dtype)
    return setup.model(input_ids=batch.ids, attention_mask=real.long(), use_cache=False, **media).logits
