"""Full fine-tuning: every weight of the model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IS_ADAPTER = False
"""What is trained are the model's own weights, saved as a whole model."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Full fine-tuning has no keys of its own."""


def apply(model: PreTrainedModel, config: Config, *, also: tuple[str, ...], seed: int) -> PreTrainedModel:
    """Free every weight. `also` and `seed` change nothing here: everything is trained and nothing is new."""
    return model.requires_grad_(True)
