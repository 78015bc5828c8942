"""Messages to ids by the tokenizer's own chat template, for `template` unset or auto.

What is trained is found exactly, by rendering beginnings of the conversation: the template rendered up to a response,
with its generation prompt, must be how the rendering with the response begins. The response is the difference, with
the end-of-turn marker the template writes. Templates with `{% generation %}` blocks narrow it to those blocks.

Where the next prompt goes on where the response ends, the sequence goes on. Where the template shows an earlier turn
otherwise once the conversation goes on (thoughts vanish, the system prompt wanders), the next turn is a branch of its
own, with the history as the model will then see it: every response is trained exactly as it is generated. A template
whose generation prompt is not how its own response begins is refused with the first difference.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.log import get_logger
from luthier.core.prefix import common_prefix
from luthier.core.registry import names
from luthier.core.types import Call, Example, Message, Reply
from luthier.data.chat_text import THOUGHT, ChatText, Spans
from luthier.data.pieces import Pieces
from luthier.data.template import TemplateConfig
from luthier.data.tools import read_definitions, read_reply, tool_format
from luthier.data.turns import check_ends, responses
from luthier.data.vocabulary import document_head, settle, token_id

log = get_logger("data.chat_template")

_PROBED = Call("ping", {"text": "pong", "count": 1})
"""What is asked of a template to see how it writes calls."""

Conversation = tuple[tuple[Message, ...], str, str]
"""Messages, system prompt, tools."""
Branch = list[tuple[str, str]]
"""(source, response) texts."""
Given = tuple[str, str]
"""System prompt, tools."""
Ids = list[int]


class Rewritten(TemplateError):
    """The chat template renders the beginning of a conversation otherwise when the conversation goes on."""


class ChatTemplateRenderer:
    """The tokenizer's chat template. See `core/objective.py:Renderer`.

    The tokenizer is changed where something is missing: pad becomes eos, and eos the template's end-of-turn marker.
    A template that ends a response with nothing leaves it to the stage to put eos there (`efficient_eos`). Raises
    TemplateError if there is no chat template or if nothing it writes could end a response."""

    name = "chat_template"

    def __init__(
        self, config: TemplateConfig, tokenizer: Any, *, text: ChatText | None = None, pieces: Pieces | None = None
    ):
        """text, pieces: what renders and what tokenises, where it is more than the tokenizer."""
        self.tokenizer = tokenizer
        self._text = text or ChatText(config, tokenizer)
        self._pieces = pieces or Pieces(tokenizer)
        end = self._end_of_turn()
        self._end_text = end
        self.efficient_eos = end is None
        settle(tokenizer, eos=end if tokenizer.eos_token is None else None, special=(end,) if end is not None else ())
        self._end = tokenizer.eos_token_id if end is None else token_id(tokenizer, end)
        self._call_end = self._end_of_call()
        self._head = document_head(tokenizer)
        self._known: dict[Conversation, list[Branch]] = {}
        self._coming: dict[Conversation, list[Branch]] = {}

    def pairs(
        self, messages: Sequence[Message], *, system: str = "", tools: str = "", mask_history: bool = False
    ) -> list[tuple[Ids, Ids]]:
        """See Renderer. With `mask_history` a template that rewrites earlier turns is no error: the pairs then are
        those of the last branch."""
        check_ends(messages, response_last=True, template=self.name)
        if mask_history:
            return self._ids(self._last(messages, system, tools))
        branches = self._branches(messages, system, tools)
        if len(branches) > 1:
            raise Rewritten(self._rewritten(messages, system, tools, sum(map(len, branches[:-1]))))
        return self._ids(branches[-1])

    def branches(
        self, messages: Sequence[Message], *, system: str = "", tools: str = ""
    ) -> list[list[tuple[Ids, Ids]]]:
        """See Renderer."""
        check_ends(messages, response_last=True, template=self.name)
        return [self._ids(branch) for branch in self._branches(messages, system, tools)]

    def oneturn(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> tuple[Ids, Ids]:
        """See Renderer."""
        check_ends(messages, response_last=True, template=self.name)
        *earlier, last = self._ids(self._last(messages, system, tools))
        return [token for pair in earlier for part in pair for token in part] + last[0], last[1]

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> Ids:
        """See Renderer."""
        check_ends(messages, response_last=False, template=self.name)
        try:
            last = self._cut(messages, system, tools)[-1]
        except TemplateError:  # an earlier turn could not be trained on, which is no matter here
            asked = self._text.asked(messages, system, tools)
            self._text.check_prompt(messages, system, tools, asked)
            last = [(asked, "")]
        return self._pieces.join(piece for pair in last for piece in pair)

    def unserved(self, messages: Sequence[Message]) -> bool:
        """See Renderer. What the template shows otherwise later is a branch."""
        return False

    def document(self, text: str) -> Ids:
        """See Renderer."""
        return [*self._head, *self._pieces(text), self.tokenizer.eos_token_id]

    def reply(self, text: str, *, tools: str = "") -> Reply:
        """See Renderer. The dialect is the one whose reader understands what the template writes."""
        definitions = read_definitions(tools) if tools else []
        return read_reply(text, tool_format(self._dialect()), THOUGHT, definitions)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """See Renderer."""
        ends = (self.tokenizer.eos_token_id, self._end, self._call_end)
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files that decides ids."""
        tokens = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token)
        return repr((self.name, self._text.fingerprint(), tokens))

    def texts(self, example: Example) -> list[str]:
        """The pieces of text that will be tokenised for this example's answers, for `warm`."""
        pieces: list[str] = []
        for answer in example.answers:
            messages = (*example.prompt, *answer.messages)
            check_ends(messages, response_last=True, template=self.name)
            branches = self._cut(messages, example.system, example.tools)
            self._coming[messages, example.system, example.tools] = branches
            pieces += [piece for branch in branches for pair in branch for piece in pair]
        return pieces

    def warm(self, texts: Sequence[str]) -> None:
        """Tokenise these pieces in one call, and keep how `texts` cut the conversations they come from; what was
        warm before is forgotten."""
        self._pieces.warm(texts)
        self._known, self._coming = self._coming, {}

    def _ids(self, branch: Branch) -> list[tuple[Ids, Ids]]:
        return [(self._pieces(source), self._pieces(response)) for source, response in branch]

    def _branches(self, messages: Sequence[Message], system: str, tools: str) -> list[Branch]:
        known = self._known.get((tuple(messages), system, tools))
        return self._cut(messages, system, tools) if known is None else known

    def _last(self, messages: Sequence[Message], system: str, tools: str) -> Branch:
        """The branch of the last response; alone with all of its history where an earlier turn cannot be trained on."""
        try:
            return self._branches(messages, system, tools)[-1]
        except TemplateError:
            asked = self._text.asked(messages[:-1], system, tools)
            self._text.check_prompt(messages[:-1], system, tools, asked)
            whole, (start, stop) = self._spoken(messages, system, tools, asked)
            return [(whole[:start], whole[start:stop])]

    def _spoken(self, messages: Sequence[Message], system: str, tools: str, asked: str) -> tuple[str, tuple[int, int]]:
        """A conversation that ends with a response, and what is trained of that."""
        whole, spans = self._text.whole(messages, system, tools)
        self._check_own(asked, whole, len(messages) - 1)
        self._text.check_response(messages[-1], whole[len(asked) :])
        return whole, self._narrow(spans, messages[:-1], (system, tools), asked, len(whole))

    def _cut(self, messages: Sequence[Message], system: str, tools: str) -> list[Branch]:
        """The conversation as branches of exchanges, the last response empty if the model is to speak next."""
        branches: list[Branch] = []
        path, done, open_end = "", 0, (0, 0)
        spoken = responses(messages)
        for place in [*spoken, *([] if spoken and spoken[-1] == len(messages) - 1 else [len(messages)])]:
            asked = self._text.asked(messages[:place], system, tools)
            end = self._goes_on(path, open_end[0], asked) if branches else None
            self._text.check_prompt(messages[:place], system, tools if end is None else "", asked)
            if end is None:
                branches.append([])
                done = 0
            else:
                start, stop = open_end
                stop = min(stop, end)
                source, _ = branches[-1].pop()
                branches[-1].append((source, path[start:stop]))
                done = stop
            if place == len(messages):
                branches[-1].append((asked[done:], ""))
                break
            path, open_end = self._spoken(messages[: place + 1], system, tools, asked)
            start, stop = open_end
            branches[-1].append((path[done:start], path[start:stop]))
        return branches

    def _goes_on(self, path: str, start: int, asked: str) -> int | None:
        """Where the turn that `path` ends with, spoken from `start` on, ends in the next prompt; None if that shows it
        otherwise. Some templates close a conversation with one more eos, which is not there when it goes on."""
        if asked.startswith(path):
            return len(path)
        shorter = path.removesuffix(self.tokenizer.eos_token or "")
        ended = self._end_text and self._end_text in shorter[start:]
        return len(shorter) if ended and asked.startswith(shorter) else None

    def _narrow(
        self, spans: Spans, messages: Sequence[Message], given: Given, asked: str, stop: int
    ) -> tuple[int, int]:
        """The trained part of a response: all of it, or what the template's generation blocks say."""
        start = len(asked)
        if not self._text.tracks:
            return start, stop
        inside = [span for span in spans if span[1] > start]
        joined = all(left[1] == right[0] for left, right in zip(inside, inside[1:]))
        if not inside or not joined or inside[0][0] < self._opening(inside, messages, given, asked):
            raise TemplateError(
                f"the tokenizer's chat template marks {spans} as generated for message {len(messages) + 1}, expected "
                f"one span after character {start}, where the prompt ends. Mend its {{% generation %}} block or set "
                f"`template`."
            )
        return max(inside[0][0], start), min(inside[-1][1], stop)

    def _opening(self, inside: Spans, messages: Sequence[Message], given: Given, asked: str) -> int:
        """Where what opens a response begins, which a block may hold too: the end of the turns before it."""
        if inside[0][0] >= len(asked):
            return len(asked)
        past, _ = self._text.whole(messages, *given)
        return common_prefix(past, asked)

    def _check_own(self, asked: str, whole: str, turn: int) -> None:
        if not whole.startswith(asked):
            raise Rewritten(
                f"the tokenizer's chat template cannot be trained on: at message {turn + 1} what the model is given is "
                f"not how the conversation with its response begins. {_difference(asked, whole)} Set `template` to "
                f"one of Luthier's{self._text.hint}."
            )

    def _rewritten(self, messages: Sequence[Message], system: str, tools: str, kept: int) -> str:
        """What is told where one sequence is wanted and the template has none; kept: exchanges of earlier branches."""
        places = responses(messages)
        before, _ = self._text.whole(messages[: places[kept - 1] + 1], system, tools)
        after = self._text.asked(messages[: places[kept]], system, tools)
        return (
            f"the tokenizer's chat template cannot be trained on as one sequence: once message {places[kept]} is "
            f"there, an earlier turn is rewritten. {_difference(before, after)} Set `template` to one of Luthier's, or "
            f"mask_history: true to train the last response only."
        )

    def _end_of_turn(self) -> str | None:
        """The special token that ends a response, found by rendering one; None if nothing at all ends it."""
        turns = (Message("user", "ping"), Message("assistant", "pong"))
        whole, _ = self._text.whole(turns, "", "")
        added = self.tokenizer.get_added_vocab()
        special = {*self.tokenizer.all_special_tokens, *added}
        tail = whole[whole.rfind("pong") + len("pong") :]
        tokens = self.tokenizer.convert_ids_to_tokens(self._pieces(tail))
        end = next((token for token in tokens if token in special), None)
        if end is None and (tail.strip() or self.tokenizer.eos_token is None):
            raise TemplateError(
                f"the tokenizer's chat template ends a response with {tail!r}, which holds no special token, so a "
                f"model trained with it would not learn to stop. Set `template` to one of Luthier's."
            )
        return end

    def _probe(self) -> str:
        """How the template writes a call of a tool; empty if it cannot."""
        talk = (
            Message("user", "ping"),
            Message("function", json.dumps({"name": _PROBED.name, "arguments": _PROBED.arguments})),
        )
        try:
            whole, _ = self._text.whole(talk, "", "")
            return whole[len(self._text.asked(talk[:1], "", "")) :]
        except TemplateError:
            return ""

    def _end_of_call(self) -> int | None:
        """The special token that ends a call of a tool, which may be another than that of a text."""
        ids = self._pieces(self._probe().rstrip())
        special = {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()}
        return ids[-1] if ids and self.tokenizer.convert_ids_to_tokens(ids[-1]) in special else None

    def _dialect(self) -> str:
        """The tool format that reads the template's own calls; default if none does."""
        said = self._probe().rstrip().removesuffix(self._end_text or "")
        return next(
            (name for name in names("tool_formats") if tool_format(name).parse(said)[1] == [_PROBED]), "default"
        )


def _difference(short: str, long: str) -> str:
    at = common_prefix(short, long)
    return (
        f"The first difference, at character {at}: {short[at : at + 60]!r} against {long[at : at + 60]!r}, after "
        f"{short[max(0, at - 40) : at]!r}."
    )
