"""What stands for a chat template where a stage renders no messages: the tokenizer alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bare:
    """A renderer of nothing, for stages whose rows are token ids or plain texts already."""

    tokenizer: Any

    def fingerprint(self) -> str:
        """Nothing beside the tokenizer decides ids."""
        return "bare"
