"""Messages to ids by the slots of a `Template`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Example, Message, Reply
from luthier.data.jinja import settle_chat_template
from luthier.data.pieces import Pieces
from luthier.data.reasoning import Reasoning
from luthier.data.template import BOS, EOS, Parts, Template, TemplateConfig, Token
from luthier.data.tools import read_calls, read_definitions, read_reply, tool_format, write_calls
from luthier.data.turns import RESPONSES, check_alternation, check_ends, join_results, responses
from luthier.data.vocabulary import document_head, require, settle, token_id

_PARTS = ("prefix", "opening", "system", "user", "observation", "assistant", "function")

Elements = list[str | int]
"""Pieces of text, each tokenised on its own, and ids."""
Ids = list[int]
Pair = tuple[Ids, Ids]


class SlotRenderer:
    """A `Template` bound to a tokenizer. See `core/objective.py:Renderer`."""

    def __init__(self, config: TemplateConfig, template: Template, tokenizer: Any):
        self.name = config.template or "template"
        self.template = template
        self.tokenizer = tokenizer
        self.efficient_eos = template.efficient_eos
        self._date = config.date_string
        self._dialect = template.tool_format
        self._reasoning = _reasoning(template, config) if template.reasoning else None
        self._slots = {part: template.slots(part) for part in _PARTS}
        self._unanswered = {role: template.without_opening(role) for role in ("user", "observation")}
        self._fit_tokenizer()
        settle_chat_template(template, tokenizer, self._reasoning, self._date, self.name)
        slots = [slot for part in self._slots.values() for slot in part]
        tokens = {slot: token_id(tokenizer, slot.text) for slot in slots if isinstance(slot, Token)}
        self._ids = {BOS: tokenizer.bos_token_id, EOS: tokenizer.eos_token_id} | tokens
        constants = [slot for slot in slots if isinstance(slot, str) and "{{" not in slot]
        self._empty = "" if self._reasoning is None else self._reasoning.empty
        self._pieces = Pieces(tokenizer, [*constants, self._empty])
        self._head = document_head(tokenizer)

    def _fit_tokenizer(self) -> None:
        template, tokenizer = self.template, self.tokenizer
        slots = [slot for part in self._slots.values() for slot in part]
        text = "".join(slot for slot in slots if isinstance(slot, str))
        eos = template.stop_words[0] if template.replace_eos else None
        written = [word for word in template.stop_words if word in text or word == eos]
        tokens = [slot.text for slot in slots if isinstance(slot, Token)]
        require(tokenizer, [*template.markers, *written, *tokens], self.name)
        settle(tokenizer, eos=eos, special=template.stop_words)
        if tokenizer.eos_token_id is None:
            raise TemplateError(
                f"template {self.name!r} needs an end token and the tokenizer has no eos_token. Add one to its "
                f"tokenizer_config.json, or choose a template that brings its own."
            )

    def pairs(
        self, messages: Sequence[Message], *, system: str = "", tools: str = "", mask_history: bool = False
    ) -> list[Pair]:
        """See Renderer."""
        messages = self._checked(messages, response_last=True)
        empty: set[int] = set()
        if self._reasoning is not None:
            messages, empty = self._reasoning.conversation(messages, mask_history)
        pairs: list[Pair] = []
        source: Ids = []
        for place, (before, own) in enumerate(self._rendered(messages, system, tools)):
            source += before
            if messages[place].role not in RESPONSES:
                source += own
                continue
            pairs.append(self._with_thought(source, own, place in empty))
            source = []
        return pairs

    def branches(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> list[list[Pair]]:
        """See Renderer. With `branch_thinking` thoughts vanish from history, and a turn that shows another face later
        is a branch of its own."""
        if self._reasoning is None or self._reasoning.preserve or not self._reasoning.branch:
            return [self.pairs(messages, system=system, tools=tools)]
        branches: list[list[Pair]] = []
        path: Ids = []
        for source, response in self._turns(self._checked(messages, response_last=True), system, tools):
            if branches and source[: len(path)] == path:
                branches[-1].append((source[len(path) :], response))
            else:
                branches.append([(source, response)])
            path = source + response
        return branches

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> Pair:
        """See Renderer."""
        if self._reasoning is not None and not self._reasoning.preserve:
            *_, last = self._turns(self._checked(messages, response_last=True), system, tools)
            return last
        *earlier, last = self.pairs(messages, system=system, tools=tools)
        return [token for pair in earlier for part in pair for token in part] + last[0], last[1]

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> Ids:
        """See Renderer."""
        check_ends(messages, response_last=False, template=self.name)
        return self.oneturn((*messages, Message("assistant", "")), system=system, tools=tools)[0]

    def unserved(self, messages: Sequence[Message]) -> bool:
        """See Renderer."""
        rules = self._reasoning
        if rules is None:
            return False
        return any("history" in rules.unlike(messages, place, one_sequence=True) for place in responses(messages))

    def document(self, text: str) -> Ids:
        """See Renderer."""
        end = token_id(self.tokenizer, self.template.document_end) if self.template.document_end else None
        return [*self._head, *self._pieces(text), self.tokenizer.eos_token_id if end is None else end]

    def reply(self, text: str, *, tools: str = "") -> Reply:
        """See Renderer."""
        dialect = tool_format(self._dialect)
        return read_reply(text, dialect, self.template.thought_words, read_definitions(tools) if tools else ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See Renderer."""
        words = (token_id(self.tokenizer, word) for word in self.template.stop_words)
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *(word for word in words if word is not None)]))

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files that decides ids."""
        tokens = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return repr((self.name, self.template, self._date, self._reasoning, tokens))

    def texts(self, example: Example) -> list[str]:
        """The pieces of text that `pairs` and `branches` will tokenise for this example's answers, for `warm`."""
        found: list[str] = []
        for answer in example.answers:
            messages: Sequence[Message] = self._checked((*example.prompt, *answer.messages), response_last=True)
            faces = [messages] if self._reasoning is None else [messages, self._reasoning.past(messages)]
            for face in faces:
                for parts in self._elements(face, example.system, example.tools):
                    found += [piece for elements in parts for piece in elements if isinstance(piece, str)]
        return found

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these pieces in one call; what was warm before is forgotten."""
        self._pieces.warm(texts)

    def _checked(self, messages: Sequence[Message], *, response_last: bool) -> list[Message]:
        """The messages in an order this template can render; raises TemplateError."""
        check_ends(messages, response_last=response_last, template=self.name)
        joint = self.template.joint
        messages = list(messages) if joint is None else join_results(messages, joint)
        if self.template.opening is None:
            check_alternation(messages, self.name)
        elif self.template.fuse_system and any(message.role == "system" for message in messages):
            raise TemplateError(f"template {self.name!r} has no place for a system message between turns.")
        return messages

    def _turns(self, messages: Sequence[Message], system: str, tools: str) -> Iterator[Pair]:
        """Each response with everything the model sees before it says it."""
        assert self._reasoning is not None
        spoken = self._reasoning.spoken(messages)
        past: Ids = []
        for message, (before, own), (_, later) in zip(
            spoken,
            self._rendered(spoken, system, tools),
            self._rendered(self._reasoning.past(messages), system, tools),
        ):
            past = past + before
            if message.role in RESPONSES:
                yield self._with_thought(past, own, not self._reasoning.thinks(message.content))
            past = past + later

    def _with_thought(self, source: Ids, response: Ids, empty: bool) -> Pair:
        """A prompt and its response, with an empty thought where the rules want one."""
        if not empty:
            return source, response
        assert self._reasoning is not None
        thought = self._pieces(self._empty)
        return (source, thought + response) if self._reasoning.trains_empty else (source + thought, response)

    def _rendered(self, messages: Sequence[Message], system: str, tools: str) -> Iterator[tuple[Ids, Ids]]:
        """The ids of `_elements`."""
        for before, own in self._elements(messages, system, tools):
            yield self._pieces.join(before), self._pieces.join(own)

    def _elements(self, messages: Sequence[Message], system: str, tools: str) -> Iterator[tuple[Elements, Elements]]:
        """For each message what the template puts before it, and the message."""
        exchange = 0
        for place, message in enumerate(messages):
            before: Elements = []
            content, role = message.content, message.role
            if place == 0:
                before += self._fill(self._slots["prefix"], "")
                content = self._open(before, role, content, system or self.template.default_system, tools)
            if role in RESPONSES:
                if place == 0 or messages[place - 1].role in (*RESPONSES, "system"):
                    before += self._fill(self._slots["opening"], "")
                exchange += 1
            if role == "function":
                lead, calls = read_calls(content, self.template.thought_words, self.template.tool_call_words)
                content = write_calls(tool_format(self._dialect), lead, calls)
            answered = place + 1 < len(messages) and messages[place + 1].role in RESPONSES
            slots = self._unanswered[role] if role in self._unanswered and not answered else self._slots[role]
            yield before, self._fill(slots, content, idx=str(exchange))

    def _open(self, opening: Elements, role: str, content: str, system: str, tools: str) -> str:
        """Put the system prompt into the opening, or before the content where the template fuses them."""
        definitions = read_definitions(tools) if tools else []
        if not system and not definitions:
            return content
        described = tool_format(self._dialect).describe(definitions, self._date) if definitions else ""
        text = system + (described.lstrip("\n") if self.template.trim_tools and not system else described)
        if not self.template.fuse_system:
            opening += self._fill(self._slots["system"], text)
            return content
        if role != "user":
            raise TemplateError(
                f"template {self.name!r} puts the system prompt into a user message; {role} came first."
            )
        return "".join(str(part) for part in self._fill(self._slots["system"], text)) + content

    def _fill(self, slots: Parts, content: str, idx: str = "") -> Elements:
        """Slots with the text put in, in one pass: what the text says is never read as a slot."""
        values = {"{{content}}": content, "{{idx}}": idx}
        filled: Elements = []
        for slot in slots:
            if isinstance(slot, str):
                filled.append(re.sub(r"\{\{(?:content|idx)\}\}", lambda match: values[match.group()], slot))
            else:
                token = self._ids[slot]
                filled += [] if token is None else [token]
        return filled


def _reasoning(template: Template, config: TemplateConfig) -> Reasoning:
    empty = "".join(template.thought_words) if template.empty_thought is None else template.empty_thought
    return Reasoning(
        template.thought_words, config.enable_thinking, config.preserve_thinking, config.branch_thinking, empty
    )
