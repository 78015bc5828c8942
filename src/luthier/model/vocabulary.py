"""A model's vocabulary grown to its tokenizer: new rows of the embeddings, and what they start from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.model.modules import tied
from luthier.model.tokenizer import descriptions, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.model.source import ModelConfig

log = get_logger("model")

STEP = 64
"""A resized vocabulary is a multiple of this, as in LLaMA-Factory; matrix products of other sizes are slower."""


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, seed: int) -> None:
    """Grow embedding and head to the tokenizer, if `resize_vocab` allows; raises ModelError if it does not."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        if not config.resize_vocab:
            raise ModelError(
                f"{config.model_name_or_path}: the tokenizer has {len(tokenizer)} tokens and the model embeddings for "
                f"{rows}. Set resize_vocab: true to train the new ones, or use the tokenizer that belongs to the model."
            )
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=STEP, mean_resizing=False)
        log.info("The vocabulary grows from %d to %d.", rows, model.get_input_embeddings().weight.shape[0])
    words = _words(tokenizer, config)
    if len(tokenizer) <= rows and not words:
        return
    for offset, module in enumerate(_tables(model)):
        _fill(module, min(rows, len(module.weight)), words, noisy=config.init_special_tokens, seed=seed + offset)


def _tables(model: PreTrainedModel) -> list[nn.Module]:
    """Embedding and head, where the head has weights of its own."""
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([head] if head is not None and not tied(model) else [])]


def _words(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> dict[int, list[int]]:
    """id of a described new token -> ids of the words that describe it, no described token among them.

    What the model's own tokenizer knows is left alone: it was trained before.
    """
    if config.init_special_tokens == "noise_init":
        return {}
    plain = replace(
        config,
        add_tokens=None,
        add_special_tokens=None,
        new_special_tokens_config=None,
        init_special_tokens="noise_init",
    )
    known = load_tokenizer(plain).get_vocab()
    fresh = {token: text for token, text in descriptions(config).items() if token not in known}
    described = {tokenizer.convert_tokens_to_ids(token): text for token, text in fresh.items()}
    found = {}
    for token, text in described.items():
        ids = [i for i in tokenizer(text, add_special_tokens=False).input_ids if i not in described]
        if not ids:
            raise ConfigError(f"new_special_tokens_config: {text!r} holds no token that the model knows already.")
        found[token] = ids
    return found


def _fill(module: nn.Module, old: int, words: dict[int, list[int]], *, noisy: str, seed: int) -> None:
    """Rows from `old` on become the mean of the old ones plus noise of deviation 1/sqrt(width); rows of described
    tokens become the mean of the rows of their words, without that noise unless asked for."""
    import torch

    weight = module.weight.data
    width = weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(weight) - old, width, generator=generator) / math.sqrt(width)
    before = weight[:old].float().clone()
    weight[old:] = before.mean(0) + noise.to(weight.device)
    for token, ids in words.items():
        row: Tensor = before[[i for i in ids if i < old]].mean(0)
        if noisy == "desc_init_w_noise":
            row = row + torch.randn(width, generator=generator).to(row.device) / math.sqrt(width)
        weight[token] = row.to(weight.dtype)
