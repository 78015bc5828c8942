"""The tokenizer of a model folder, with the tokens a run adds and a token to pad with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger
from luthier.model.modules import as_names
from luthier.model.source import ModelConfig, hub, model_folder, no_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger("model")

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""A folder with none of these has no tokenizer."""

PADS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|pad_token|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|endoftext|>",
)
"""Tokens that vocabularies hold for padding, or hold and do not need in a conversation; the first that is there."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config`: pads on the right, knows the added tokens, has a pad token, if possible not eos.

    Raises ModelError where the folder or the hub has none.
    """
    from transformers import AutoTokenizer

    name = config.model_name_or_path
    folder = model_folder(config)
    if folder is not None and not (folder / "config.json").exists() and not any((folder / f).exists() for f in FILES):
        raise ModelError(
            f"model_name_or_path: {folder} is no model folder: it has neither config.json nor a tokenizer."
        )
    if folder is not None and not any((folder / file).exists() for file in FILES):
        raise ModelError(
            f"model_name_or_path: {folder} has no tokenizer (no tokenizer.json). Copy the files of the model it was "
            "made from: tokenizer.json, tokenizer_config.json and, if there is one, chat_template.jinja."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder or name,
            split_special_tokens=config.split_special_tokens,
            padding_side="right",
            trust_remote_code=config.trust_remote_code,
            **hub(config),
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(no_source("model_name_or_path", name, folder, error)) from error
    _add_tokens(tokenizer, config)
    _choose_pad(tokenizer, name)
    return tokenizer


def special_tokens(config: ModelConfig) -> list[str]:
    """Special tokens to add: those that `new_special_tokens_config` describes, then those of `add_special_tokens`."""
    return list(dict.fromkeys([*descriptions(config), *as_names(config.add_special_tokens)]))


def descriptions(config: ModelConfig) -> dict[str, str]:
    """token -> words, from the file that `new_special_tokens_config` names; raises ConfigError."""
    if config.new_special_tokens_config is None:
        return {}
    import yaml

    path = Path(config.new_special_tokens_config).expanduser()
    try:
        held = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"new_special_tokens_config: {path} cannot be read: {error}") from error
    whole = isinstance(held, dict) and held and all(isinstance(v, str) and v.strip() for v in held.values())
    if not whole:
        raise ConfigError(
            f'new_special_tokens_config: {path} must hold lines such as `"<token>": words that describe it`; every '
            "token needs words."
        )
    return {str(token): words for token, words in held.items()}


def _add_tokens(tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
    for key, names, special in (
        ("add_tokens", as_names(config.add_tokens), False),
        ("add_special_tokens", special_tokens(config), True),
    ):
        if not names:
            continue
        added = tokenizer.add_tokens(names, special_tokens=special)
        known = len(names) - added
        log.info("%s: %d added to the tokenizer%s.", key, added, f", {known} were there already" if known else "")


def _choose_pad(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    # Padding is always told by lengths, never by the id, so a pad that equals eos does no harm here; a pad of its own
    # keeps the saved model safe in programs that mask by id.
    free = (pad for pad in PADS if pad in vocabulary and pad not in taken)
    pad = next(free, tokenizer.eos_token or tokenizer.unk_token)
    if pad is None:
        raise ModelError(f"{name}: the tokenizer has no pad, eos or unk token, so nothing can fill short rows.")
    tokenizer.pad_token = pad
