"""A `Template` as the Jinja text that tokenizers carry, so that a saved model is served as it was trained."""

from __future__ import annotations

import re
from typing import Any

from luthier.core.log import get_logger
from luthier.data.reasoning import Reasoning
from luthier.data.template import BOS, EOS, Parts, Special, Template, Token

log = get_logger("data.jinja")

_OTHERWISE = "{% elif m['role'] == 'system' %}"
_PROBE = [{"role": role, "content": content} for role, content in (("user", "ping"), ("assistant", "pong"))]


def to_jinja(template: Template, tokenizer: Any, reasoning: Reasoning | None) -> str:
    """The template for system, user, assistant and tool messages; definitions and calls of tools it cannot write."""
    values = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token or ""}

    def write(slots: Parts, content: str) -> str:
        return _expression(slots, values, content)

    prefix, system = write(template.slots("prefix"), ""), write(template.slots("system"), "system")
    assistant, opening = write(template.slots("assistant"), "content"), write(template.slots("opening"), "")
    user, tool = (write(template.without_opening(role), "content") for role in ("user", "observation"))
    fused = f"{{% if loop.first and system %}}{{% set content = ({system}) + content %}}{{% endif %}}"
    apart = f"{{% if system %}}{{{{ {system} }}}}{{% endif %}}"
    between = f"{{{{ {write(template.slots('system'), 'content')} }}}}"
    asked = "" if reasoning is None or reasoning.trains_empty else reasoning.empty
    return (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
        f"{{% set system = system or {_quoted(template.default_system)} %}}{{{{ {prefix} }}}}"
        f"{'' if template.fuse_system else apart}"
        "{% for m in turns %}{% set idx = loop.index0 // 2 %}{% set content = m['content'] %}"
        f"{{% if m['role'] == 'user' %}}{fused if template.fuse_system else ''}{{{{ {user} }}}}"
        f"{{% elif m['role'] == 'assistant' %}}{{{{ {opening} }}}}{{{{ {assistant} }}}}"
        f"{{% elif m['role'] == 'tool' %}}{{{{ {tool} }}}}"
        f"{'' if template.fuse_system else _OTHERWISE + between}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {opening} }}}}{{{{ {_quoted(asked)} }}}}{{% endif %}}"
    )


def settle_chat_template(template: Template, tokenizer: Any, reasoning: Reasoning | None, name: str) -> None:
    """Give the tokenizer this template if it has none of its own, or if the template is one that no model's maker
    ships; warn where its own writes a conversation otherwise, for servers will use that."""
    written = to_jinja(template, tokenizer, reasoning)
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
    names = {"{{content}}": content, "{{idx}}": "idx|string"}
    parts: list[str] = []
    for slot in slots:
        text = slot.text if isinstance(slot, Token) else values[slot] if isinstance(slot, Special) else slot
        pieces = re.split(r"(\{\{(?:content|idx)\}\})", text)
        parts += [names.get(piece) or _quoted(piece) for piece in pieces if piece]
    return " + ".join(parts) or "''"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
