"""A model whose next token depends on the last one alone, as a table says; no scorer can guess what it does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers

SIZE = 400


def chain_model(tokenizer, text_to: Mapping[str | int, str | int | list[str]]):
    """text_to: from a token (as text or id) to the one that follows it, or to a list of equal chances."""
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=SIZE, intermediate_size=4, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE))
        for layer in model.model.layers:  # they add nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for text, after in text_to.items():
            for one in after if isinstance(after, list) else [after]:
                model.lm_head.weight[token(tokenizer, one), token(tokenizer, text)] = 2.0
    return model


def token(tokenizer, text: str | int) -> int:
    """The id of a text that is one token."""
    if isinstance(text, int):
        return text
    (found,) = tokenizer.encode(text, add_special_tokens=False)
    return found
