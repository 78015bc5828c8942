"""Messages to text by the tokenizer's own chat template, and a watch that the template leaves nothing out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.log import get_logger
from luthier.core.types import Call, Message
from luthier.data.template import AUTO, TemplateConfig
from luthier.data.tools import read_calls, read_definitions, wrapped_definition
from luthier.data.turns import RESPONSES

log = get_logger("data.chat_template")

THOUGHT = ("<think>", "</think>")
"""How thoughts are written in data. Templates with words of their own are given a thought apart from the text."""
_CALLS = ("<tool_call>", "</tool_call>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_OURS = ("tool_format", "efficient_eos", "replace_eos")
_WORDS_FOR_THOUGHT = ("reasoning_content", "reasoning", "thinking")
"""What templates call the thought of a message; it is handed to them under all of these."""
_PARTS_OF_A_DATE = "aAbBdjmyYHIMSp"

Spans = list[tuple[int, int]]


class ChatText:
    """The tokenizer's chat template with what the configuration says to it. Raises TemplateError if there is none."""

    def __init__(self, config: TemplateConfig, tokenizer: Any):
        self.tokenizer = tokenizer
        self.source = _source(tokenizer)
        self.tracks = bool(_GENERATION.search(self.source))
        """Whether the template marks what the model says."""
        self._default_system = config.default_system or ""
        self._clock = _clock(config.date_string) if "strftime_now" in self.source else ""
        self._variables = _variables(config, self.source)
        self._asks_for_thoughts = any(re.search(rf"\b{word}\b", self.source) for word in _WORDS_FOR_THOUGHT)
        self._thinking = config.enable_thinking is not False

    @property
    def hint(self) -> str:
        """What else may help where a template opens a thought that the data do not have."""
        knows = "enable_thinking" in self.source and self._thinking
        return ", or enable_thinking: false if the responses have no thoughts" if knows else ""

    def fingerprint(self) -> str:
        """Everything that decides the text."""
        return repr((self.source, self._default_system, sorted(self._variables.items())))

    def asked(self, messages: Sequence[Message], system: str, tools: str) -> str:
        """What the model is given when it is to speak next."""
        return self._apply(messages, system, tools, ask=True, spans=False)[0]

    def whole(self, messages: Sequence[Message], system: str, tools: str) -> tuple[str, Spans]:
        """A conversation that ends with a response, and what the template marks as said by the model."""
        return self._apply(messages, system, tools, ask=False, spans=self.tracks)

    def check_prompt(self, messages: Sequence[Message], system: str, tools: str, asked: str) -> None:
        """Nothing of a prompt may vanish: the system prompt, the tools, what was asked, what tools answered."""
        for what, text in [("the system prompt", system or self._default_system), *_asked(messages)]:
            if not _holds(asked, text):
                raise TemplateError(f"the tokenizer's chat template leaves out {what}: {text[:80]!r}. Set `template`.")
        missing = [tool["name"] for tool in read_definitions(tools) if tool["name"] not in asked] if tools else []
        if missing:
            raise TemplateError(
                f"the tokenizer's chat template leaves out tools that may be called ({', '.join(missing)}). "
                f"Set `template`."
            )

    def check_response(self, message: Message, response: str) -> None:
        """Nothing of the response may vanish: its thought, its text, its calls of tools."""
        thought, text, calls = self._spoken(message)
        missing = [call.name for call in calls if call.name not in response]
        if missing:
            raise TemplateError(
                f"the tokenizer's chat template leaves out calls of tools ({', '.join(missing)}). Set `template`."
            )
        parts = [("the thought of a response", thought), ("the text of a response", text)]
        if THOUGHT[1] in text:  # which the template may well take apart
            before, _, after = text.partition(THOUGHT[1])
            parts = [(parts[0][0], before.replace(THOUGHT[0], "", 1)), (parts[1][0], after)]
        for what, part in parts:
            if not _holds(response, part):
                raise TemplateError(f"the tokenizer's chat template leaves out {what}: {part[:80]!r}. Set `template`.")

    def _apply(
        self, messages: Sequence[Message], system: str, tools: str, *, ask: bool, spans: bool
    ) -> tuple[str, Spans]:
        from jinja2 import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        system = system or self._default_system
        conversation = [{"role": "system", "content": system}] if system else []
        conversation += self._dicts(messages)
        definitions = [wrapped_definition(tool) for tool in read_definitions(tools)] if tools else []
        try:
            rendered, found = render_jinja_template(
                conversations=[conversation],
                tools=definitions or None,
                chat_template=self._clock + self.tokenizer.get_chat_template(tools=definitions or None),
                add_generation_prompt=ask,
                return_assistant_tokens_mask=spans,
                **self.tokenizer.special_tokens_map,
                **self._variables,
            )
        except (JinjaError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise TemplateError(f"the tokenizer's chat template cannot render this conversation: {error}") from error
        return rendered[0], (found[0] if spans else [])

    def _dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as templates read them. Calls are numbered, and what tools answer goes to them in order."""
        found: list[dict[str, Any]] = []
        waiting: list[dict[str, Any]] = []
        count = 0
        for message in messages:
            if message.role == "observation":
                asked = waiting.pop(0) if waiting else None
                known = {} if asked is None else {"tool_call_id": asked["id"], "name": asked["function"]["name"]}
                found.append({"role": "tool", "content": message.content, **known})
                continue
            waiting = []
            if message.role not in RESPONSES:
                found.append({"role": message.role, "content": message.content})
                continue
            thought, text, calls = self._spoken(message)
            said: dict[str, Any] = {"role": "assistant", "content": text}
            if thought:
                said |= dict.fromkeys(_WORDS_FOR_THOUGHT, thought)
            if calls:
                # Nine letters and digits: what Mistral's templates insist on.
                waiting = [_call(call, f"call{count + nth:05d}") for nth, call in enumerate(calls)]
                count += len(calls)
                said["tool_calls"] = list(waiting)
            found.append(said)
        return found

    def _spoken(self, message: Message) -> tuple[str, str, list[Call]]:
        """The thought, the text and the calls of a response. A thought stays in the text where the template has no
        word for it, and is gone where thoughts are switched off."""
        content, calls = message.content, []
        if message.role == "function":
            content, calls = read_calls(content, THOUGHT, _CALLS)
        before, closed, after = content.partition(THOUGHT[1])
        thinks = closed and before.lstrip().startswith(THOUGHT[0])
        if not thinks or (self._thinking and not self._asks_for_thoughts):
            return "", content, calls
        thought = before.lstrip().removeprefix(THOUGHT[0]).strip("\n") if self._thinking else ""
        return thought, after.lstrip("\n"), calls


def _call(call: Call, number: str) -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _asked(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """The turns since the last response, which a prompt is there to bring, with words for each."""
    words = {"observation": "what tools answer", "user": "what the user says", "system": "a system message"}
    since = next((nth for nth, message in enumerate(reversed(messages)) if message.role in RESPONSES), len(messages))
    return [(words[message.role], message.content) for message in messages[len(messages) - since :]]


def _holds(text: str, part: str) -> bool:
    """Whether a text has this part, as it is or escaped; blanks at its ends may be gone."""
    part = part.strip()
    return part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text or json.dumps(part)[1:-1] in text


def _source(tokenizer: Any) -> str:
    """The text of the chat template; TemplateError if the tokenizer has none."""
    template = tokenizer.chat_template
    if not template:
        raise TemplateError(
            f"`template` is not set and the tokenizer ({tokenizer.name_or_path or type(tokenizer).__name__}) has no "
            f"chat template. Set the template the model was trained with, such as template: chatml, or "
            f"template: default for a base model."
        )
    return template if isinstance(template, str) else repr(sorted(template.items()))


def _variables(config: TemplateConfig, source: str) -> Mapping[str, Any]:
    """What is handed to the template beside the messages. A key that cannot act is an error or a warning."""
    useless = [key for key in _NOT_OURS if getattr(config, key) is not None]
    if useless:
        raise ConfigError(
            f"{', '.join(useless)}: the tokenizer's own chat template decides this. Set `template` to a name, or leave "
            f"{'it' if len(useless) == 1 else 'them'} out (template: {config.template or AUTO})."
        )
    variables: dict[str, Any] = {"date_string": config.date_string}
    if config.enable_thinking is not None:
        variables["enable_thinking"] = config.enable_thinking
    if config.preserve_thinking:
        variables["preserve_thinking"] = True
    if config.enable_thinking is False and "enable_thinking" not in source:
        log.warning("the tokenizer's chat template knows no enable_thinking: thoughts are removed, prompts stay as is.")
    if config.preserve_thinking and "preserve_thinking" not in source:
        log.warning("the tokenizer's chat template knows no preserve_thinking: it has no effect.")
    return variables


def _clock(day: str) -> str:
    """A macro that stands before a template which asks what day it is, and tells it the configuration's."""
    try:
        date = datetime.strptime(day, "%d %b %Y")
    except ValueError:
        raise ConfigError(
            f"date_string: {day!r} is no day such as 26 Jul 2024, and the tokenizer's chat template wants to write it "
            f"in its own form."
        ) from None
    told = "".join(f"|replace('%{part}', '{date.strftime('%' + part)}')" for part in _PARTS_OF_A_DATE)
    return f"{{%- macro strftime_now(form) -%}}{{{{- form{told} -}}}}{{%- endmacro -%}}"
