"""The training loop, to be read. The Trainer does the same with engines, checkpoints and logs around it; tests hold
the two equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from luthier.core.batch import Batch, total_units
from luthier.core.objective import Objective, Policy
from luthier.model.policy import PolicySetup


@torch.no_grad()
def survey(policy: Callable[[], Policy], objective: Objective, batches: Iterable[Batch]) -> dict[str, float]:
    """What the objective wants summed over a whole step before its first loss."""
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in objective.survey(policy(), batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def train(
    setup: PolicySetup,
    objective: Objective,
    steps: Iterable[Sequence[Batch]],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    max_grad_norm: float = 0.0,
) -> list[float]:
    """Take one optimiser step per sequence of micro-batches; returns the loss of each step.

    The units of the whole step are counted before the first backward pass, so that every micro-batch contributes its
    share of one exact mean, however the step is cut.
    """
    losses = []
    setup.model.train()
    steps = list(steps)
    for number, micro_batches in enumerate(steps):
        totals = total_units(micro_batches)
        if objective.surveys:
            totals |= survey(setup.bind, objective, micro_batches)
        step_loss = 0.0
        for batch in micro_batches:
            policy, batch = setup.bind(), batch.with_totals(totals, number / len(steps))
            loss, _ = objective.loss(policy, batch)
            router = policy.router_loss(batch)
            if router is not None:
                loss = loss + router
            loss.backward()
            step_loss += loss.item()
        if max_grad_norm:
            torch.nn.utils.clip_grad_norm_(setup.model.parameters(), max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses
