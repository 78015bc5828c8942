"""The plain computation every layout must agree with: one sequence per forward pass, one loop per token."""

from __future__ import annotations

import torch
from torch import nn

from luthier.core.types import Encoded, Path


class DoubleNorm(nn.Module):
    """RMSNorm in the dtype of its input: transformers' own rounds to float32 inside, which hides 1e-9."""

    def __init__(self, norm: nn.Module, offset: float):
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = getattr(norm, "variance_epsilon", None) or norm.eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.offset)


def in_double(model: nn.Module) -> nn.Module:
    """The model with every RMSNorm computing in full precision."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0
            setattr(model.get_submodule(parent), child, DoubleNorm(module, offset))
    return model


def plain_nll(model, path: Path) -> list[tuple[float, torch.Tensor]]:
    """(weight, -log p) of every supervised token of one path, from a forward pass of its own."""
    logits = model(input_ids=torch.tensor([path.ids]), use_cache=False).logits[0].double()
    supervised = [i for i in range(1, len(path.ids)) if path.weights[i]]
    return [(path.weights[i], -logits[i - 1].log_softmax(-1)[path.ids[i]]) for i in supervised]


def plain_loss(model, items: list[Encoded]) -> torch.Tensor:
    """The weighted mean over all supervised tokens of all answers."""
    pieces = [piece for encoded in items for path in encoded.paths for piece in plain_nll(model, path)]
    return sum(w * nll for w, nll in pieces) / sum(w for w, _ in pieces)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients by parameter name."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
