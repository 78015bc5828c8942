"""The frozen reference: what the policy was before this training, asked without gradient and without dropout."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor, nn

from luthier.core.batch import Batch
from luthier.model.policy import PolicySetup


class Reference(Protocol):
    """Answers with log-probs of the supervised tokens."""

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""


class AdapterOff:
    """The policy's own model with its adapter switched off: no second copy in memory."""

    def __init__(self, setup: PolicySetup):
        self.setup = setup

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""
        with torch.no_grad(), _evaluating(self.setup.model), self.setup.model.disable_adapter():
            return self.setup.bind().logps(batch)


class FrozenModel:
    """A model of its own: `ref_model`, or a copy of the policy made before the first step."""

    def __init__(self, model: nn.Module, setup: PolicySetup):
        self.own = PolicySetup(model.requires_grad_(False).eval(), backend=setup.backend)
        self.policy = setup

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""
        self.own.autocast = self.policy.autocast
        with torch.no_grad():
            return self.own.bind().logps(batch)


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
