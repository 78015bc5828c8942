"""A scalar for each position: the reward of an answer, read at its last token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ADOPTS: tuple[str, ...] = ()
"""Other kinds of head whose weights this one can start from."""


class ValueHead(nn.Module):
    """Linear [H] -> [1]; the tensors are named as TRL and LLaMA-Factory name them."""

    width = 1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        # A reward starts near 0 whatever the size of the hidden states, so that the first losses are ln 2.
        nn.init.normal_(self.summary.weight, std=1 / (hidden_size + 1))
        nn.init.zeros_(self.summary.bias)
        # Comparisons cannot see a constant: its gradient is rounding noise, which AdamW would blow up into drift.
        self.summary.bias.requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [X, H] float -> [X, 1]."""
        return self.summary(hidden)


def build(hidden_size: int, keys: Any) -> nn.Module:
    """A fresh head."""
    return ValueHead(hidden_size)
