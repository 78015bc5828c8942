"""Who drafts, how much, and who judges: the keys of speculative decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError
from luthier.core.registry import find, miss, names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.engines.target import Drafter, Target
    from luthier.model.source import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SpeculateConfig:
    """Keys of `speculate`, `collect`, and of `chat` where a draft is wanted."""

    draft: str | None = None
    """Who proposes tokens that the model only has to verify: the name of a file in drafters/, such as prompt_lookup
    (repeats of the text so far), draft_model (a small model) or early_exit (the model's own first layers)."""
    draft_model: str | None = None
    """draft: draft_model. Folder or hub id of the small model; its tokenizer must be the model's."""
    draft_layers: int | None = None
    """draft: early_exit. How many of the model's first layers draft."""
    draft_tokens: int = 5
    """Most tokens drafted before the model verifies them."""
    lookup_ngram: int = 3
    """draft: prompt_lookup. Most last tokens that are looked for in the text before them; fewer if not found."""
    lookup_min_ngram: int = 1
    """draft: prompt_lookup. Fewest last tokens that are looked for."""
    accept_head: str | None = None
    """Folder with an accept head (stage accept_head), which may keep draft tokens that the model would not have
    chosen. Unset: beside the adapter, in the model's folder or in `output_dir`; without any nothing is lost or gained
    but time."""
    accept_threshold: float | None = None
    """A draft token is kept if the accept head gives it at least this probability; above 1 keeps only what the model
    itself would say. Unset: the head's own."""

    def __post_init__(self) -> None:
        if self.draft is not None and self.draft not in names("drafters"):
            raise ConfigError(f"draft: {miss('drafter', self.draft, names('drafters'))}")
        for holds, what in (
            (self.draft_tokens >= 1, f"draft_tokens: {self.draft_tokens} must be 1 or more"),
            (self.draft_layers is None or self.draft_layers >= 1, f"draft_layers: {self.draft_layers} must be 1 or"
             " more"),
            (1 <= self.lookup_min_ngram <= self.lookup_ngram, f"lookup_ngram: {self.lookup_ngram} must be at least"
             f" lookup_min_ngram ({self.lookup_min_ngram}), and that at least 1"),
            (self.draft != "draft_model" or self.draft_model, "draft: draft_model needs draft_model: the folder of a"
             " small model with the same tokenizer"),
            (self.draft != "early_exit" or self.draft_layers, "draft: early_exit needs draft_layers: how many of the"
             " model's first layers draft"),
        ):  # fmt: skip
            if not holds:
                raise ConfigError(what + ".")

    def idle(self, verb: str) -> Iterator[str]:
        """Keys that are set and change nothing for a verb that makes the model speak."""
        if verb == "infer" and self.draft is not None:
            yield "draft has no effect on infer; `luthier speculate` answers with drafts."
        for key, drafter in (("draft_model", "draft_model"), ("draft_layers", "early_exit")):
            if vars(self)[key] is not None and self.draft not in (None, drafter):
                yield f"{key} has no effect: it is for draft: {drafter}, and draft is {self.draft}."


def make_drafter(
    keys: SpeculateConfig, target: Target, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> Drafter:
    """The drafter `draft` names. Raises ConfigError if it names none, ModelError where it does not fit the target.

    model_config: where the target came from; a model of the drafter's own is loaded in the same way.
    """
    if keys.draft is None:
        raise ConfigError(f"draft is not set. Say who drafts: {', '.join(names('drafters'))}.")
    return find("drafters", keys.draft).build(keys, target, tokenizer, model_config)
