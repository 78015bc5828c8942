"""What the dialects of `luthier/tool_formats/` share: values as text and back, and finding calls in a reply."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Call
from luthier.data.tools import Definition, Parsed, wrapped_definition

_BLANKS = re.compile(r"\s*")


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON with the blanks of Python's json module, letters as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def as_value(value: Any) -> str:
    """An argument where the dialect has no quotes: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else as_json(value)


def from_value(text: str, schema: Any) -> Any:
    """The inverse of `as_value`; `schema` (of JSON Schema, or None) decides what looks like a number and is a text."""
    if isinstance(schema, dict) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parameters(tools: Sequence[Definition], name: str) -> dict[str, Any]:
    """The schemas of a tool's parameters by name; empty if nothing is known."""
    found = next((tool.get("parameters") for tool in tools if tool["name"] == name), None)
    known = found.get("properties") if isinstance(found, dict) else None
    return known if isinstance(known, dict) else {}


def schema_of(tool: Definition) -> dict[str, Any]:
    """The JSON Schema of a tool's parameters, empty if there is none; TemplateError if it is no schema, for dialects
    that put it into words of their own."""
    schema = tool.get("parameters") or {}
    _check_schema(schema, tool["name"])
    return schema


def _check_schema(schema: Any, tool: str) -> None:
    known = schema if isinstance(schema, dict) else {}
    inner, required = known.get("properties") or {}, known.get("required") or []
    names = isinstance(required, list) and all(isinstance(name, str) for name in required)
    if not (isinstance(schema, dict) and isinstance(inner, dict) and names):
        raise TemplateError(f"the parameters of tool {tool!r} are no JSON Schema: {json.dumps(schema)[:120]}.")
    for part in (*inner.values(), *([known["items"]] if known.get("items") else [])):
        _check_schema(part, tool)


def call_of(value: Any, key: str = "arguments") -> Call | None:
    """A JSON object with a name and arguments as a call, None if it is something else."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or key not in value:
        return None
    return Call(value["name"], value[key])


def as_dict(call: Call, key: str = "arguments") -> dict[str, Any]:
    """The inverse of `call_of`."""
    return {"name": call.name, key: call.arguments}


def json_calls(text: str, key: str = "arguments") -> list[Call] | None:
    """Calls from a text that is nothing but JSON: one object or a list of them; None if it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    calls = [call_of(value, key) for value in (found if isinstance(found, list) else [found])]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def json_blocks(text: str, opening: str, closing: str) -> Iterator[tuple[int, int, Any]]:
    """(start, stop, value) of each JSON value between these words; the words may stand inside its strings."""
    at = 0
    while (start := text.find(opening, at)) >= 0:
        at = start + len(opening)
        found = leading_json(text, at)
        if found is None:
            continue
        value, end = found
        end = _after_blanks(text, end)
        if text.startswith(closing, end):
            at = end + len(closing)
            yield start, at, value


def leading_json(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON value that stands at `start`, after blanks, and where it ends; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text, _after_blanks(text, start))
    except (ValueError, RecursionError):
        return None


def _after_blanks(text: str, start: int) -> int:
    found = _BLANKS.match(text, start)
    assert found is not None
    return found.end()


def outside(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these spans; blanks between and after them go with them."""
    if not spans:
        return text
    starts = [*(start for start, _ in spans[1:]), len(text)]
    after = [text[stop:start] for (_, stop), start in zip(spans, starts)]
    return text[: spans[0][0]] + "".join(piece for piece in after if piece.strip())


def named(call: Call) -> Mapping[str, Any]:
    """The arguments of a call by name; TemplateError if they are no object, for dialects that write names."""
    if not isinstance(call.arguments, Mapping):
        raise TemplateError(f"the arguments of a call of {call.name!r} are {call.arguments!r}, expected an object.")
    return call.arguments


def typed(pairs: Sequence[tuple[str, str]], tools: Sequence[Definition], name: str) -> dict[str, Any]:
    """Arguments of this tool from their texts."""
    known = parameters(tools, name)
    return {key: from_value(text, known.get(key)) for key, text in pairs}


def read_matches(
    text: str, found: Sequence[re.Match[str]], argument: re.Pattern[str], tools: Sequence[Definition]
) -> Parsed:
    """A reply whose calls stand at `found`, each with its name and its arguments as groups 1 and 2; `argument` finds
    the name and the text of each of these."""
    calls = [Call(call[1], typed(argument.findall(call[2]), tools, call[1])) for call in found]
    return outside(text, [call.span() for call in found]), calls


def describe_wrapped(before: str, tools: Sequence[Definition], after: str) -> str:
    """Tools in OpenAI's form, one a line, between two texts."""
    return before + "".join("\n" + as_json(wrapped_definition(tool)) for tool in tools) + after


def write_tagged(calls: Sequence[Call]) -> str:
    """Calls as JSON objects, each in `<tool_call>` tags."""
    return "\n".join(f"<tool_call>\n{as_json(as_dict(call))}\n</tool_call>" for call in calls)


def read_tagged(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """The inverse of `write_tagged`, whatever stands around the calls. JSON needs no `tools` to tell what is a text."""
    found = [(start, stop, call_of(value)) for start, stop, value in json_blocks(text, "<tool_call>", "</tool_call>")]
    read = [(start, stop, call) for start, stop, call in found if call is not None]
    return outside(text, [(start, stop) for start, stop, _ in read]), [call for _, _, call in read]
