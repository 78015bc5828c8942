"""From a configuration and a tokenizer to what turns conversations into tokens."""

from __future__ import annotations

from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.objective import Renderer
from luthier.data.chat_template import ChatTemplateRenderer
from luthier.data.document import DocumentRenderer
from luthier.data.slot_template import SlotRenderer
from luthier.data.template import AUTO, TemplateConfig, customise, find_template


def make_renderer(config: TemplateConfig, tokenizer: Any) -> Renderer:
    """Bind the template of the configuration to a tokenizer, which is changed where the template needs it: eos
    becomes the template's end of turn (`replace_eos`), stop words count as special tokens, pad becomes eos if there
    is none. A tokenizer without a usable chat template of its own can still render documents; asked for a conversation
    the renderer raises ConfigError. Raises TemplateError if the tokenizer lacks a token of the template, ConfigError
    for an unknown name."""
    if config.template in (None, AUTO):
        try:
            return ChatTemplateRenderer(config, tokenizer)
        except TemplateError as error:
            return DocumentRenderer(tokenizer, str(error))
    return SlotRenderer(config, customise(find_template(config.template), config), tokenizer)
