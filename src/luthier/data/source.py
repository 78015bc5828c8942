"""Where rows come from and how they are read: the data keys, and what one entry of `dataset` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, refuse_all

MIXES = ("concat", "interleave_under", "interleave_over", "interleave_once")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data a run uses, how sets are mixed and split, and how their encoding is cached."""

    dataset: str | list[str | dict[str, Any]] | None = None
    """Training data: names in `dataset_info.json`, paths of files or folders, or hub ids, separated by commas or as a
    list. An entry may also be a mapping with `path` and any of format, weight, num_samples, columns, tags, ranking,
    split, subset, folder, name."""
    eval_dataset: str | list[str | dict[str, Any]] | None = None
    """Evaluation data, written as `dataset` is."""
    dataset_dir: str | dict[str, Any] = "data"
    """Folder with `dataset_info.json` and its files; ONLINE takes names as hub ids, REMOTE:ORG/NAME reads the
    `dataset_info.json` of a hub repository. From Python, the content of `dataset_info.json`."""
    media_dir: str | None = None
    """Folder that paths of images are relative to; unset: dataset_dir."""
    max_samples: int | None = None
    """Use the first this many rows of each data set."""
    val_size: float = 0.0
    """Hold out rows for evaluation: a share below 1, or a number of rows from 1 on."""
    eval_on_each_dataset: bool = False
    """Evaluate each set of `eval_dataset` on its own, instead of all of them together."""
    mix_strategy: str = "concat"
    """concat | interleave_under (stop when the first set is exhausted) | interleave_over (when every set is, repeating
    the short ones) | interleave_once (every row once, sets alternating)."""
    interleave_probs: str | list[float] | None = None
    """How often each set is drawn when interleaving: numbers that add up to 1, as a list or separated by commas."""
    streaming: bool = False
    """Read and encode rows while training, instead of before; max_steps then says when to end."""
    buffer_size: int = 16384
    """Rows to shuffle among when streaming; has no effect otherwise."""
    overwrite_cache: bool = False
    """Encode again even where the same content was encoded before."""
    preprocessing_batch_size: int = 1000
    """Rows that are encoded together."""
    preprocessing_num_workers: int | None = None
    """Processes that encode rows; unset or 1 encodes in this one."""
    tokenized_path: str | None = None
    """Folder to keep the encoded data in: written if it does not exist; otherwise loaded, after checking that it was
    made with the same data and settings."""
    data_shared_file_system: bool = False
    """The cache lies on a file system that several machines share, where only lock files of the portable kind work."""
    max_bad_rows: float = 0.01
    """Refuse to start when more than this share of a data set's rows cannot be used."""
    data_cache_dir: str | None = None
    """Where encoded data are cached; unset: `luthier/encoded` in the user's cache folder."""

    def __post_init__(self) -> None:
        rules = (
            (
                self.streaming and self.max_samples,
                "max_samples has no meaning with streaming: true; max_steps says when to end",
            ),
            (
                self.streaming and 0 < self.val_size < 1,
                f"val_size: {self.val_size} is a share, and streaming: true wants a number of rows, such as 100",
            ),
            (
                self.streaming and self.tokenized_path,
                "tokenized_path keeps data that are encoded before training; streaming: true encodes them meanwhile",
            ),
            (self.buffer_size < 1, f"buffer_size: {self.buffer_size} must be 1 or more"),
            (self.mix_strategy not in MIXES, f"mix_strategy: {self.mix_strategy!r} is none of {', '.join(MIXES)}"),
            (
                self.max_samples is not None and self.max_samples < 1,
                f"max_samples: {self.max_samples} must be 1 or more",
            ),
            (self.val_size < 0, f"val_size: {self.val_size} must be 0 or more"),
            (
                self.val_size > 1 and self.val_size != int(self.val_size),
                f"val_size: {self.val_size} must be a share below 1 or a whole number of rows",
            ),
            (
                self.val_size and self.eval_dataset,
                "val_size and eval_dataset cannot both be set: one splits evaluation rows off, the other names them",
            ),
            (self.val_size and not self.dataset, "val_size needs a dataset to hold rows out from"),
            (not 0 <= self.max_bad_rows <= 1, f"max_bad_rows: {self.max_bad_rows} must be a share between 0 and 1"),
            (
                self.preprocessing_batch_size < 1,
                f"preprocessing_batch_size: {self.preprocessing_batch_size} must be 1 or more",
            ),
            (
                self.preprocessing_num_workers is not None and self.preprocessing_num_workers < 1,
                f"preprocessing_num_workers: {self.preprocessing_num_workers} must be 1 or more",
            ),
            (
                self.interleave_probs and self.mix_strategy == "concat",
                "interleave_probs has no meaning with mix_strategy: concat; choose one of the interleave strategies",
            ),
        )
        refuse_all(f"{complaint}." for broken, complaint in rules if broken)
        self.probabilities()

    def probabilities(self) -> list[float] | None:
        """`interleave_probs` as numbers; None where it is not set."""
        given = self.interleave_probs
        if given is None:
            return None
        try:
            numbers = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
        except ValueError:
            raise ConfigError(
                f"interleave_probs: {given!r} must be numbers separated by commas, such as 0.7,0.3."
            ) from None
        if not numbers or min(numbers) < 0 or abs(sum(numbers) - 1) > 1e-6:
            raise ConfigError(f"interleave_probs: {given} must be 0 or more and add up to 1, not {sum(numbers):g}.")
        return numbers


class BadRow(Exception):
    """A row that cannot be used. `reason` is what rows are counted by, `detail` is about this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class MissingColumn(BadRow):
    """A row lacks a column that its format cannot do without."""

    def __init__(self, meaning: str, column: str):
        super().__init__(f"no column {column!r}", f"columns.{meaning}")
        self.meaning = meaning
        self.column = column

    def __reduce__(self):
        return MissingColumn, (self.meaning, self.column)


COLUMNS: Mapping[str, str | None] = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": None,
    "messages": "conversations",
    "system": None,
    "tools": None,
    "chosen": None,
    "rejected": None,
    "kto_tag": None,
    "score": "score",
    "images": None,
    "videos": None,
    "audios": None,
}
"""What a column may mean, and the name LLaMA-Factory expects where the user names no columns."""

TAGS: Mapping[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""Keys and role names inside messages, with LLaMA-Factory's defaults."""


@dataclass(frozen=True)
class Columns:
    """The columns of one data set by their meaning, resolved; formats read rows through it."""

    names: Mapping[str, str | None] = field(default_factory=lambda: dict(COLUMNS))
    """Meaning -> column name; None where there is none."""
    tags: Mapping[str, str] = field(default_factory=lambda: dict(TAGS))
    ranking: bool = False
    """Rows bring a chosen and a rejected answer."""
    given: frozenset[str] = frozenset()
    """Meanings whose columns the user named: they must exist."""

    def name(self, meaning: str) -> str | None:
        """The column that holds this meaning, if any."""
        return self.names[meaning]

    def get(self, row: Mapping[str, Any], meaning: str) -> Any:
        """The row's value for a meaning; None where the row or the data set has no such column."""
        column = self.names[meaning]
        return None if column is None else row.get(column)

    def need(self, row: Mapping[str, Any], meaning: str) -> Any:
        """The row's value for a meaning that must be there; raises MissingColumn."""
        column = self.names[meaning]
        if column is None or column not in row:
            raise MissingColumn(meaning, column or meaning)
        return row[column]

    def text(self, row: Mapping[str, Any], meaning: str) -> str:
        """The row's text for an optional meaning, empty where there is none; raises BadRow for anything but text."""
        value = self.get(row, meaning)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise BadRow(f"{self.names[meaning]!r} is not text", f"it is {excerpt(value)}")
        return value


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set: where its rows lie and how to read them."""

    name: str
    place: str
    """Where the user declared it, for messages."""
    path: Path | None = None
    hub: str | None = None
    """Hub id, where there is no local path."""
    store: str = "hf"
    """Which hub that is: hf, or a name in `core.hubs`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    url: str | None = None
    """Address of a file in a cloud's storage."""
    format: str | None = None
    """Name in `formats/`; None: decided by the first row."""
    columns: Columns | None = None
    """None: those of the format (see `guess`)."""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    weight: float | None = None


def excerpt(value: Any, length: int = 60) -> str:
    """A value for a message, cut short, with its type."""
    text = repr(value)
    return f"{text[:length]}{'...' if len(text) > length else ''} ({type(value).__name__})"
