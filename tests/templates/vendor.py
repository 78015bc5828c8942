"""The chat templates that TRL keeps of the models' makers, and tokenizers that know their special tokens."""

from __future__ import annotations

import copy
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.conftest import build_tokenizer


def _folder() -> Path:
    found = find_spec("trl")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent / "chat_templates"


SOURCES = {file.stem: file.read_text() for file in sorted(_folder().glob("*.jinja"))}
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm": "<|endoftext|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "phi3": "<|endoftext|>",
}
"""The eos of each family; of the others <|im_end|>."""


@cache
def _base() -> Any:
    tokens = {token for text in SOURCES.values() for token in re.findall(r"<[|｜]?[\w▁.-]{2,30}[|｜]?>", text)}
    marked = {token for token in tokens if "|" in token or "｜" in token} | {"<start_of_turn>", "<end_of_turn>"}
    return build_tokenizer(
        800, extra_specials=(*sorted(marked | set(ENDS.values())), "<｜User｜>", "<｜Assistant｜>", "[gMASK]", "<sop>")
    )


def tokenizer_of(name: str) -> Any:
    """A tokenizer with this chat template, fresh."""
    tokenizer = copy.deepcopy(_base())
    tokenizer.chat_template = SOURCES[name]
    tokenizer.eos_token = next((end for family, end in ENDS.items() if name.startswith(family)), "<|im_end|>")
    return tokenizer
