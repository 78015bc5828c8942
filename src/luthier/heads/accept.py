"""Whether a draft token that the target would not have chosen is good enough to keep: one logit for each position.

LayerNorm(H) -> Linear(H, H / 4) -> GELU -> Linear(H / 4, 1), as the AcceptHead fork of LLaMA-Factory builds it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

ADOPTS: tuple[str, ...] = ()
"""Other kinds of head whose weights this one can start from."""


class AcceptHead(nn.Module):
    """The sigmoid of its output is how good the token is, 0 to 1."""

    width = 1

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layer_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, hidden_size // 4)
        self.activation = nn.GELU()
        self.fc2 = nn.Linear(hidden_size // 4, 1)
        nn.init.kaiming_uniform_(self.fc1.weight, nonlinearity="relu")
        # A small start keeps first judgements near 1/2, whatever the size of the hidden states.
        nn.init.xavier_uniform_(self.fc2.weight, gain=0.1)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [X, H] float -> logits [X, 1]."""
        return self.fc2(self.activation(self.fc1(self.layer_norm(hidden))))


def build(hidden_size: int, keys: Any) -> nn.Module:
    """A fresh head."""
    return AcceptHead(hidden_size)
