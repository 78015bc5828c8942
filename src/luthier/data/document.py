"""For tokenizers without a usable chat template: documents are rendered, conversations refused when they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from luthier.core.errors import ConfigError
from luthier.core.types import Example, Message
from luthier.data.pieces import Pieces
from luthier.data.vocabulary import document_head, settle


class DocumentRenderer:
    """Pre-training of a base model needs no chat template. See `core/objective.py:Renderer`.

    Every method for conversations raises ConfigError with `problem`, which says what is wrong with the tokenizer's
    own chat template."""

    name = "documents"
    efficient_eos = False

    def __init__(self, tokenizer: Any, problem: str):
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer has no eos_token to end a document with; and {problem}")
        self.tokenizer = tokenizer
        self.problem = problem
        self._pieces = Pieces(tokenizer)
        settle(tokenizer, eos=None, special=())
        self._head = document_head(tokenizer)

    def pairs(
        self, messages: Sequence[Message], *, system: str = "", tools: str = "", mask_history: bool = False
    ) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def branches(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def reply(self, text: str, *, tools: str = "") -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def texts(self, example: Example) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(self.problem)

    def unserved(self, messages: Sequence[Message]) -> bool:
        """See Renderer."""
        return False

    def document(self, text: str) -> list[int]:
        """See Renderer."""
        return [*self._head, *self._pieces(text), self.tokenizer.eos_token_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See Renderer."""
        return (self.tokenizer.eos_token_id,)

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files that decides ids."""
        return repr((self.name, self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token))

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these documents in one call; what was warm before is forgotten."""
        self._pieces.warm(texts)
