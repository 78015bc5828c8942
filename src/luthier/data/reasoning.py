"""What happens to the thoughts of a reasoning model: which are kept, stripped, or written empty.

    enable_thinking   a turn with a thought     a turn without one
    true              kept                      an empty thought begins the response and is trained
    false             stripped                  an empty thought ends the prompt, not trained
    null              kept                      an empty thought ends the prompt, not trained

The rules are LLaMA-Factory's. History is what stands before the last exchange: where only the last response is
trained, its thoughts are stripped unless `preserve_thinking`, as the models' own chat templates do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.core.types import Message


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The rules, with the words that open and close a thought."""

    words: tuple[str, str]
    enable: bool | None
    preserve: bool

    @property
    def empty(self) -> str:
        """A thought with nothing in it."""
        return self.words[0] + self.words[1]

    @property
    def trains_empty(self) -> bool:
        """Whether an empty thought belongs to the response; else to the prompt."""
        return self.enable is True

    def strip(self, content: str) -> str:
        """The content without its thoughts."""
        pattern = f"{re.escape(self.words[0])}.*?{re.escape(self.words[1])}"
        return re.sub(pattern, "", content, flags=re.DOTALL).lstrip("\n")

    def thinks(self, content: str) -> bool:
        """Whether the content has a thought, or a part of one."""
        return any(word.strip() in content for word in self.words)

    def conversation(self, messages: Sequence[Message], mask_history: bool) -> tuple[list[Message], set[int]]:
        """A conversation whose responses stand at odd places: the messages as they are to be rendered, and the
        places of responses that get an empty thought."""
        responses = range(1, len(messages), 2)
        forget = mask_history and not self.preserve
        stripped = [i for i in responses if self.enable is False or (forget and i != len(messages) - 1)]
        rendered = self._stripped(messages, stripped)
        candidates = responses[-1:] if forget else responses
        return rendered, {i for i in candidates if not self.thinks(rendered[i].content)}

    def exchange(self, messages: Sequence[Message]) -> tuple[list[Message], bool]:
        """A prompt and its response, the last message: the messages as they are to be rendered, and whether the
        response gets an empty thought."""
        last = len(messages) - 1
        stripped = [] if self.preserve else list(range(1, last, 2))
        if self.enable is False:
            stripped.append(last)
        rendered = self._stripped(messages, stripped)
        return rendered, not self.thinks(rendered[last].content)

    def _stripped(self, messages: Sequence[Message], places: Sequence[int]) -> list[Message]:
        rendered = list(messages)
        for i in places:
            rendered[i] = replace(rendered[i], content=self.strip(rendered[i].content))
        return rendered
