"""A `Template` as the Jinja text that tokenizers carry, so that a saved model is served as it was trained.

What a server renders with it for messages, tools and calls is what `SlotRenderer.prompt` builds. A server may say
`enable_thinking`, `preserve_thinking` and `date_string`; unsaid, they are those of the training run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from luthier.core.log import get_logger
from luthier.data.reasoning import Reasoning
from luthier.data.template import BOS, EOS, Parts, Special, Template, Token
from luthier.data.tool_jinja import quoted, refuses, says
from luthier.data.tools import tool_format

log = get_logger("data.jinja")

Write = Callable[[Parts, str], str]
"""Slots, and the variable that holds their content, as a Jinja expression."""
_PROBE = [{"role": role, "content": content} for role, content in (("user", "ping"), ("assistant", "pong"))]
_NO_PLACE = "{{ raise_exception('this chat template has no place for a message of role ' + m['role']) }}"


def to_jinja(template: Template, tokenizer: Any, reasoning: Reasoning | None, date: str) -> str:
    """The template for system, user, assistant and tool messages, with tools and their calls. Where the dialect of
    tools has no Jinja, the text raises an error when it is given tools or calls."""
    values = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token or ""}

    def write(slots: Parts, content: str) -> str:
        return _expression(slots, values, content)

    opening = write(template.slots("opening"), "")
    empty = "" if reasoning is None else f"{{% if not (thinking is true) %}}{says(reasoning.empty)}{{% endif %}}"
    return (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
        f"{{% set system = system or {quoted(template.default_system)} %}}"
        f"{_thoughts(reasoning)}{_tools(template, date)}"
        f"{{{{ {write(template.slots('prefix'), '')} }}}}{_system(template, write)}"
        "{% set ns = namespace(said=0, results='') %}"
        f"{{% for m in turns %}}{{% set content = m['content'] or '' %}}{_first(template, write)}"
        f"{{% if m['role'] == 'user' %}}{{{{ {write(template.without_opening('user'), 'content')} }}}}"
        f"{{% elif m['role'] == 'assistant' %}}{_response(template, reasoning, write)}"
        f"{{% elif m['role'] == 'tool' %}}{_results(template, write)}"
        f"{{% {_system_between(template, write)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{empty}{{% endif %}}"
    )


def _system(template: Template, write: Write) -> str:
    """The system prompt where it stands apart."""
    written = write(template.slots("system"), "system")
    return "" if template.fuse_system else f"{{% if system %}}{{{{ {written} }}}}{{% endif %}}"


def _first(template: Template, write: Write) -> str:
    """The system prompt where it stands inside the first message, which must be the user's."""
    if not template.fuse_system:
        return ""
    why = "this chat template puts the system prompt into a user message, which must come first"
    return (
        f"{{% if loop.first and system %}}{{% if m['role'] != 'user' %}}{refuses(why)}{{% endif %}}"
        f"{{% set content = ({write(template.slots('system'), 'system')}) + content %}}{{% endif %}}"
    )


def _system_between(template: Template, write: Write) -> str:
    """What becomes of roles that are none of user, assistant and tool; without the opening of its block."""
    if template.fuse_system:
        return f"else %}}{_NO_PLACE}"
    between = write(template.slots("system"), "content")
    return f"elif m['role'] == 'system' %}}{{{{ {between} }}}}{{% else %}}{_NO_PLACE}"


def _tools(template: Template, date: str) -> str:
    """The list of tools, as a part of the system prompt."""
    dialect = tool_format(template.tool_format)
    if dialect.JINJA is None:
        return f"{{% if tools %}}{_unknown(template)}{{% endif %}}"
    bare = ".lstrip('\\n') if not system else described" if template.trim_tools else ""
    return (
        f"{{% if tools %}}{{% set date_string = date_string if date_string is defined else {quoted(date)} %}}"
        f"{{% set described %}}{dialect.JINJA.describe}{{% endset %}}"
        f"{{% set system = system + (described{bare}) %}}{{% endif %}}"
    )


def _unknown(template: Template) -> str:
    return refuses(
        f"this chat template cannot write tools: their dialect, {template.tool_format}, is not put into Jinja. "
        "Serve with a chat template of the maker of the model"
    )


def _thoughts(reasoning: Reasoning | None) -> str:
    """The rules of thoughts, and what takes them out of a text."""
    if reasoning is None:
        return ""
    before, after = map(quoted, reasoning.words)
    spoken = {True: "true", False: "false", None: "none"}
    return (
        f"{{% set thinking = enable_thinking if enable_thinking is defined else {spoken[reasoning.enable]} %}}"
        f"{{% set keep = preserve_thinking if preserve_thinking is defined else {spoken[reasoning.preserve]} %}}"
        f"{{% macro without_thoughts(text) %}}{{% for part in text.split({after}) %}}"
        f"{{{{ part if loop.last else part.split({before})[0] if {before} in part else part + {after} }}}}"
        "{% endfor %}{% endmacro %}"
    )


def _response(template: Template, reasoning: Reasoning | None, write: Write) -> str:
    """A turn of the model: its thought by the rules, its text, its calls."""
    text, calls = (write(template.slots(role), "content") for role in ("assistant", "function"))
    opening = write(template.slots("opening"), "")
    return (
        f"{{% set ns.said = ns.said + 1 %}}{_thought(reasoning)}{{{{ {opening} }}}}"
        f"{_empty_thought(reasoning)}"
        f"{{% if m['tool_calls'] %}}{_calls(template)}{{{{ {calls} }}}}{{% else %}}{{{{ {text} }}}}{{% endif %}}"
    )


def _thought(reasoning: Reasoning | None) -> str:
    """Thoughts leave history, and every turn where thinking is off; one that comes apart from the text joins it."""
    if reasoning is None:
        return ""
    before, after = map(quoted, reasoning.words)
    return (
        "{% if m['reasoning_content'] %}"
        f"{{% set content = {before} + m['reasoning_content'] + {after} + content %}}{{% endif %}}"
        "{% if thinking is false or not (keep or loop.last) %}"
        "{% set content = without_thoughts(content).lstrip('\\n') %}{% endif %}"
    )


def _empty_thought(reasoning: Reasoning | None) -> str:
    """What history that keeps its thoughts writes where there was none."""
    if reasoning is None:
        return ""
    thinks = " or ".join(f"{quoted(word.strip())} in content" for word in reasoning.words)
    return f"{{% if keep and not loop.last and not ({thinks}) %}}{says(reasoning.empty)}{{% endif %}}"


def _calls(template: Template) -> str:
    """The calls of a turn, after its text."""
    dialect = tool_format(template.tool_format)
    if dialect.JINJA is None:
        return _unknown(template)
    joint = ""
    if dialect.JOINT:
        joint = f"{{% if content and not content[-1].isspace() %}}{says(dialect.JOINT)}{{% endif %}}"
    return (
        "{% set content = content if content.strip() else '' %}"
        f"{{% set content %}}{{{{ content }}}}{joint}{dialect.JINJA.call}{{% endset %}}"
    )


def _results(template: Template, write: Write) -> str:
    """What a tool answered; the answers of several in a row are one turn where the template joins them."""
    tool = f"{{{{ {write(template.without_opening('observation'), 'content')} }}}}"
    if template.joint is None:
        return tool
    return (
        "{% if loop.index0 and turns[loop.index0 - 1]['role'] == 'tool' %}"
        f"{{% set ns.results = ns.results + {quoted(template.joint)} + content %}}"
        "{% else %}{% set ns.results = content %}{% endif %}"
        "{% if loop.last or turns[loop.index0 + 1]['role'] != 'tool' %}"
        f"{{% set content = ns.results %}}{tool}{{% endif %}}"
    )


def settle_chat_template(template: Template, tokenizer: Any, reasoning: Reasoning | None, date: str, name: str) -> None:
    """Give the tokenizer this template if it has none of its own, or if the template is one that no model's maker
    ships; warn where its own writes a conversation otherwise, for servers will use that."""
    written = to_jinja(template, tokenizer, reasoning, date)
    if tokenizer.chat_template is None or template.replace_chat_template:
        tokenizer.chat_template = written
        return
    from jinja2 import TemplateError as JinjaError

    try:
        theirs = tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except (JinjaError, TypeError, ValueError) as error:  # training does not depend on a foreign template
        log.warning("the tokenizer's own chat template cannot render a conversation (%s); it is saved as it is.", error)
        return
    ours = tokenizer.apply_chat_template(_PROBE, tokenize=False, chat_template=written)
    if reasoning is not None:
        ours, theirs = reasoning.strip(ours), reasoning.strip(theirs)
    if ours.strip() != theirs.strip():
        log.warning(
            "template %r writes %r where the tokenizer's own chat template, which servers use, writes %r. "
            "Leave `template` out to train with the tokenizer's own.",
            name,
            ours,
            theirs,
        )


def _expression(slots: Parts, values: dict[Special, str], content: str) -> str:
    """Slots as a Jinja expression that joins strings."""
    names = {"{{content}}": content, "{{idx}}": "ns.said|string"}
    parts: list[str] = []
    for slot in slots:
        text = slot.text if isinstance(slot, Token) else values[slot] if isinstance(slot, Special) else slot
        pieces = re.split(r"(\{\{(?:content|idx)\}\})", text)
        parts += [names.get(piece) or quoted(piece) for piece in pieces if piece]
    return " + ".join(parts) or "''"
