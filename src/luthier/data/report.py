"""What became of the rows: how many were used, which were not and why, what was cut."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN = 3
"""How many rows are named for each reason."""


COUNTS = ("rows", "items", "truncated_rows", "truncated_tokens", "tokens", "path_tokens", "supervised", "idle_rows",
          "unserved_rows")  # fmt: skip


@dataclass
class Bad:
    """Rows that cannot be used for one reason."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    """`file:row (detail)` of the first few."""


@dataclass
class Tally:
    """Counts over the rows of one data set."""

    rows: int = 0
    items: int = 0
    """Examples after encoding; a long document gives several."""
    truncated_rows: int = 0
    truncated_tokens: int = 0
    tokens: int = 0
    """Shared beginnings counted once."""
    path_tokens: int = 0
    """As a plain computation sees them: every answer with its whole prompt."""
    supervised: int = 0
    idle_rows: int = 0
    """Rows that are as they should be and bring nothing to train, such as rounds in which every draft token matched."""
    unserved_rows: int = 0
    """Rows that are trained after a history that no server sends."""
    bad: dict[str, Bad] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    """Every column seen, in order of appearance."""

    @property
    def remarks(self) -> list[str]:
        """What a user should know of rows that are used."""
        found = []
        if self.idle_rows:
            found.append(f"{self.idle_rows:,} rows are in order and bring nothing to train")
        if self.unserved_rows:
            found.append(
                f"{self.unserved_rows:,} rows of several turns are trained with thoughts in their history, as one "
                "sequence (so does LLaMA-Factory), but chat, infer and servers send none: branch_thinking: true trains "
                "what they send, preserve_thinking: true has chat and infer send what is trained"
            )
        return found

    @property
    def bad_rows(self) -> int:
        """Rows that cannot be used."""
        return sum(bad.count for bad in self.bad.values())

    def blame(self, reason: str, row: str) -> None:
        """Count a row that cannot be used."""
        bad = self.bad.setdefault(reason, Bad())
        bad.count += 1
        if len(bad.first) < SHOWN:
            bad.first.append(row)

    def add(self, other: Tally) -> None:
        """Count what another part of the same data set counted."""
        for name in COUNTS:
            vars(self)[name] += vars(other)[name]
        for reason, bad in other.bad.items():
            mine = self.bad.setdefault(reason, Bad())
            mine.count += bad.count
            mine.first = (mine.first + bad.first)[:SHOWN]
        self.columns += [name for name in other.columns if name not in self.columns]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        """The inverse of `to_dict`."""
        return cls(**{**values, "bad": {reason: Bad(**bad) for reason, bad in values["bad"].items()}})


@dataclass(frozen=True)
class DataReport:
    """What `prepare` found. Printable with rich or `str`; `to_dict` is for files."""

    sets: Mapping[str, Tally]
    """By data set; every set counted once, whatever its weight."""
    train: int = 0
    """Training examples after mixing and splitting."""
    eval: Mapping[str, int] = field(default_factory=dict)
    """Evaluation examples by name; "" where there is one set."""
    streamed: int = 0
    """Rows of an epoch that are encoded while training."""
    word: str = "trained"
    """What the stage does to tokens that carry a weight: trained; judged, with the answer they belong to, as a whole;
    labelled, each with a value of its own."""
    trains: bool = True
    """Whether anything is trained on them."""

    @property
    def total(self) -> Tally:
        """All data sets together."""
        total = Tally()
        for tally in self.sets.values():
            total.add(tally)
        return total

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        sets = {name: tally.to_dict() for name, tally in self.sets.items()}
        return {"sets": sets, "train": self.train, "eval": dict(self.eval)}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("data set", overflow="fold")
        for heading in ("rows", "unusable", "examples", "tokens", self.word, "cut rows", "cut tokens"):
            table.add_column(heading, justify="right")
        for name, tally in self.sets.items():
            counts = (tally.rows, tally.bad_rows, tally.items, tally.tokens, tally.supervised, tally.truncated_rows,
                      tally.truncated_tokens)  # fmt: skip
            table.add_row(Text(name), *(f"{count:,}" for count in counts))
        lines = [
            Text(f"{name}: {bad.count:,} rows: {reason}: {'; '.join(bad.first)}{' ...' * (bad.count > len(bad.first))}")
            for name, tally in self.sets.items()
            for reason, bad in tally.bad.items()
        ]
        lines += [Text(f"{name}: {remark}") for name, tally in self.sets.items() for remark in tally.remarks]
        held = ", ".join(f"{count:,}{f' in {name}' if name else ''}" for name, count in self.eval.items())
        used = f"Streaming {self.streamed:,} rows an epoch" if self.streamed else f"Training on {self.train:,} examples"
        if not self.trains:
            used = f"Evaluating on {held or f'{self.train:,} examples'}"
        elif held:
            used += f", evaluating on {held}"
        return Group(table, *lines, Text(f"{used}."))

    def print(self, console: Console | None = None) -> None:
        """Show the report on a terminal (stderr unless told otherwise)."""
        from rich.console import Console

        (console or Console(stderr=True)).print(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()
