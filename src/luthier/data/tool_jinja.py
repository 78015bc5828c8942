"""What the dialects of `luthier/tool_formats/` share of Jinja: how a saved chat template lists tools and writes calls.

A server renders with it, so its text is that of `describe` and `call`. Only expressions write text: servers eat line
breaks that stand after a block.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolJinja:
    """A dialect as Jinja."""

    describe: str
    """Writes what `ToolFormat.describe` gives for `tools`; `date_string` is the day."""
    call: str
    """Writes what `ToolFormat.call` gives for `m['tool_calls']`."""


def quoted(text: str) -> str:
    """A text as Jinja's literal."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def says(text: str) -> str:
    """What writes this text."""
    return f"{{{{ {quoted(text)} }}}}"


def refuses(why: str) -> str:
    """What ends the rendering with an error."""
    return f"{{{{ raise_exception({quoted(why)}) }}}}"


WRAPPED = "{'type': 'function', 'function': tool}"
"""A tool in OpenAI's form."""
ARGUMENTS = "(call['arguments'] if call['arguments'] is string else call['arguments']|tojson)"
"""The arguments of a call as JSON, which some clients send as it is."""
VALUE = "(value if value is string else value|tojson)"
"""An argument where the dialect has no quotes."""


def each_tool(body: str) -> str:
    """What writes `body` for each `tool`, as a function without `{"type": "function"}` around it."""
    bare = "{% set tool = given['function'] if 'function' in given else given %}"
    return f"{{% for given in tools %}}{bare}{body}{{% endfor %}}"


def each_call(body: str, joint: str = "") -> str:
    """What writes `body` for each `call`, with `joint` between them."""
    bare = "{% set call = asked['function'] if 'function' in asked else asked %}"
    between = f"{{% if not loop.first %}}{says(joint)}{{% endif %}}" if joint else ""
    return f"{{% for asked in m['tool_calls'] %}}{bare}{between}{body}{{% endfor %}}"


def each_argument(body: str, joint: str = "") -> str:
    """What writes `body` for the `name` and the `value` of each argument of `call`, with `joint` between them."""
    why = refuses("the arguments of a call must be an object")
    check = f"{{% if call['arguments'] is not mapping %}}{why}{{% endif %}}"
    between = f"{{% if not loop.first %}}{says(joint)}{{% endif %}}" if joint else ""
    return f"{check}{{% for name, value in call['arguments'].items() %}}{between}{body}{{% endfor %}}"


def json_call(key: str = "arguments") -> str:
    """What writes `call` as a JSON object."""
    return f"{{{{ '{{\"name\": ' + call['name']|tojson + ', \"{key}\": ' + {ARGUMENTS} + '}}' }}}}"


WRAPPED_LINES = each_tool("{{ '\\n' + " + WRAPPED + "|tojson }}")
"""What writes `tool_text.describe_wrapped`'s lines."""
TAGGED_CALLS = each_call(says("<tool_call>\n") + json_call() + says("\n</tool_call>"), joint="\n")
"""What writes `tool_text.write_tagged`."""
