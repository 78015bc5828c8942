"""How text is generated: LLaMA-Factory's generating arguments. The model folder's own defaults play no part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import refuse_all

if TYPE_CHECKING:
    from transformers import GenerationConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Keys of `chat`, `infer` and of every other place where the model speaks."""

    do_sample: bool = True
    """Draw tokens at random (true) or take the most probable one each time (false)."""
    temperature: float = 0.95
    """Logits are divided by this before drawing: below 1 is more careful, above 1 more adventurous."""
    top_p: float = 0.7
    """Draw from the smallest set of most probable tokens whose probabilities add up to this; 1 for all."""
    top_k: int = 50
    """Draw from this many most probable tokens at most; 0 for all."""
    num_beams: int = 1
    """Beams of beam search; 1 for none."""
    max_length: int = 1024
    """Most tokens of prompt and answer together; only looked at where `max_new_tokens` is 0."""
    max_new_tokens: int = 1024
    """Most tokens of an answer; 0 leaves the limit to `max_length`."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less probable; 1 for no penalty."""
    length_penalty: float = 1.0
    """Beam search: above 0 favours longer answers, below 0 shorter ones."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text of answers."""
    infer_batch_size: int = 8
    """Prompts answered side by side by `infer`."""

    def __post_init__(self) -> None:
        rules = (
            (not self.do_sample or self.temperature > 0, f"temperature: {self.temperature} must be above 0; to always"
             " take the most probable token set do_sample: false"),
            (0 < self.top_p <= 1, f"top_p: {self.top_p} must be above 0 and at most 1"),
            (self.top_k >= 0, f"top_k: {self.top_k} must be 0 (no limit) or more"),
            (self.num_beams >= 1, f"num_beams: {self.num_beams} must be 1 or more"),
            (self.repetition_penalty > 0, f"repetition_penalty: {self.repetition_penalty} must be above 0"),
            (self.max_new_tokens > 0 or self.max_length > 0, f"max_new_tokens: {self.max_new_tokens} and max_length: "
             f"{self.max_length} leave no room for an answer; one of them must be above 0"),
            (self.infer_batch_size >= 1, f"infer_batch_size: {self.infer_batch_size} must be 1 or more"),
        )  # fmt: skip
        refuse_all(f"{what}." for holds, what in rules if not holds)

    def room(self, prompt_tokens: int, context: int | None) -> int:
        """Most tokens that may answer a prompt of this length, in a model that takes `context` tokens at most."""
        wanted = self.max_new_tokens if self.max_new_tokens > 0 else self.max_length - prompt_tokens
        return max(0, wanted if context is None else min(wanted, context - prompt_tokens))

    def to_hf(self, *, new_tokens: int, stop_ids: Sequence[int], pad_id: int) -> GenerationConfig:
        """The same for `model.generate`, with nothing but what is meant here.

        Drawing without beams is left to the engine, whose noise belongs to the row and not to the batch.
        """
        from transformers import GenerationConfig

        keys: dict[str, object] = {
            "do_sample": self.do_sample and self.num_beams > 1,
            "num_beams": self.num_beams,
            "max_new_tokens": new_tokens,
            "repetition_penalty": float(self.repetition_penalty),
            "eos_token_id": list(stop_ids) or None,
            "pad_token_id": pad_id,
            "use_cache": True,
        }
        if self.num_beams > 1:
            keys["length_penalty"] = float(self.length_penalty)
            if self.do_sample:
                keys |= {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        return GenerationConfig(**keys)
