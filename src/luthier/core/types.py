"""The nouns every part of Luthier speaks in, from a dataset row to token ids. No torch here.

row (a dict)  --format-->  Example  --objective.encode-->  Encoded  --layout-->  Batch (core/batch.py)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NAN = float("nan")

ROLES = ("system", "user", "assistant", "function", "observation")
"""`function` is an assistant turn that calls tools (content: JSON), `observation` is what the tools answered."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str
    weight: float | None = None
    """Loss weight of this turn; None leaves it to the stage."""
    media: tuple[str, ...] = ()
    """The images it shows, one for each `<image>` in its content: see `data/media.py`."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: Any
    """What the JSON of the arguments says, as a rule a dict."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a model said, taken apart."""

    thought: str
    """Without the words that open and close it; empty if there is none."""
    content: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One thing the model could say after the prompt, with what is thought of it."""

    messages: tuple[Message, ...]
    score: float = NAN
    """Higher is better; NaN where nobody scored it."""
    name: str = "response"
    """What previews call it: response, chosen, rejected, candidate-0 ..."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with K answers: 0 for PPO, 1 for pre-training and SFT, 2 for pairs, n for rankings."""

    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...]
    system: str = ""
    tools: str = ""
    """Tool definitions as JSON text, empty if there are none."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns that only the stage understands."""


@dataclass(frozen=True, slots=True)
class Path:
    """One root-to-leaf token sequence: the prompt and one answer, tokenised as if nothing were shared.

    `ids[i]` is supervised with weight `weights[i]` (0: not trained). It is predicted from `ids[i - 1]`, so
    `weights[0]` never counts. All lists have one entry per token.
    """

    ids: list[int]
    weights: list[float]
    name: str = "response"
    score: float = NAN
    columns: Mapping[str, list[float]] = field(default_factory=dict)
    """Per-token values an objective declared beyond labels; NaN where there is nothing."""
    block: int | None = None
    """From this token on all tokens of the path see one another, also those after them, and are no other path's;
    None: every token sees what comes before it."""

    def column(self, name: str) -> Sequence[float]:
        """A declared column, one value per token; NaN everywhere where the path does not bring it."""
        return self.columns.get(name, [NAN] * len(self.ids))


ASIDE = "aside:"
"""Paths whose name begins so are not answers: an objective surveys them, without gradient, before a step."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """What `Objective.encode` makes of one Example. Paths that begin alike share their beginning in a Batch."""

    paths: tuple[Path, ...]
    truncated: int = 0
    """Tokens cut away to fit `cutoff_len`, over all paths."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the objective wants to know about the example beside its paths, as JSON can hold it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A per-token value beyond labels, declared so that nobody casts it: its name and numpy dtype."""

    name: str
    dtype: str = "float32"
