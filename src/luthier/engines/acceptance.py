"""The accept head at work: which draft tokens that the target would not have chosen are good enough to keep.

layout   the head reads                                                          costs
judge    the hidden state at the draft token: context, draft                     nothing where the target itself was
                                                                                 judged by (frozen backbone)
sep      the same after a separator: context [sep] draft                         a pass over the draft
hybrid   context [sep] draft [sep] verifier, what follows the context sees       a pass over both
         itself both ways
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.engines.target import Cached, Pass


@dataclass(frozen=True)
class Facts:
    """What the json beside an accept head says of how it was trained."""

    layout: str
    sep_id: int | None
    threshold: float
    frozen: bool
    """The hidden states are the target's own; else the model that has them was trained with the head."""

    @classmethod
    def read(cls, facts: Mapping[str, Any], where: str) -> Facts:
        """Raises ModelError for facts of another head, or of none that can be used."""
        layout, sep = facts.get("layout"), facts.get("sep_id")
        if facts.get("head") != "accept" or layout not in LAYOUTS:
            raise ModelError(
                f"{where} does not say how its head was trained (head {facts.get('head')!r}, layout {layout!r}); "
                f"expected an accept head with one of the layouts {', '.join(LAYOUTS)}, as stage accept_head saves it."
            )
        if layout != "judge" and not isinstance(sep, int):
            raise ModelError(f"{where} names no separator (sep_id: {sep!r}), and layout {layout} needs one.")
        return cls(layout, sep, float(facts.get("threshold", 0.5)), bool(facts.get("frozen", False)))


class AcceptJudge:
    """An accept head, with the model whose hidden states it reads.

    scorer: None for the states of the target's own pass, which only the judge layout can read. context: most tokens
    that the scorer takes; where a draft does not fit, nothing but the target's own word counts.
    """

    def __init__(
        self, head: nn.Module, facts: Facts, *, threshold: float, scorer: Cached | None, context: int | None = None
    ):
        if scorer is None and facts.layout != "judge":
            raise ValueError(f"layout {facts.layout} reads other states than those of the target's pass")
        self.threshold = threshold
        self.scorer = scorer
        self._head = head
        self._facts = facts
        self._context = context

    @torch.no_grad()
    def probabilities(
        self, context: Sequence[int], draft: Sequence[int], verifier: Sequence[int], seen: Pass
    ) -> list[float]:
        """How good each draft token is, for those up to the last that is not the verifier's.

        context: committed ids. verifier: what the target says in place of each, and the bonus. seen: its pass.
        """
        wrong = [i for i, (mine, theirs) in enumerate(zip(draft, verifier)) if mine != theirs]
        if not wrong:
            return []
        needed = wrong[-1] + 1
        if self.scorer is None:
            return self._judge(seen.hidden[:needed])
        suffix, first = LAYOUTS[self._facts.layout](self._facts.sep_id, draft, verifier, needed)
        if self._context is not None and len(context) + len(suffix) > self._context:
            return []
        block = len(context) if self._facts.layout == "hybrid" else None
        found = self.scorer.run([*context, *suffix], len(suffix) - first, block=block)
        return self._judge(found.hidden[:needed])

    def forget(self) -> None:
        """Empty the scorer's cache."""
        if self.scorer is not None:
            self.scorer.forget()

    def _judge(self, hidden: Tensor) -> list[float]:
        dtype = next(self._head.parameters()).dtype
        return torch.sigmoid(self._head(hidden.to(dtype))[:, 0]).tolist()


def _judge(sep: int | None, draft: Sequence[int], verifier: Sequence[int], needed: int) -> tuple[list[Any], int]:
    return list(draft[:needed]), 0


def _sep(sep: int | None, draft: Sequence[int], verifier: Sequence[int], needed: int) -> tuple[list[Any], int]:
    # Under a causal mask nothing that comes after the last mismatch can change a judgement.
    return [sep, *draft[:needed]], 1


def _hybrid(sep: int | None, draft: Sequence[int], verifier: Sequence[int], needed: int) -> tuple[list[Any], int]:
    return [sep, *draft, sep, *verifier], 1


LAYOUTS: dict[str, Callable[..., tuple[list[Any], int]]] = {"judge": _judge, "sep": _sep, "hybrid": _hybrid}
"""What follows the context, and where in it the draft begins; from (separator, draft, verifier, tokens needed)."""
