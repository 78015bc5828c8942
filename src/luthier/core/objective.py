"""The contract of a training objective. A stage is one file in `objectives/` with one final subclass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from luthier.core.types import Column, Encoded, Example, Message, Reply

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.core.batch import Batch

Logs = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class NoKeys:
    """The configuration of a stage that has no keys of its own."""


class Renderer(Protocol):
    """A chat template bound to a tokenizer: messages to ids. Made once per run; immutable."""

    tokenizer: Any
    efficient_eos: bool
    """The assistant's turns carry no end token; the stage appends one at the very end (see `objectives/sft.py`)."""

    def pairs(
        self, messages: Sequence[Message], *, system: str = "", tools: str = "", mask_history: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """A whole conversation as (prompt ids, response ids) per exchange; concatenated they are the sequence.

        `mask_history` says that only the last response is trained, which some reasoning templates render
        differently. Raises TemplateError for orders of roles the template cannot render.
        """

    def branches(
        self, messages: Sequence[Message], *, system: str = "", tools: str = ""
    ) -> list[list[tuple[list[int], list[int]]]]:
        """A whole conversation as branches of (prompt ids, response ids); each response stands in one of them, in
        order, after exactly what the model is given when it is to say it.

        One branch where the template shows the past as it was. Where it rewrites it (thoughts vanish from history),
        the next response begins a branch of its own, whose first prompt holds all of the history.
        """

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> tuple[list[int], list[int]]:
        """(everything before the last message, the last message), as ids."""

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> list[int]:
        """What the model is given when it is to speak next: the ids training saw before a response."""

    def unserved(self, messages: Sequence[Message]) -> bool:
        """Whether `branches` shows a response after a history that `prompt` would write otherwise, so that no server
        sends what was trained."""

    def document(self, text: str) -> list[int]:
        """A pre-training document: its ids, with bos where the tokenizer adds one, and eos."""

    def reply(self, text: str, *, tools: str = "") -> Reply:
        """What a model answered, taken apart: thought, text, calls of tools. `tools`: the definitions it was given."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response."""


class Policy(Protocol):
    """The model as objectives see it: answers about a Batch, whatever its layout."""

    def logps(self, batch: Batch) -> Tensor:
        """log p(token | its path), float [E], one per supervised edge."""

    def nll(self, batch: Batch) -> Tensor:
        """What cross-entropy training minimises, float [E]: -logps, smoothed if `label_smoothing_factor` is set."""

    def hits(self, batch: Batch) -> Tensor:
        """Whether the most probable token is the supervised one, float 0/1 [E], without gradient."""

    def verdict(self, batch: Batch) -> Tensor:
        """What the objective's head says at each answer's last token, float32 [N, width]."""

    def verdict_at_tokens(self, batch: Batch) -> Tensor:
        """What the head says at each supervised token itself, float32 [E, width]."""

    def reference(self, batch: Batch) -> Tensor:
        """`logps` of the frozen reference model, without gradient, float [E]."""


class Objective(ABC):
    """What a stage thinks of the answers. Subclasses are final: they override these members and nothing more."""

    Config: ClassVar[type] = NoKeys
    """Dataclass of the YAML keys this stage owns."""
    encoding_keys: ClassVar[tuple[str, ...] | None] = None
    """Those of its keys that `encode` and `gather` read; None: any may be. Others change no cached data."""
    answers: ClassVar[tuple[int, int | None]] = (1, 1)
    """Fewest and most answers an example may bring."""
    head: ClassVar[str | None] = None
    """Name in `heads/` of what stands in lm_head's place, if anything."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Companions to load beside the policy: "reference", "reward"."""
    columns: ClassVar[tuple[Column, ...]] = ()
    """Per-token values beyond labels."""
    renders: ClassVar[bool] = True
    """Whether rows are messages, which a chat template turns into ids."""
    packs: ClassVar[bool] = False
    """Whether `packing` is on when the user does not say."""
    report: ClassVar[str] = ""
    """Name of the module in `evaluate/` whose `report(records, folder, objective)` measures what is recorded about
    held-out answers, if any."""
    announces: ClassVar[tuple[str, ...]] = ()
    """Lines for the log when the head is in place."""
    perplexity: ClassVar[bool] = False
    """Whether e^loss means something: the loss is the mean of -log p over tokens."""

    def __init__(self, config: Any = None):
        self.config = self.Config() if config is None else config

    @classmethod
    def claims(cls, keys: Mapping[str, Any], stage: str) -> bool:
        """Whether these keys mean this objective although `stage` names another."""
        return False

    @property
    def trains_backbone(self) -> bool:
        """Whether more than the head is trained."""
        return True

    def facts(self, tokenizer: Any) -> Mapping[str, Any]:
        """What the json beside a saved head says of this stage, so that others can use the head as it was trained."""
        return {}

    surveys: ClassVar[bool] = False
    """Whether `survey` must run over all micro-batches before the first loss of a step."""

    def start(self, renderer: Renderer) -> None:
        """Check, before any row is encoded, that the keys and the template go together; raises ConfigError."""
        return None

    @abstractmethod
    def encode(self, example: Example, renderer: Renderer, *, cutoff_len: int) -> Sequence[Encoded]:
        """Ids and weights of one example; several Encoded if it must be cut, none if nothing is left to train."""

    def unserved(self, example: Example, renderer: Renderer) -> bool:
        """Whether this example is trained after a history that no server sends; most stages ask as servers do."""
        return False

    def gather(self, rows: Sequence[Encoded]) -> Sequence[Encoded]:
        """Examples made of the encoded rows of one group, for formats whose rows belong together (`data/groups.py`).

        Rows without paths bring nothing to train. As they are, unless the stage merges them.
        """
        return [row for row in rows if row.paths]

    def complete(self, index: int, examples: Sequence[tuple[Encoded, str]]) -> tuple[Encoded, str]:
        """An example as it is trained, given the whole set it belongs to; most stages take it as it is."""
        return examples[index]

    def survey(self, policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over this micro-batch (its `aside` paths, usually) that the loss of every micro-batch needs.

        Called without gradient; summed over micro-batches and ranks they are in `batch.totals` under their names.
        """
        return {}

    def record(self, policy: Policy, batch: Batch) -> Mapping[str, Tensor]:
        """What `do_predict` writes about each answer, by name, each [N]. Called without gradient."""
        return {}

    def rows(self, policy: Policy, batch: Batch) -> list[list[dict[str, Any]]]:
        """What predictions say about each example: a list of one dict per answer, as JSON can hold them."""
        columns = {name: values.tolist() for name, values in self.record(policy, batch).items()}
        found: list[list[dict[str, Any]]] = [[] for _ in batch.names]
        for answer, (group, score) in enumerate(zip(batch.group.tolist(), batch.score.tolist())):
            found[group].append({"score": score} | {name: values[answer] for name, values in columns.items()})
        return found

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> tuple[Tensor, Logs]:
        """The loss and what to log, both through `batch.mean`. Never divides."""
