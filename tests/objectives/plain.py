"""TRL's own loss code, fed with log-probs from plain forward passes: one answer at a time, nothing shared or padded."""

from __future__ import annotations

import os
from collections import defaultdict
from types import SimpleNamespace

import torch

from luthier.core.types import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

__all__ = ["Alone", "CPOTrainer", "DPOTrainer", "KTOTrainer", "ORPOTrainer", "padded", "token_logps", "trl_loss"]


def token_logps(model, path: Path) -> torch.Tensor:
    """log p of every supervised token of one path, from a forward pass of its own."""
    logits = model(input_ids=torch.tensor([path.ids]), use_cache=False).logits[0].double()
    return torch.stack([logits[i - 1].log_softmax(-1)[path.ids[i]] for i in range(1, len(path.ids)) if path.weights[i]])


def padded(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Paths as TRL's collators lay them out."""
    width = max(len(path.ids) for path in paths)
    rows = [path.ids + [3] * (width - len(path.ids)) for path in paths]
    masks = [[int(w > 0) for w in path.weights] + [0] * (width - len(path.ids)) for path in paths]
    shown = [[1] * len(path.ids) + [0] * (width - len(path.ids)) for path in paths]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(shown),
        "completion_mask": torch.tensor(masks),
    }


class Fused(torch.nn.Module):
    """What TRL 1.16 asks a model with `fused_lm_head=True`: log-probs by token, zero where the label is -100."""

    is_gradient_checkpointing = False

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, **_):
        rows = []
        for ids, shown, label in zip(input_ids, attention_mask, labels):
            path = Path(ids[: shown.sum()].tolist(), [float(x != -100) for x in label[: shown.sum()]])
            at = [i - 1 for i in range(1, len(path.ids)) if path.weights[i]]
            row = torch.zeros(len(ids) - 1, dtype=torch.float64)
            rows.append(row.index_put((torch.tensor(at),), token_logps(self.model, path)))
        nothing = torch.zeros(len(rows), input_ids.shape[1] - 1)
        return SimpleNamespace(
            log_probs=torch.stack(rows), entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )


class Alone:
    """accelerate with one process."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


def trl_loss(trainer, model, reference, inputs, **settings) -> tuple[torch.Tensor, dict[str, float]]:
    """(loss, metrics) of the method `_compute_loss` of a TRL trainer class, on one batch."""
    self = SimpleNamespace(
        accelerator=Alone(),
        model=Fused(model),
        ref_model=Fused(reference),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        use_weighting=False,
        precompute_ref_logps=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    if "calculate_KL" in settings:
        self._compute_kl_logps = lambda asked, batch: trainer._compute_kl_logps(self, asked, batch)
    loss = trainer._compute_loss(self, self.model, inputs, False)
    metrics = {name: values[-1] for name, values in self._metrics["train"].items() if isinstance(values, list)}
    return loss, metrics
