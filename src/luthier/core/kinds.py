"""Types of keys: turning what a YAML file or a command line says into them, and saying what was expected."""

from __future__ import annotations

import math
import types
import typing
from difflib import get_close_matches
from enum import Enum
from functools import cache
from typing import Any, Literal, Union

SEQUENCES = (list, tuple, set, frozenset)
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    Any: "anything",
}
TRUE = ("true", "yes", "on", "1", "y", "t")
PLURALS = {"a whole number": "whole numbers", "a number": "numbers", "text": "texts", "a mapping": "mappings"}


def coerce(hint: Any, value: Any, spelling: str | None = None) -> Any:
    """`value` as `hint`; raises ValueError where that cannot be meant.

    "4" and 4.0 are ints, "1e-4" is a float, "yes" is a bool, "a,b" is a list where a list is wanted; `true` is no
    number. Where text is wanted and YAML saw a number or a flag, `spelling` (the scalar as written) is the value:
    `eval_strategy: no` is "no" and `model_revision: 1.10` is "1.10". Infinity and NaN are no numbers.
    """
    value = _coerce(hint, value, spelling)
    if not _finite(value):
        raise ValueError(f"{value!r} is not finite")
    return value


def is_true(value: Any) -> bool:
    """Whether a flag that nobody has coerced yet says yes."""
    return value is True or (isinstance(value, str) and value.strip().lower() in TRUE)


def _coerce(hint: Any, value: Any, spelling: str | None) -> Any:
    adapter = _adapter(hint)
    if _exact(adapter, value):
        return adapter.validate_python(value, strict=True)
    if isinstance(value, (bool, int, float)) and spelling is not None and _exact(adapter, spelling):
        return spelling
    if isinstance(value, bool) and bool not in _members(hint):
        raise ValueError(f"{value!r} is a flag")
    if _wants_list(hint) and isinstance(value, (str, int, float)):
        value = [part.strip() for part in (spelling or str(value)).split(",") if part.strip()]
    elif isinstance(value, str):
        value = value.strip()
    return adapter.validate_python(value)


def describe(hint: Any) -> str:
    """What a type expects, in words for a message: `a whole number or null`."""
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join("null" if value is None else str(value) for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in inner))
    if origin is typing.Annotated:
        return describe(inner[0])
    if origin in SEQUENCES:
        words = describe(inner[0])
        return f"a list of {PLURALS.get(words, words)}"
    return WORDS.get(origin or hint, str(hint))


def nearest(hint: Any, value: Any) -> str | None:
    """The allowed word that is most like `value`, where only some words are allowed."""
    words = [word for part in _members(hint) if typing.get_origin(part) is Literal for word in typing.get_args(part)]
    near = get_close_matches(str(value), [word for word in words if isinstance(word, str)], n=1)
    return near[0] if near else None


def json_type(hint: Any) -> dict[str, Any]:
    """JSON schema of a type."""
    return {} if hint is Any else _adapter(hint).json_schema()


@cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return all(map(_finite, value)) if isinstance(value, SEQUENCES) else True


def _exact(adapter: Any, value: Any) -> bool:
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
