"""Tokenising the pieces of a conversation, each on its own, with a memory for those that recur."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class Pieces:
    """Text to ids without special tokens of the tokenizer's own. Constant texts are remembered for good, the texts
    of `warm` until the next `warm`."""

    def __init__(self, tokenizer: Any, constants: Iterable[str] = ()):
        self.tokenizer = tokenizer
        self._constants = {text: self._encode([text])[0] for text in constants if text}
        self._batch: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """The ids of one piece; not to be changed by the caller."""
        if not text:
            return []
        known = self._constants.get(text)
        if known is None:
            known = self._batch.get(text)
        return known if known is not None else self._encode([text])[0]

    def join(self, elements: Iterable[str | int]) -> list[int]:
        """Pieces of text and ids, in order, as ids."""
        ids: list[int] = []
        for element in elements:
            if isinstance(element, str):
                ids += self(element)
            else:
                ids.append(element)
        return ids

    def warm(self, texts: Iterable[str]) -> None:
        """Tokenise these in one call, to be asked for one by one afterwards."""
        fresh = [text for text in dict.fromkeys(texts) if text and text not in self._constants]
        self._batch = dict(zip(fresh, self._encode(fresh))) if fresh else {}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
