"""A named template for a model that reads images: its slots as they are, each image as the processor expands it.

Around an image stands what the processor's own chat template puts there (Qwen's `<|vision_start|>`), without blanks; so
LLaMA-Factory's plugins write it as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Message
from luthier.data.media import MARK
from luthier.data.processor import Vision
from luthier.data.processor_template import MediaPieces, Seeing, check_words, name_of
from luthier.data.slot_template import SlotRenderer
from luthier.data.template import Template, TemplateConfig

_TEXT = {"type": "text", "text": "ping"}


class SlotMediaRenderer(Seeing, SlotRenderer):
    """A `Template` bound to a processor. See `core/objective.py:Renderer`. Raises TemplateError where the processor's
    chat template does not say what stands around an image."""

    def __init__(self, config: TemplateConfig, template: Template, vision: Vision):
        self.vision = vision
        self._around = _around(vision)
        super().__init__(config, template, vision.processor.tokenizer)
        self._pieces = MediaPieces(self.tokenizer, vision)

    def prompt(self, messages: Sequence[Message], *, system: str = "", **given: Any) -> list[int]:
        """See Renderer: ids as the model reads them."""
        return self._read(super().prompt(messages, system=system, **given))

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files and the images that decides ids."""
        return repr((super().fingerprint(), self.vision.fingerprint(), self._around))

    def _checked(self, messages: Sequence[Message], *, response_last: bool) -> list[Message]:
        """As in SlotRenderer, with the images named in the texts."""
        check_words(self.vision, messages, "")
        named, count = [], 0
        for message in messages:
            content, *rest = message.content.split(MARK) if message.media else [message.content]
            for reference, text in zip(message.media, rest):
                content += f"{self._around[0]}{name_of(count, reference)}{self._around[1]}{text}"
                count += 1
            named.append(replace(message, content=content, media=()))
        return super()._checked(named, response_last=response_last)


def _around(vision: Vision) -> tuple[str, str]:
    """What the processor's chat template puts before and after an image: all that it writes of a turn with an image
    and not of the same turn without."""
    without, shown = (
        vision.processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        for parts in ([_TEXT], [{"type": "image"}, _TEXT])
    )
    start = len(os.path.commonprefix([without, shown]))
    end = len(without) - start
    if shown.count(vision.token) != 1 or not shown.endswith(without[start:]):
        raise TemplateError(
            "a named template needs to know how images are written, and the chat template of the model's processor "
            f"does not tell: it writes {shown!r} with an image and {without!r} without. Leave `template` out."
        )
    before, _, after = shown[start : len(shown) - end].strip().partition(vision.token)
    return before, after
