"""Training a head alone: the model asked for hidden states once, and a policy that reads them instead of computing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.batch import Batch
from luthier.model.heads import base_of
from luthier.model.policy import PolicySetup


class HeadOnly(nn.Module):
    """A head with the configuration of the model it was taken from; what a Trainer trains when nothing else moves."""

    def __init__(self, head: nn.Module, model: nn.Module):
        super().__init__()
        self.luthier_head = head
        self.config = base_of(model).config

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [X, H] -> [X, width]."""
        return self.luthier_head(hidden)


class HeadOnlySetup:
    """Stands for a `PolicySetup` whose batches bring their hidden states."""

    def __init__(self, setup: PolicySetup):
        assert setup.head is not None, "there is no head to train"
        self.model = HeadOnly(setup.head, setup.model)
        self.head = setup.head
        self.reference = None
        self.label_smoothing = 0.0
        self.autocast: Callable[[], Any] = contextlib.nullcontext

    def bind(self, wrapped: nn.Module | None = None) -> HeadOnlyPolicy:
        """A policy for one batch. `wrapped` is the head as the engine wrapped it (DDP), if it did."""
        return HeadOnlyPolicy(self.model if wrapped is None else wrapped, self.head)


class HeadOnlyPolicy:
    """Answers what can be answered without the model: what the head says about supervised tokens."""

    def __init__(self, model: nn.Module, head: nn.Module):
        self._model = model
        self._head = head

    def verdict_at_tokens(self, batch: Batch) -> Tensor:
        """The head's output at each supervised token itself, [E, width]."""
        assert batch.hidden is not None, "the batch brings no hidden states"
        return self._model(batch.hidden.to(next(self._head.parameters()).dtype))


@torch.no_grad()
def hidden_at_tokens(setup: PolicySetup, batch: Batch) -> Tensor:
    """The hidden states that the head reads at each supervised token, [E, H]."""
    return setup.bind().hidden_at_tokens(batch)
