"""What happens to the thoughts of a reasoning model: which are kept, stripped, or written empty.

    enable_thinking   a turn with a thought     a turn without one
    true              kept                      an empty thought begins the response and is trained
    false             stripped                  an empty thought ends the prompt, not trained
    null              kept                      an empty thought ends the prompt, not trained

The rules are LLaMA-Factory's. History is what stands before the exchange that is spoken of. Its thoughts are stripped
unless `preserve_thinking`, as the models' own chat templates do.

`UNLIKE` says where a row is trained after other tokens than `Renderer.prompt` builds, and there is no other place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from luthier.core.types import Message
from luthier.data.turns import RESPONSES, responses


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The rules, with the words that open and close a thought."""

    words: tuple[str, str]
    enable: bool | None
    preserve: bool
    branch: bool
    empty: str
    """A thought with nothing in it."""

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

    def spoken(self, messages: Sequence[Message]) -> list[Message]:
        """Every response as it is trained where it is the last."""
        return self.past(messages) if self.enable is False else list(messages)

    def past(self, messages: Sequence[Message]) -> list[Message]:
        """Every response as it stands in history, without thoughts."""
        return [
            replace(message, content=self.strip(message.content)) if message.role in RESPONSES else message
            for message in messages
        ]

    def conversation(self, messages: Sequence[Message], mask_history: bool) -> tuple[list[Message], set[int]]:
        """A conversation as one sequence: the messages as they are to be rendered, and the places of responses that
        get an empty thought. With `mask_history` only the last response is trained, and history is history."""
        places = responses(messages)
        if mask_history and not self.preserve:
            last = places[-1]
            rendered = [*self.past(messages[:last]), *self.spoken(messages[last:])]
            candidates = places[-1:]
        else:
            rendered, candidates = self.spoken(messages), places
        return rendered, {place for place in candidates if not self.thinks(rendered[place].content)}

    def unlike(self, messages: Sequence[Message], place: int, *, one_sequence: bool) -> list[str]:
        """Names of `UNLIKE` that are true of the response at this place. one_sequence: every response is trained, and
        not as branches."""
        return [name for name, holds in UNLIKE.items() if holds(self, messages, place, one_sequence)]


def _history(rules: Reasoning, messages: Sequence[Message], place: int, one_sequence: bool) -> bool:
    """LLaMA-Factory's one sequence keeps thoughts of earlier turns and writes empty ones; servers send neither."""
    if rules.preserve or rules.branch or not one_sequence:
        return False
    earlier = [message for message in messages[:place] if message.role in RESPONSES]
    kept = zip(rules.spoken(earlier), rules.past(earlier))
    return any(trained.content != sent.content or not rules.thinks(trained.content) for trained, sent in kept)


def _own_thought(rules: Reasoning, messages: Sequence[Message], place: int, one_sequence: bool) -> bool:
    """With enable_thinking false or null a server's prompt ends with an empty thought; a response that has a thought
    (with false: half of one, which cannot be stripped) is trained without."""
    [response] = rules.spoken(messages[place : place + 1])
    return not rules.trains_empty and rules.thinks(response.content)


UNLIKE: Mapping[str, Callable[[Reasoning, Sequence[Message], int, bool], bool]] = {
    "history": _history,
    "own thought": _own_thought,
}
"""How the tokens before a trained response can differ from the prompt that `infer`, `chat` and servers build."""
