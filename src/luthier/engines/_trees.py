"""Prompts with answers, laid out as the trees training uses, for everything that asks a model about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from luthier.core.batch import Batch
from luthier.core.errors import ModelError
from luthier.core.log import get_logger
from luthier.core.types import Encoded
from luthier.data.layout import collate
from luthier.model.policy import PolicySetup
from luthier.model.verify import Verdict, verify

log = get_logger("engines")


class Trees:
    """Micro-batches of encoded examples on the model's device.

    layout: as in training; `auto` shares beginnings. The first batch, and whatever is longer than all before, is held
    against one plain forward pass per answer, and a model that does not honour the mask gets padded rows, as it would
    in training.
    """

    def __init__(self, setup: PolicySetup, *, pad_id: int, layout: str = "auto"):
        self.setup = setup
        self._pad_id = pad_id
        self._layout = "shared" if layout == "auto" else layout
        self._checked = 0
        """Tokens of the longest answer that was checked, with its prompt."""

    def batches(self, items: Sequence[Encoded], size: int) -> Iterator[Batch]:
        """The items in order, `size` examples a batch."""
        furthest = max(items, key=_length, default=None)
        if furthest is not None and not self._checked:
            self._check(items[:size])
        if furthest is not None and _length(furthest) > self._checked and self._layout != "padded":
            # Short ones may not leave a window that a model counts in its own way (GPT-Neo).
            self._check([furthest])
        self._checked = max(self._checked, *map(_length, items), 1)
        for start in range(0, len(items), size):
            yield self._lay_out(items[start : start + size], self._layout)

    def _lay_out(self, items: Sequence[Encoded], layout: str) -> Batch:
        named = [(item, f"example {nth}") for nth, item in enumerate(items, 1)]
        device = next(self.setup.model.parameters()).device
        return collate(named, layout=layout, pad_id=self._pad_id).to(device)

    def _check(self, items: Sequence[Encoded]) -> None:
        found = self._verdict(items, self._layout)
        if not found.holds:
            model = type(self.setup.model).__name__
            log.warning("%s does not honour the attention mask of %s rows (%s).", model, self._layout, found)
            self._layout = "padded"
            found = self._verdict(items, "padded")
            if not found.holds:
                raise ModelError(f"{model} gives other log-probs through Luthier's rows than by itself: {found}.")

    def _verdict(self, items: Sequence[Encoded], layout: str) -> Verdict:
        try:
            with torch.no_grad():
                return verify(self.setup, self._lay_out(items, layout))
        except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            # A model that cannot even take the mask fails the check, with its reason.
            if layout == "padded":
                raise
            return Verdict(float("inf"), 0.0, 0, f"{type(error).__name__}: {error}")


def _length(item: Encoded) -> int:
    return max((len(path.ids) for path in item.paths), default=0)
