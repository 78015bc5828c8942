"""Drafts from the text itself: what followed the last time the same few tokens stood there (Saxena 2023).

Costs nothing to draft. Pays where answers repeat their prompt: summaries, edits, code, questions about a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luthier.engines.target import Draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.engines.drafting import SpeculateConfig
    from luthier.engines.target import Target
    from luthier.model.source import ModelConfig


class PromptLookup:
    """Looks for the last `longest` tokens further up, then for fewer, down to `shortest`."""

    def __init__(self, longest: int, shortest: int = 1):
        self._longest = longest
        self._shortest = shortest

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """What followed the latest place that brings `count` tokens, or else the place that brings most."""
        ids = list(ids)
        for length in range(min(self._longest, len(ids) - 1), self._shortest - 1, -1):
            tail, found = ids[-length:], []
            for start in range(len(ids) - length - 1, -1, -1):
                if ids[start : start + length] == tail:
                    found = ids[start + length : start + length + count]
                    if len(found) == count:
                        break
            if found:
                return Draft(found)
        return Draft()

    def forget(self) -> None:
        """Nothing is remembered: all it knows is in the text."""


def build(
    keys: SpeculateConfig, target: Target, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> PromptLookup:
    """The drafter of a run."""
    return PromptLookup(keys.lookup_ngram, keys.lookup_min_ngram)
