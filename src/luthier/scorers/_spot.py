"""What every scorer is given about a mismatch, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.engines.hf import Engine
    from luthier.engines.rounds import Mismatch, Round
    from luthier.engines.sampling import GenerateConfig

UNSCORED = float("nan")
"""The score of a mismatch that a scorer has no opinion on; it is left out of the data and counted."""


@dataclass(frozen=True)
class Request:
    """A prompt with the target's own answer to it."""

    row: int
    """Place in the input, counted from 0."""
    question: str
    """What the user asked, as text."""
    prompt_ids: list[int]
    answer_ids: list[int]
    """With the stop token, where the answer has one."""
    reference: str | None
    """The answer that the row brings, if it does."""


@dataclass(frozen=True)
class Spot:
    """One draft token that is not the target's own choice."""

    request: Request
    round: Round
    mismatch: Mismatch

    @property
    def before(self) -> list[int]:
        """Answer tokens before the draft token: what was committed, and the draft so far."""
        return [*self.request.answer_ids[: self.round.cut], *self.round.draft[: self.mismatch.index]]

    @property
    def token(self) -> int:
        """The draft token itself."""
        return self.round.draft[self.mismatch.index]


@dataclass(frozen=True)
class Tools:
    """What a scorer may use."""

    engine: Engine
    """The target."""
    sampling: GenerateConfig
    stop_ids: tuple[int, ...]
    seed: int
    folder: Path
    """Where it may keep what it learnt for the next call."""

    def text(self, ids: Sequence[int]) -> str:
        """Answer tokens as text, a stop token at the end left out."""
        ended = bool(ids) and ids[-1] in self.stop_ids
        return self.engine.tokenizer.decode(
            list(ids[: len(ids) - ended]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class Scorer(ABC):
    """How good it would be to keep a draft token that the target would not have said.

    A file of `scorers/` defines one, and the `Config` with the keys it owns.
    """

    def __init__(self, config: Any, tools: Tools):
        self.config = config
        self.tools = tools

    @abstractmethod
    def score(self, spots: Sequence[Spot]) -> list[float]:
        """For each mismatch of one request a score from 0 (must not be kept) to 1 (as good), or `UNSCORED`."""


def scorer_in(module: ModuleType) -> type[Scorer]:
    """The one Scorer that a file of `scorers/` defines. Raises ConfigError if it does not define one."""
    found = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    found = [item for item in found if issubclass(item, Scorer)]
    if len(found) != 1:
        raise ConfigError(f"{module.__file__} must define exactly one Scorer, and defines {len(found)}.")
    return found[0]
