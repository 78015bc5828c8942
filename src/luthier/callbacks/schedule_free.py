"""Schedule-free optimisers train one set of weights and mean another: what is evaluated and saved is the one they mean.

The optimiser (Defazio et al. 2024, arXiv 2405.15682) changes between the two; transformers' own evaluation tells it to,
which Luthier's replaces, and nothing does when a run is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from luthier.run import Run


def wanted(run: Run) -> TrainerCallback | None:
    """With `optim: schedule_free_...`."""
    return Average() if str(run.training.get("optim", "")).startswith("schedule_free_") else None


class Average(TrainerCallback):
    """Puts the averaged weights into the model where it is looked at; the next training step takes them out again."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Before an evaluation or a checkpoint."""
        if control.should_evaluate or control.should_save:
            optimizer.eval()

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Before those of an epoch's end."""
        self.on_step_end(args, state, control, optimizer=optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Before the trained model is saved."""
        optimizer.eval()
