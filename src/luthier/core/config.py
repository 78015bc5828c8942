"""The gate: every key of a configuration goes to the one dataclass that owns it, checked once, problems all together.

A part of Luthier declares its keys as fields of a frozen dataclass in the file that uses them, with a docstring
under each field. From that one place come the command line's help, the JSON schema and `docs/keys.md`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any

from luthier.core.compat import Refused, Renamed
from luthier.core.errors import ConfigError
from luthier.core.kinds import coerce, describe, nearest
from luthier.core.source import Given, Source, dump, read

__all__ = ["Given", "Key", "Owner", "Problem", "Settled", "Source", "dump", "field_docs", "keys_of", "read", "settle"]


LONGEST = 100
"""Characters of a value that a message shows."""


@dataclass(frozen=True)
class Key:
    """One key that a user may write."""

    name: str
    hint: Any
    """Its Python type; what the gate coerces to."""
    default: Any
    doc: str
    rule: Refused | None = None
    """Which values work, where not all of its type do."""
    required: bool = False
    """There is no default; the user must say."""


@dataclass(frozen=True)
class Owner:
    """A section of the run: the keys it owns and what is built from them."""

    name: str
    """The attribute of `Run` that it becomes."""
    keys: Mapping[str, Key]
    build: Callable[..., Any]
    """Called with the keys the user gave, coerced; may raise ConfigError, with one problem a line."""
    title: str = ""
    """How help and schema call it."""


@dataclass(frozen=True)
class Problem:
    """Something the user must mend."""

    key: str
    place: str
    text: str
    near: str | None = None
    """The key that was probably meant."""

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.text}" if self.place else f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Settled:
    """What came through the gate."""

    sections: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    """Every owned key with the value given, or its default; also of sections that could not be built."""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def suspects(self) -> set[str]:
        """Keys whose values are not to be trusted because the user has to mend them or their neighbours."""
        return {name for problem in self.problems for name in (problem.key, problem.near) if name}


@cache
def field_docs(config: type) -> dict[str, str]:
    """The docstring literal under each field of a dataclass, base classes included."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        body = tree.body[0].body  # type: ignore[attr-defined]
        for statement, after in zip(body, body[1:]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    docs[statement.target.id] = inspect.cleandoc(str(after.value.value))
    return docs


@cache
def keys_of(config: type) -> dict[str, Key]:
    """The keys a dataclass owns."""
    hints = typing.get_type_hints(config, include_extras=True)
    docs = field_docs(config)
    return {
        item.name: Key(
            item.name, hints[item.name], default_of(item), docs.get(item.name, ""), required=is_required(item)
        )
        for item in dataclasses.fields(config)
        if item.init
    }


def default_of(item: dataclasses.Field) -> Any:
    """A field's default value, None where there is none to give."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def is_required(item: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def owner(name: str, config: type, title: str = "") -> Owner:
    """A dataclass as the owner of its fields."""
    return Owner(name, keys_of(config), config, title or name)


def settle(
    given: Given,
    owners: Sequence[Owner],
    *,
    elsewhere: Callable[[], Mapping[str, str]] = dict,
    refused: Mapping[str, Refused] | None = None,
    renamed: Mapping[str, Renamed] | None = None,
    peers: Mapping[str, str] | None = None,
    extra: bool = False,
) -> Settled:
    """Hand each given key to its owner.

    elsewhere: asked only when needed, keys that belong to another stage or finetuning_type, with words for it.
    refused: keys that are known and accept only some values yet. renamed: old names of owned keys. peers: what
    other tools call owned keys, for a hint. extra: keys that nobody knows are a warning and no problem.
    """
    gate = _Gate(given, owners, refused or {}, renamed or {}, peers or {}, extra)
    unknown = [key for key in gate.values if not gate.admit(key)]
    if unknown:
        foreign = elsewhere()
        for key in unknown:
            gate.turn_away(key, foreign)
    return Settled(gate.build(), gate.values_of_all(), gate.problems, gate.warnings)


def refuse(source: Source, problems: Iterable[Problem]) -> None:
    """Raise one ConfigError with every problem, if there is any."""
    lines = sorted({str(problem): problem for problem in problems}.values(), key=_in_file_order)
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError("\n".join([f"{count} in {source.name}:", *(f"  {line}" for line in lines)]))


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _in_file_order(problem: Problem) -> tuple[int, int]:
    line = problem.place.rpartition(":")[2]
    return (0, int(line)) if line.isdigit() else (1, 0)


class _Gate:
    def __init__(
        self,
        given: Given,
        owners: Sequence[Owner],
        refused: Mapping[str, Refused],
        renamed: Mapping[str, Renamed],
        peers: Mapping[str, str],
        extra: bool,
    ):
        self.extra = extra
        self.peers = peers
        self.given = given
        self.owners = owners
        self.refused = refused
        self.renamed = renamed
        # Beside an old name that yields, a new one that is 0 says nothing.
        weak = {rule.new for old, rule in self.renamed.items() if rule.yields and given.values.get(old) is not None}
        self.values = {
            key: value for key, value in given.values.items() if not (key in weak and Refused((0,), "").takes(value))
        }
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.accepted: dict[str, dict[str, Any]] = {owner.name: {} for owner in owners}

    def admit(self, key: str) -> bool:
        """Give a key to its owner, or to the tables of known keys; False if nobody knows it."""
        value = self.values[key]
        owners = [owner for owner in self.owners if key in owner.keys]
        for owner in owners:
            self.hand(owner, owner.keys[key], value, key)
        if owners:
            return True
        if key in self.renamed:
            return self.rename(key, value)
        rule = self.refused.get(key)
        if rule is not None and not rule.takes(value):
            if rule.idle:
                self.warnings.append(f"{self.at(key)}{key} has no effect: {rule.why}.")
            else:
                self.complain(key, f"{rule.why} (got {shown(value)})")
        return rule is not None

    def rename(self, key: str, value: Any) -> bool:
        rule = self.renamed[key]
        if rule.yields and value is None:
            return True
        if rule.new in self.values:
            if rule.yields:
                self.warnings.append(f"{self.at(key)}{key} has no effect: {rule.new} is set too, and it wins.")
            else:
                self.complain(key, f"is the old name of {rule.new}, and both are set. Keep {rule.new}")
            return True
        try:
            value = rule.convert(value)
        except ValueError as error:
            self.complain(key, str(error))
            return True
        owners = [owner for owner in self.owners if rule.new in owner.keys]
        for owner in owners:
            self.hand(owner, owner.keys[rule.new], value, key)
        return bool(owners)

    def hand(self, owner: Owner, key: Key, value: Any, written: str) -> None:
        try:
            value = coerce(key.hint, value, self.given.spelling.get(written))
        except ValueError:
            near = nearest(key.hint, value)
            hint = f"; did you mean {near!r}?" if near else ""
            return self.complain(written, f"expected {describe(key.hint)}, got {shown(value)}{hint}")
        if key.rule is not None and not key.rule.takes(value):
            return self.complain(written, f"{key.rule.why} (got {shown(value)})")
        self.accepted[owner.name][key.name] = value

    def turn_away(self, key: str, foreign: Mapping[str, str]) -> None:
        """Say what a key is that no part of this run owns."""
        home = foreign.get(self.renamed[key].new if key in self.renamed else key)
        if home is not None:
            if self.values[key] is not None:
                self.warnings.append(f"{self.at(key)}{key} belongs to {home}; it has no effect in this run.")
            return
        near, hint = self.guess(key, foreign)
        if self.extra:
            self.warnings.append(f"{self.at(key)}{key} has no effect: no such key{hint}")
            return
        self.problems.append(Problem(key, self.place(key), f"no such key{hint}", near))

    def guess(self, key: str, foreign: Mapping[str, str]) -> tuple[str | None, str]:
        """The key that an unknown one probably stands for, and a hint for the message."""
        if key in self.peers:
            return self.peers[key].partition(":")[0], f"; here it is {self.peers[key]}"
        mine = [name for owner in self.owners for name in owner.keys]
        near = get_close_matches(key, [*mine, *self.renamed, *foreign, *self.refused], n=1)
        if not near:
            return None, ". `luthier keys` lists all"
        name = self.renamed[near[0]].new if near[0] in self.renamed else near[0]
        return name, f"; did you mean {name!r}?"

    def build(self) -> dict[str, Any]:
        sections = {}
        for owner in self.owners:
            missing = [key for key in owner.keys.values() if key.required and key.name not in self.accepted[owner.name]]
            for key in missing:
                if key.name not in self.given.values:
                    self.complain(key.name, f"is not set. {key.doc}".rstrip("."))
            if missing:
                continue
            try:
                sections[owner.name] = owner.build(**self.accepted[owner.name])
            except ConfigError as error:
                self.problems += (self.blame(owner, line) for line in str(error).splitlines())
        return sections

    def values_of_all(self) -> dict[str, Any]:
        return {
            key.name: self.accepted[owner.name].get(key.name, key.default)
            for owner in self.owners
            for key in owner.keys.values()
        }

    def blame(self, owner: Owner, text: str) -> Problem:
        """A section's own complaint, put at the first key it names."""
        words = text.replace(":", " ").replace("`", " ").replace(",", " ").split()
        key = next((word for word in words if word in owner.keys), owner.name)
        return Problem(key, self.place(key), text.removeprefix(f"{key}: "))

    def complain(self, key: str, text: str) -> None:
        self.problems.append(Problem(key, self.place(key), text if text.endswith("?") else f"{text}."))

    def place(self, key: str) -> str:
        return self.given.places.get(key, self.given.source.name)

    def at(self, key: str) -> str:
        return f"{self.place(key)}: "
