"""Does a named template write what the tokenizer's own chat template writes? Servers use the latter."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luthier.core.errors import LuthierError, TemplateError
from luthier.core.objective import Renderer
from luthier.core.prefix import common_prefix
from luthier.core.types import Message
from luthier.data.chat_template import ChatTemplateRenderer
from luthier.data.chat_text import THOUGHT
from luthier.data.renderer import make_renderer
from luthier.data.template import AUTO, TemplateConfig, find_template

SHOWN = 12
"""Tokens that are shown before and after a difference."""

_TALK = (
    Message("user", "What is 1 + 1?"),
    Message("assistant", "It is 2."),
    Message("user", "And 2 + 2?"),
    Message("assistant", "It is 4."),
)
_TOOLS = [
    {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    }
]
_CALLING = (
    _TALK[0],
    Message("function", json.dumps({"name": "add", "arguments": {"a": 1, "b": 1}})),
    Message("observation", "2"),
    _TALK[1],
)


@dataclass(frozen=True)
class _Case:
    words: str
    talk: tuple[Message, ...]
    given: Mapping[str, str]
    """System prompt and tools."""
    own_talk: tuple[Message, ...]
    """The conversation as the tokenizer's own chat template is to be told it."""


def compare(config: TemplateConfig, tokenizer: Any) -> list[str]:
    """A line for each kind of conversation that the template of the configuration writes otherwise than the
    tokenizer's own chat template, with the first difference; one line if there is none, none if there is nothing to
    compare. tokenizer: as it was loaded; it is left as it is."""
    if config.template in (None, AUTO) or not tokenizer.chat_template:
        return []
    own_config = replace(config, template=None, tool_format=None, efficient_eos=None, replace_eos=None)
    named = make_renderer(config, copy.deepcopy(tokenizer))
    try:
        own = ChatTemplateRenderer(own_config, copy.deepcopy(tokenizer))
    except TemplateError as error:
        return [f"template {config.template!r} cannot be compared with the tokenizer's own: {error}"]
    cases = _cases(config)
    found = [line for case in cases for line in _compare(str(config.template), case, named, own)]
    if any("the tokenizer's own" in line for line in found):
        found.append("Servers use the tokenizer's own; `template: auto` trains with it.")
    looked_at = ", ".join(case.words for case in cases)
    same = f"template {config.template!r} writes what the tokenizer's own chat template writes ({looked_at})"
    return found or [same]


def _cases(config: TemplateConfig) -> list[_Case]:
    assert config.template is not None
    brief = {"system": "Be brief."}
    cases = [
        _Case("a conversation", _TALK, {}, _TALK),
        _Case("a system prompt", _TALK[:2], brief, _TALK[:2]),
        _Case("a call of a tool", _CALLING, brief | {"tools": json.dumps(_TOOLS)}, _CALLING),
    ]
    template = find_template(config.template)
    if template.reasoning and config.enable_thinking is not False:
        cases.append(_Case("a thought", _thinking(template.thought_words), {}, _thinking(THOUGHT)))
    return cases


def _thinking(words: tuple[str, str]) -> tuple[Message, ...]:
    """A response with a thought between these words."""
    return _TALK[0], Message("assistant", "Simple.".join(words) + _TALK[1].content)


def _compare(name: str, case: _Case, named: Renderer, own: Renderer) -> list[str]:
    words = case.words
    try:
        ours, said = named.oneturn(case.talk, **case.given)
    except LuthierError as error:
        return [f"{words}: template {name!r} cannot write it: {error}"]
    try:
        theirs, own_said = own.oneturn(case.own_talk, **case.given)
    except LuthierError as error:
        return [f"{words}: only template {name!r} can write it ({error})"]
    if named.efficient_eos:
        said = [*said, named.tokenizer.eos_token_id]
    if own.efficient_eos:
        own_said = [*own_said, own.tokenizer.eos_token_id]
    left, right = ours + said, theirs + own_said
    if left == right and len(ours) == len(theirs):
        return []
    if left[: len(right)] == right or right[: len(left)] == left:  # what follows the last trained token is not kept
        return [f"{words}: the same tokens, but {_trained(name, said, own_said, named.tokenizer)}"]
    return [f"{words}: {_difference(name, left, right, named.tokenizer)}"]


def _trained(name: str, ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    return f"template {name!r} trains {_shown(tokenizer, ours)}, the tokenizer's own {_shown(tokenizer, theirs)}"


def _difference(name: str, left: Sequence[int], right: Sequence[int], tokenizer: Any) -> str:
    at = common_prefix(left, right)
    before, ours, theirs = left[max(0, at - SHOWN) : at], left[at : at + SHOWN], right[at : at + SHOWN]
    where = f"after {_shown(tokenizer, before)}" if before else "the first"
    return (
        f"template {name!r} and the tokenizer's own chat template differ from token {at + 1} on, {where}: "
        f"{_shown(tokenizer, ours)} {list(ours[:3])} against {_shown(tokenizer, theirs)} {list(theirs[:3])}"
    )


def _shown(tokenizer: Any, ids: Sequence[int]) -> str:
    return (
        repr(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else "the end"
    )
