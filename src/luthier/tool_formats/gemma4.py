"""Gemma 4: objects without quotes around keys; texts stand between `<|"|>`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luthier.core.errors import TemplateError
from luthier.core.types import Call
from luthier.data.tool_text import named, outside, schema_of
from luthier.data.tools import Definition, Parsed

JOINT = ""
JINJA = None  # Gemma's own chat template has it; ours would need a schema written by recursion
_QUOTE = '<|"|>'
_CALL = re.compile(r"<\|tool_call>call:([^{\s]+)(?=\{)")
_END = "<tool_call|>"
_BARE = re.compile(r"[^,:{}\[\]<\s]+")
_STANDARD = ("description", "type", "properties", "required", "nullable")
"""What JSON Schema says of an object beside naming its parameters."""


def describe(tools: Sequence[Definition], date: str) -> str:
    """See ToolFormat."""
    return "".join(f"<|tool>{_declaration(tool)}<tool|>" for tool in tools)


def _declaration(tool: Definition) -> str:
    parts = [f"description:{_text(str(tool.get('description') or ''))}"]
    schema = schema_of(tool)
    if schema:
        parts.append(f"parameters:{{{','.join(_object(schema))}}}")
    return f"declaration:{tool['name']}{{{','.join(parts)}}}"


def _object(schema: Mapping[str, Any]) -> Iterator[str]:
    if schema.get("properties"):
        yield f"properties:{{{_properties(schema['properties'])}}}"
    if schema.get("required"):
        yield f"required:[{','.join(map(_text, schema['required']))}]"
    if schema.get("type"):
        yield f"type:{_text(str(schema['type']).upper())}"


def _properties(properties: Mapping[str, Any]) -> str:
    return ",".join(f"{name}:{{{','.join(_property(properties[name]))}}}" for name in _sorted(properties))


def _property(schema: Any) -> Iterator[str]:
    schema = schema if isinstance(schema, Mapping) else {}  # `additionalProperties: false` beside no properties
    kind = str(schema.get("type", "")).upper()
    if schema.get("description"):
        yield f"description:{_text(str(schema['description']))}"
    if kind == "STRING" and schema.get("enum"):
        yield f"enum:{_written(schema['enum'])}"
    if kind == "ARRAY" and isinstance(schema.get("items"), Mapping) and schema["items"]:
        yield f"items:{{{','.join(_items(schema['items']))}}}"
    if schema.get("nullable"):
        yield "nullable:true"
    if kind == "OBJECT":
        inner = schema.get("properties")
        named = inner if isinstance(inner, Mapping) else {k: v for k, v in schema.items() if k not in _STANDARD}
        yield f"properties:{{{_properties(named)}}}"
        if schema.get("required"):
            yield f"required:[{','.join(map(_text, schema['required']))}]"
    yield f"type:{_text(kind)}"


def _items(schema: Mapping[str, Any]) -> Iterator[str]:
    for name in _sorted(schema):
        value = schema[name]
        if name == "properties":
            yield f"properties:{{{_properties(value)}}}"
        elif name == "type":
            yield f"type:{_written(value.upper() if isinstance(value, str) else [one.upper() for one in value])}"
        elif value is not None:
            yield f"{name}:{_written(value)}"


def call(calls: Sequence[Call]) -> str:
    """See ToolFormat."""
    return "".join(f"<|tool_call>call:{call.name}{_written(named(call), quoted=False)}{_END}" for call in calls)


def _written(value: Any, quoted: bool = True) -> str:
    """A value; quoted: with keys between marks, as declarations have them."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        pairs = [f"{_text(k) if quoted else _key(k)}:{_written(value[k], quoted)}" for k in _sorted(value)]
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_written(item, quoted) for item in value) + "]"
    return json.dumps(value)


def _sorted(mapping: Mapping[str, Any]) -> list[str]:
    # As Jinja's dictsort: letters of either case together.
    return sorted(mapping, key=str.lower)


def _text(text: str) -> str:
    if _QUOTE in text:
        raise TemplateError(
            f"Gemma 4 puts texts between {_QUOTE} marks, which therefore cannot stand in one: {text!r}."
        )
    return _QUOTE + text + _QUOTE


def _key(name: str) -> str:
    if not _BARE.fullmatch(name):
        raise TemplateError(f"Gemma 4 writes names of arguments without quotes, which {name!r} would need.")
    return name


def parse(text: str, tools: Sequence[Definition] = ()) -> Parsed:
    """See ToolFormat."""
    calls: list[Call] = []
    spans: list[tuple[int, int]] = []
    for found in _CALL.finditer(text):
        if spans and found.start() < spans[-1][1]:
            continue
        try:
            value, stop = _read(text, found.end())
        except (ValueError, RecursionError):
            continue
        if text.startswith(_END, stop):
            calls.append(Call(found[1], value))
            spans.append((found.start(), stop + len(_END)))
    return outside(text, spans), calls


def _read(text: str, at: int) -> tuple[Any, int]:
    """The value at this place and where it ends; raises ValueError if there is none."""
    if text.startswith(_QUOTE, at):
        stop = text.index(_QUOTE, at + len(_QUOTE))
        return text[at + len(_QUOTE) : stop], stop + len(_QUOTE)
    if text.startswith("{", at):
        return _read_members(text, at + 1, "}")
    if text.startswith("[", at):
        return _read_members(text, at + 1, "]")
    found = _BARE.match(text, at)
    if found is None:
        raise ValueError("no value")
    return json.loads(found[0]), found.end()


def _read_members(text: str, at: int, closing: str) -> tuple[Any, int]:
    pairs: list[tuple[Any, Any]] = []
    while not text.startswith(closing, at):
        key: Any = None
        if closing == "}":
            found = _BARE.match(text, at)
            key, at = (found[0], found.end()) if found else _read(text, at)
            if not text.startswith(":", at):
                raise ValueError("no value for a key")
            at += 1
        value, at = _read(text, at)
        pairs.append((key, value))
        if text.startswith(",", at):
            at += 1
        elif not text.startswith(closing, at):
            raise ValueError("not closed")
    return (dict(pairs) if closing == "}" else [value for _, value in pairs]), at + 1
