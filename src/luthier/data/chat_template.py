"""Messages to ids by the tokenizer's own chat template, for `template` unset.

What is trained is found exactly, by rendering beginnings of the conversation: the template rendered up to a response,
with its generation prompt, must be how the rendering with the response begins, and that how the next prompt begins.
The response is the difference, with the end-of-turn marker the template writes. A template for which this does not
hold would train on something else than it generates from; it is refused with the first difference.

Templates with `{% generation %}` blocks narrow the response to those blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from luthier.core.errors import ConfigError, TemplateError
from luthier.core.log import get_logger
from luthier.core.types import Example, Message
from luthier.data.pieces import Pieces
from luthier.data.template import TemplateConfig
from luthier.data.tools import read_calls, read_definitions, wrapped_definition
from luthier.data.turns import check_order
from luthier.data.vocabulary import document_head, settle, token_id

log = get_logger("data.chat_template")

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOT_OURS = ("tool_format", "efficient_eos", "replace_eos")


Conversation = tuple[tuple[Message, ...], str, str]
"""Messages, system prompt, tools."""
Cut = list[tuple[str, str]]
"""(source, response) texts."""


class Rewritten(TemplateError):
    """The chat template renders the beginning of a conversation otherwise when the conversation goes on."""


class ChatTemplateRenderer:
    """The tokenizer's chat template. See `core/objective.py:Renderer`.

    The tokenizer is changed where something is missing: pad becomes eos, and eos the template's end-of-turn marker.
    Raises TemplateError if there is no chat template or if it does not end a response with a special token."""

    name = "chat_template"
    efficient_eos = False

    def __init__(self, config: TemplateConfig, tokenizer: Any):
        self.tokenizer = tokenizer
        self._default_system = config.default_system or ""
        self._source = _source(tokenizer)
        self._variables = self._template_variables(config)
        self._tracks = bool(_GENERATION.search(self._source))
        self._pieces = Pieces(tokenizer)
        end = self._end_of_turn()
        settle(tokenizer, eos=end if tokenizer.eos_token is None else None, special=(end,))
        self._end = token_id(tokenizer, end)
        self._head = document_head(tokenizer)
        self._cuts: dict[Conversation, Cut] = {}
        self._coming: dict[Conversation, Cut] = {}

    def pairs(
        self, messages: Sequence[Message], *, system: str = "", tools: str = "", mask_history: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """See Renderer. With `mask_history` a template that rewrites earlier turns is no error: the one pair then is
        (everything before the last response, the last response)."""
        check_order(messages, response_last=True, template=self.name)
        cut = self._cut(messages, system, tools, strict=not mask_history)
        return [(self._pieces(source), self._pieces(response)) for source, response in cut]

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> tuple[list[int], list[int]]:
        """See Renderer."""
        check_order(messages, response_last=True, template=self.name)
        cut = self._cut(messages, system, tools, strict=False)
        return self._joined(cut[:-1]) + self._pieces(cut[-1][0]), self._pieces(cut[-1][1])

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> list[int]:
        """See Renderer."""
        check_order(messages, response_last=False, template=self.name)
        try:
            return self._joined(self._cut_turns(messages, system, tools))
        except Rewritten:
            return list(self._pieces(self._render(messages, system, tools, ask=True)))

    def document(self, text: str) -> list[int]:
        """See Renderer."""
        return [*self._head, *self._pieces(text), self.tokenizer.eos_token_id]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See Renderer."""
        return tuple(dict.fromkeys((self.tokenizer.eos_token_id, self._end)))

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files that decides ids."""
        tokens = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return repr((self.name, self._source, self._default_system, sorted(self._variables.items()), tokens))

    def texts(self, example: Example) -> list[str]:
        """The pieces of text that `pairs` will tokenise for this example's answers, for `warm`."""
        pieces: list[str] = []
        for answer in example.answers:
            messages = (*example.prompt, *answer.messages)
            check_order(messages, response_last=True, template=self.name)
            cut = self._cut_turns(messages, example.system, example.tools)
            self._coming[messages, example.system, example.tools] = cut
            pieces += [piece for pair in cut for piece in pair]
        return pieces

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these pieces in one call, and keep how `texts` cut the conversations they come from; what was
        warm before is forgotten."""
        self._pieces.warm(texts)
        self._cuts, self._coming = self._coming, {}

    def _joined(self, cut: Sequence[tuple[str, str]]) -> list[int]:
        return self._pieces.join(piece for pair in cut for piece in pair)

    def _cut(self, messages: Sequence[Message], system: str, tools: str, *, strict: bool) -> Cut:
        """The conversation as (source, response) texts per exchange; as one exchange, the last, where the template
        rewrites earlier turns and that is no error."""
        known = self._cuts.get((tuple(messages), system, tools))
        if known is not None:
            return known
        try:
            return self._cut_turns(messages, system, tools)
        except Rewritten:
            if strict:
                raise
            return self._cut_last(messages, system, tools)

    def _cut_turns(self, messages: Sequence[Message], system: str, tools: str) -> Cut:
        """(source, response) texts per exchange, the last response empty if the model is to speak next."""
        cut: Cut = []
        done = 0
        following = self._render(messages[:1], system, tools, ask=True)
        for i in range(1, len(messages), 2):
            asked = following
            whole, spans = self._render_spans(messages[: i + 1], system, tools)
            self._check_prefix(asked, whole, i, "the prompt is not how the prompt with its response begins")
            self._check_content(messages[i - 1 : i + 1], asked[done:], whole[len(asked) :])
            end = len(whole)
            if i + 1 < len(messages):
                following = self._render(messages[: i + 2], system, tools, ask=True)
                end = self._turn_end(whole, following, i)
            start, stop = self._narrow(spans, len(asked), end, i)
            cut.append((whole[done:start], whole[start:stop]))
            done = stop
        return cut if len(messages) % 2 == 0 else [*cut, (following[done:], "")]

    def _cut_last(self, messages: Sequence[Message], system: str, tools: str) -> Cut:
        last = len(messages) - 1
        asked = self._render(messages[:last], system, tools, ask=True)
        whole, spans = self._render_spans(messages, system, tools)
        self._check_prefix(asked, whole, last, "the prompt is not how the prompt with its response begins")
        start, stop = self._narrow(spans, len(asked), len(whole), last)
        return [(whole[:start], whole[start:stop])]

    def _turn_end(self, whole: str, following: str, turn: int) -> int:
        """Where the turn ends that `whole` ends with; some templates close a conversation with one more eos, which
        is not there when the conversation goes on."""
        shorter = whole.removesuffix(self.tokenizer.eos_token or "")
        if following.startswith(shorter) and not following.startswith(whole):
            return len(shorter)
        self._check_prefix(whole, following, turn, "an earlier turn is rewritten")
        return len(whole)

    def _narrow(self, spans: Sequence[tuple[int, int]], start: int, stop: int, turn: int) -> tuple[int, int]:
        """The trained part of a response: all of it, or what the template's generation block says."""
        if not self._tracks:
            return start, stop
        inside = [span for span in spans if span[1] > start]
        if len(inside) != 1 or inside[0][0] < start:
            raise TemplateError(
                f"the tokenizer's chat template marks {spans} as generated for message {turn + 1}, expected one span "
                f"after character {start}, where the prompt ends. Mend its {{% generation %}} block or set `template`."
            )
        return inside[0][0], min(inside[0][1], stop)

    def _check_prefix(self, short: str, long: str, turn: int, what: str) -> None:
        if long.startswith(short):
            return
        at = next((i for i, (a, b) in enumerate(zip(short, long)) if a != b), min(len(short), len(long)))
        raise Rewritten(
            f"the tokenizer's chat template cannot be trained on message by message: at message {turn + 1} {what}. "
            f"The first difference, at character {at}: {short[at : at + 60]!r} against {long[at : at + 60]!r}, after "
            f"{short[max(0, at - 40) : at]!r}. Set `template` to one of Luthier's, or mask_history: true to train the "
            f"last response only."
        )

    def _check_content(self, turns: Sequence[Message], source: str, response: str) -> None:
        """Nothing may vanish: what tools answered and which tools were called must be in the text."""
        question, answer = turns
        if question.role == "observation" and question.content.strip() not in source:
            escaped = json.dumps(question.content, ensure_ascii=False)[1:-1]
            if escaped not in source:
                raise TemplateError("the tokenizer's chat template leaves out what tools answer. Set `template`.")
        if answer.role == "function":
            _, calls = self._calls(answer)
            missing = [call.name for call in calls if call.name not in response]
            if missing:
                raise TemplateError(
                    f"the tokenizer's chat template leaves out calls of tools ({', '.join(missing)}). Set `template`."
                )

    def _render(self, messages: Sequence[Message], system: str, tools: str, *, ask: bool) -> str:
        return self._apply(messages, system, tools, ask=ask, spans=False)[0]

    def _render_spans(self, messages: Sequence[Message], system: str, tools: str) -> tuple[str, list[tuple[int, int]]]:
        return self._apply(messages, system, tools, ask=False, spans=self._tracks)

    def _apply(
        self, messages: Sequence[Message], system: str, tools: str, *, ask: bool, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        system = system or self._default_system
        conversation = [{"role": "system", "content": system}] if system else []
        conversation += [self._message(message) for message in messages]
        definitions = [wrapped_definition(tool) for tool in read_definitions(tools)] if tools else []
        try:
            rendered, found = render_jinja_template(
                conversations=[conversation],
                tools=definitions or None,
                chat_template=self.tokenizer.get_chat_template(tools=definitions or None),
                add_generation_prompt=ask,
                return_assistant_tokens_mask=spans,
                **self.tokenizer.special_tokens_map,
                **self._variables,
            )
        except (JinjaError, TypeError, AttributeError, ValueError) as error:
            raise TemplateError(f"the tokenizer's chat template cannot render this conversation: {error}") from error
        return rendered[0], (found[0] if spans else [])

    def _message(self, message: Message) -> dict[str, Any]:
        if message.role == "observation":
            return {"role": "tool", "content": message.content}
        if message.role != "function":
            return {"role": message.role, "content": message.content}
        lead, calls = self._calls(message)
        written = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
        return {"role": "assistant", "content": lead, "tool_calls": written}

    def _calls(self, message: Message) -> tuple[str, list[Any]]:
        return read_calls(message.content, ("<think>", "</think>"), ("<tool_call>", "</tool_call>"))

    def _template_variables(self, config: TemplateConfig) -> dict[str, Any]:
        """What is handed to the template beside the messages. A key that cannot act is an error or a warning."""
        useless = [key for key in _NOT_OURS if getattr(config, key) is not None]
        if useless:
            raise ConfigError(
                f"{', '.join(useless)}: the tokenizer's own chat template decides this. Set `template` or leave it out."
            )
        variables: dict[str, Any] = {"date_string": config.date_string}
        if config.enable_thinking is not None:
            variables["enable_thinking"] = config.enable_thinking
        if config.preserve_thinking:
            variables["preserve_thinking"] = True
        for key, off in (("enable_thinking", False), ("preserve_thinking", True)):
            if variables.get(key) is off and key not in self._source:
                log.warning("the tokenizer's chat template knows no %s: it has no effect.", key)
        if "strftime_now" in self._source and "date_string" not in self._source:
            log.warning("the tokenizer's chat template writes today's date: tokens differ from day to day.")
        return variables

    def _end_of_turn(self) -> str:
        """The special token that ends a response, found by rendering one."""
        turns = (Message("user", "ping"), Message("assistant", "pong"))
        whole = self._render(turns, "", "", ask=False)
        added = self.tokenizer.get_added_vocab()
        special = {*self.tokenizer.all_special_tokens, *added}
        tail = whole[whole.rfind("pong") + len("pong") :]
        tokens = self.tokenizer.convert_ids_to_tokens(self._pieces(tail))
        end = next((token for token in tokens if token in special), None)
        if end is None:
            raise TemplateError(
                f"the tokenizer's chat template ends a response with {tail!r}, which holds no special token, so a "
                f"model trained with it would not learn to stop. Set `template` to one of Luthier's."
            )
        return end


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
