"""What a chat template needs of a tokenizer: its special tokens, each as one id, and an eos and a pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.core.errors import TemplateError


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of this token, or None if the vocabulary has no token of exactly this text."""
    found = tokenizer.convert_tokens_to_ids(token)
    missing = found is None or (found == tokenizer.unk_token_id and token != tokenizer.unk_token)
    return None if missing else found


def require(tokenizer: Any, tokens: Sequence[str], template: str) -> None:
    """Raise TemplateError naming every one of these tokens that the vocabulary lacks."""
    missing = [token for token in dict.fromkeys(tokens) if token_id(tokenizer, token) is None]
    if missing:
        raise TemplateError(
            f"template {template!r} writes {', '.join(missing)}, which this tokenizer "
            f"({tokenizer.name_or_path or type(tokenizer).__name__}) does not have as a single token. Choose the "
            f"template of this model, leave `template` out to use the tokenizer's own, or add the tokens: "
            f"add_special_tokens: {','.join(missing)} and resize_vocab: true."
        )


def settle(tokenizer: Any, *, eos: str | None, special: Sequence[str]) -> None:
    """Change the tokenizer, once, to what a template needs: eos becomes `eos` if given, the tokens of `special` that
    the vocabulary has count as special (never split, skipped when text is shown), and pad becomes eos if there is none.
    Nothing is added to the vocabulary. All changes are saved with the tokenizer."""
    if eos is not None and tokenizer.eos_token != eos:
        tokenizer.eos_token = eos
    known = set(tokenizer.all_special_tokens)
    new = [token for token in special if token not in known and token_id(tokenizer, token) is not None]
    if new:
        tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token


def document_head(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself, such as bos."""
    probe = "a"
    whole, bare = tokenizer.encode(probe), tokenizer.encode(probe, add_special_tokens=False)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise TemplateError(f"the tokenizer writes {probe!r} as {whole} with special tokens and as {bare} without them.")
