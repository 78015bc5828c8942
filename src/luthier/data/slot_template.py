"""Messages to ids by the slots of a `Template`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Example, Message
from luthier.data.jinja import settle_chat_template
from luthier.data.pieces import Pieces
from luthier.data.reasoning import Reasoning
from luthier.data.template import BOS, EOS, Template, TemplateConfig, Token
from luthier.data.tools import read_calls, read_definitions, tool_format
from luthier.data.turns import check_order
from luthier.data.vocabulary import document_head, require, settle, token_id

_PARTS = ("prefix", "system", "user", "observation", "assistant", "function")


class SlotRenderer:
    """A `Template` bound to a tokenizer. See `core/objective.py:Renderer`."""

    def __init__(self, config: TemplateConfig, template: Template, tokenizer: Any):
        self.name = config.template or "template"
        self.template = template
        self.tokenizer = tokenizer
        self.efficient_eos = template.efficient_eos
        self._date = config.date_string
        self._tools = tool_format(template.tool_format)
        self._reasoning = (
            Reasoning(template.thought_words, config.enable_thinking, config.preserve_thinking)
            if template.reasoning
            else None
        )
        self._fit_tokenizer()
        settle_chat_template(template, tokenizer, self._reasoning, self.name)
        self._ids = {BOS: tokenizer.bos_token_id, EOS: tokenizer.eos_token_id} | {
            slot: token_id(tokenizer, slot.text)
            for part in _PARTS
            for slot in template.slots(part)
            if isinstance(slot, Token)
        }
        constants = [slot for part in _PARTS for slot in template.slots(part) if isinstance(slot, str)]
        self._pieces = Pieces(tokenizer, [text for text in constants if "{{" not in text] + self._empty_thought())
        self._head = document_head(tokenizer)

    def _fit_tokenizer(self) -> None:
        template, tokenizer = self.template, self.tokenizer
        slots = [slot for part in _PARTS for slot in template.slots(part)]
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
    ) -> list[tuple[list[int], list[int]]]:
        """See Renderer."""
        check_order(messages, response_last=True, template=self.name)
        rendered, empty = list(messages), set()
        if self._reasoning is not None:
            rendered, empty = self._reasoning.conversation(messages, mask_history)
        ids = [self._pieces.join(elements) for elements in self._elements(rendered, system, tools)]
        for i in empty:
            self._add_empty_thought(ids, i)
        return [(ids[i], ids[i + 1]) for i in range(0, len(ids), 2)]

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> tuple[list[int], list[int]]:
        """See Renderer."""
        check_order(messages, response_last=True, template=self.name)
        rendered, empty = list(messages), False
        if self._reasoning is not None:
            rendered, empty = self._reasoning.exchange(messages)
        ids = [self._pieces.join(elements) for elements in self._elements(rendered, system, tools)]
        if empty:
            self._add_empty_thought(ids, len(ids) - 1)
        return [token for piece in ids[:-1] for token in piece], ids[-1]

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> list[int]:
        """See Renderer."""
        check_order(messages, response_last=False, template=self.name)
        return self.oneturn((*messages, Message("assistant", "")), system=system, tools=tools)[0]

    def document(self, text: str) -> list[int]:
        """See Renderer."""
        end = token_id(self.tokenizer, self.template.document_end) if self.template.document_end else None
        return [*self._head, *self._pieces(text), self.tokenizer.eos_token_id if end is None else end]

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
        """The pieces of text that `pairs` will tokenise for this example's answers, for `warm`."""
        found: list[str] = []
        for answer in example.answers:
            messages = (*example.prompt, *answer.messages)
            if self._reasoning is not None:
                messages = tuple(self._reasoning.conversation(messages, False)[0])
            elements = self._elements(messages, example.system, example.tools)
            found += [part for message in elements for part in message if isinstance(part, str)]
        return found

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these pieces in one call; what was warm before is forgotten."""
        self._pieces.warm(texts)

    def _empty_thought(self) -> list[str]:
        return [] if self._reasoning is None else [self._reasoning.empty]

    def _add_empty_thought(self, ids: list[list[int]], response: int) -> None:
        assert self._reasoning is not None
        thought = self._pieces(self._reasoning.empty)
        if self._reasoning.trains_empty:
            ids[response] = thought + ids[response]
        else:
            ids[response - 1] = ids[response - 1] + thought

    def _elements(self, messages: Sequence[Message], system: str, tools: str) -> Iterator[list[str | int]]:
        """Each message as pieces of text and ids; prefix and system stand with the first."""
        for i, message in enumerate(messages):
            opening: list[str | int] = []
            content = message.content
            if i == 0:
                opening = self._fill("prefix", "")
                content = self._open(opening, message.role, content, system or self.template.default_system, tools)
            if message.role == "function":
                lead, calls = read_calls(content, self.template.thought_words, self.template.tool_call_words)
                content = lead + self._tools.call(calls)
            yield opening + self._fill(message.role, content, idx=str(i // 2))

    def _open(self, opening: list[str | int], role: str, content: str, system: str, tools: str) -> str:
        """Put the system prompt into the opening, or before the content where the template fuses them."""
        if not system and not tools:
            return content
        definitions = read_definitions(tools) if tools else []
        text = system + (self._tools.describe(definitions, self._date) if definitions else "")
        if not self.template.fuse_system:
            opening += self._fill("system", text)
            return content
        if role != "user":
            raise TemplateError(
                f"template {self.name!r} puts the system prompt into a user message; {role} came first."
            )
        return "".join(str(part) for part in self._fill("system", text)) + content

    def _fill(self, part: str, content: str, idx: str = "") -> list[str | int]:
        """The slots of a part with the text put in, in one pass: what the text says is never read as a slot."""
        values = {"{{content}}": content, "{{idx}}": idx}
        filled: list[str | int] = []
        for slot in self.template.slots(part):
            if isinstance(slot, str):
                filled.append(re.sub(r"\{\{(?:content|idx)\}\}", lambda match: values[match.group()], slot))
            else:
                token = self._ids[slot]
                filled += [] if token is None else [token]
        return filled
