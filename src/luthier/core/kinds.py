"""Types of keys: turning what a YAML file or a command line says into them, and saying what was expected."""

from __future__ import annotations

import types
import typing
from enum import Enum
from functools import cache
from typing import Any, Literal, Union

SEQUENCES = (list, tuple, set, frozenset)
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping", Any: "anything"}


def coerce(hint: Any, value: Any, spelling: str | None = None) -> Any:
    """`value` as `hint`; raises ValueError (pydantic's) where that cannot be meant.

    "4" and 4.0 are ints, "1e-4" is a float, "yes" is a bool, "a,b" is a list where a list is wanted. A number is
    never a bool's disguise: `true` is no int. Where text is wanted and YAML saw a number or a flag, `spelling`
    (the scalar as written) is the value: `eval_strategy: no` is "no".
    """
    exact, lenient = _adapter(hint)
    try:
        return exact.validate_python(value, strict=True)
    except ValueError:
        if isinstance(value, (bool, int, float)) and spelling is not None and _accepts(exact, spelling):
            return spelling
        if isinstance(value, bool) and not _accepts(exact, 0.5) and bool not in _members(hint):
            raise
        if isinstance(value, bool) and bool not in _members(hint):
            raise
    if _wants_list(hint) and not isinstance(value, (*SEQUENCES, dict)) and value is not None:
        value = [part.strip() for part in (spelling or str(value)).split(",") if part.strip()]
    elif isinstance(value, str):
        value = value.strip()
    return lenient.validate_python(value)


def describe(hint: Any) -> str:
    """What a type expects, in words for a message: `a whole number or null`."""
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join("null" if value is None else str(value) for value in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in typing.get_args(hint)))
    if origin is typing.Annotated:
        return describe(typing.get_args(hint)[0])
    if origin in SEQUENCES:
        inner = [part for part in typing.get_args(hint) if part is not Ellipsis]
        return f"a list of {_plural(describe(inner[0]))}" if inner else "a list"
    return NAMES.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _plural(words: str) -> str:
    return {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a mapping": "mappings"}.get(words, words)


@cache
def _adapter_of(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _adapter(hint: Any) -> tuple[Any, Any]:
    adapter = _adapter_of(hint)
    return adapter, adapter


def _accepts(adapter: Any, value: Any) -> bool:
    try:
        adapter.validate_python(value, strict=True)
    except ValueError:
        return False
    return True


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _wants_list(hint: Any) -> bool:
    parts = [typing.get_origin(part) or part for part in _members(hint)]
    return any(part in SEQUENCES for part in parts) and str not in parts
