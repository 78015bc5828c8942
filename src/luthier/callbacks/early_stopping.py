"""Stops when the watched metric has not become better for `early_stopping_steps` evaluations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback, TrainerCallback

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.run import Run


def wanted(run: Run) -> TrainerCallback | None:
    """Where `early_stopping_steps` is set. Raises ConfigError where there is nothing to watch."""
    patience = run.train.early_stopping_steps
    if patience is None:
        return None
    if run.training.get("eval_strategy", "no") == "no":
        raise ConfigError(
            f"early_stopping_steps: {patience} counts evaluations, but eval_strategy is no. "
            "Add eval_strategy: steps (and eval_steps) or epoch, with an eval_dataset or val_size."
        )
    if run.training.get("metric_for_best_model") is None and not run.training.get("load_best_model_at_end"):
        raise ConfigError(
            f"early_stopping_steps: {patience} needs to know which metric to watch. "
            "Add metric_for_best_model: eval_loss (or another metric that evaluation logs)."
        )
    return EarlyStoppingCallback(early_stopping_patience=patience)
