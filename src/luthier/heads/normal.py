"""A normal distribution for each position: the mean and the variance of an answer's reward, read at its last token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.errors import ModelError

ADOPTS: tuple[str, ...] = ("value",)
"""Other kinds of head whose weights this one can start from: a value head is the mean."""

FLOOR = 1e-4
"""Least variance of a head that is built without keys."""


class NormalKeys(Protocol):
    """The keys of an objective that this head is built from."""

    @property
    def disco_dropout(self) -> float:
        """Share of the hidden states dropped in front of the variance."""

    @property
    def disco_floor(self) -> float:
        """Least variance."""


class NormalHead(nn.Module):
    """Linear and Linear-softplus, [H] -> [2]: (mean, variance). The mean's tensors are named as a value head's."""

    width = 2
    floor: Tensor
    """The least variance. It is stored with the weights, so that whoever loads them gets the same variances."""

    def __init__(self, hidden_size: int, keys: NormalKeys | None = None):
        super().__init__()
        floor = FLOOR if keys is None else keys.disco_floor
        self._wanted = None if keys is None else floor
        self.summary = nn.Linear(hidden_size, 1)
        self.dropout = nn.Dropout(0.0 if keys is None else keys.disco_dropout)
        self.variance = nn.Linear(hidden_size, 1)
        self.register_buffer("floor", torch.tensor(floor))
        # As a value head starts: means near 0 whatever the size of the hidden states. All variances start at 1.
        nn.init.normal_(self.summary.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(self.summary.bias)
        nn.init.zeros_(self.variance.weight)
        nn.init.constant_(self.variance.bias, math.log(math.expm1(1 - floor)))
        self.register_load_state_dict_pre_hook(_same_floor)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [X, H] float -> [X, 2]: means and variances, the latter above the floor."""
        variance = self.floor + F.softplus(self.variance(self.dropout(hidden)))
        return torch.cat([self.summary(hidden), variance], dim=-1)


def _same_floor(head: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    stored = state.get(f"{prefix}floor")
    assert isinstance(head, NormalHead)
    if stored is not None and head._wanted is not None and not math.isclose(stored, head._wanted, rel_tol=1e-5):
        raise ModelError(
            f"This normal head was trained with a least variance of {float(stored):g}, and disco_floor is "
            f"{head._wanted:g}, which would change what it says. Set disco_floor: {float(stored):g}."
        )


def build(hidden_size: int, keys: Any) -> nn.Module:
    """A fresh head. keys: see `NormalKeys`; None for one that is filled from a folder."""
    return NormalHead(hidden_size, keys)
