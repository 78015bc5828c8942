"""Drafts from a small model with the same tokenizer (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.drafters._greedy import Greedy
from luthier.engines.target import Cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.engines.drafting import SpeculateConfig
    from luthier.engines.target import Target
    from luthier.model.source import ModelConfig


def build(
    keys: SpeculateConfig, target: Target, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> Greedy:
    """The model of `draft_model`, in the target's number format. Raises ModelError for another tokenizer."""
    from luthier.model.load import load_model
    from luthier.model.tokenizer import load_tokenizer

    assert keys.draft_model is not None
    own = replace(
        model_config,
        model_name_or_path=keys.draft_model,
        model_revision="main",
        add_tokens=None,
        add_special_tokens=None,
        resize_vocab=False,
    )
    _same_tokens(keys.draft_model, load_tokenizer(own), tokenizer)
    model = load_model(own, dtype=target.model.dtype, device=target.device)
    return Greedy(Cached(model.requires_grad_(False)), target.vocabulary)


def _same_tokens(name: str, draft: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> None:
    known = target.get_vocab()
    other = [token for token, number in draft.get_vocab().items() if known.get(token) != number]
    if other:
        raise ModelError(
            f"draft_model: {name} has another tokenizer than the model: {len(other)} of its {len(draft.get_vocab())} "
            f"tokens mean something else there (such as {other[0]!r}). Drafts are token ids, so the two must agree."
        )
