"""What a run counts between two lines of its log: the objective's measures, tokens, steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Sum = Callable[[Mapping[str, float]], dict[str, float]]
"""Adds numbers up over all ranks."""


class Meter:
    """Sums over the steps since the last line. A step that is dropped leaves them as they were before it."""

    def __init__(self, *, effective: bool = False):
        self.effective = effective
        """Whether supervised tokens per second are measured too."""
        self.tokens, self.trained = 0, 0.0
        """Tokens computed and supervised since the run began, over all ranks."""
        self.dropped = 0
        """Steps since the last line that did not count."""
        self._steps = 0
        self._sums: dict[str, float | Tensor] = {}
        self._before = self._sums
        self._since = (time.perf_counter(), 0, 0.0)

    def begin(self, tokens: int, trained: float) -> None:
        """A step over so many tokens begins."""
        self.tokens += tokens
        self.trained += trained
        self._steps += 1
        self._before = dict(self._sums)

    def add(self, logs: Mapping[str, Tensor]) -> None:
        """One micro-batch's share of the step's measures."""
        for name, value in logs.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double()

    def again(self) -> None:
        """The step begins anew."""
        self._sums = dict(self._before)

    def drop(self) -> None:
        """The step does not count."""
        self.again()
        self.dropped += 1

    def of_loss(self, loss: float) -> float:
        """A mean over the steps since the last line, as it is over those that count; NaN if none does."""
        counted = self._steps - self.dropped
        return loss if not self.dropped else loss * self._steps / counted if counted else float("nan")

    def take(self, over_ranks: Sum) -> dict[str, float]:
        """Means per step and throughput since the last line."""
        counted = max(self._steps - self.dropped, 1)
        sums = over_ranks({name: float(value) for name, value in self._sums.items()}) if self._sums else {}
        logs = {name: value / counted for name, value in sums.items()} | self._throughput()
        if self.dropped:
            logs["skipped_steps"] = self.dropped
        self._sums, self._before, self._steps, self.dropped = {}, {}, 0, 0
        return logs

    def _throughput(self) -> dict[str, float]:
        then, tokens, trained = self._since
        self._since = (time.perf_counter(), self.tokens, self.trained)
        seconds = max(self._since[0] - then, 1e-9)
        logs = {"tokens": self.tokens, "tokens_per_second": (self.tokens - tokens) / seconds}
        if self.effective:
            logs["effective_tokens_per_second"] = (self.trained - trained) / seconds
        return logs

    def state(self) -> dict[str, Any]:
        """What a resumed run must know."""
        sums = {name: float(value) for name, value in self._sums.items()}
        return {
            "tokens": self.tokens,
            "trained": self.trained,
            "steps": self._steps,
            "dropped": self.dropped,
            "sums": sums,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.tokens, self.trained = state["tokens"], state["trained"]
        self._steps, self.dropped, self._sums = state["steps"], state["dropped"], dict(state["sums"])
        self._since = (time.perf_counter(), self.tokens, self.trained)
