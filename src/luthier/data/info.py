"""From what the user wrote under `dataset` to Sources: names in `dataset_info.json`, paths, mappings, hub ids."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, DataError
from luthier.core.hubs import HUBS, OPEN, Access, chosen
from luthier.core.paths import exists, is_file, is_folder, local
from luthier.core.registry import miss, names
from luthier.data.files import parse_json
from luthier.data.source import COLUMNS, TAGS, Columns, Source, excerpt

INFO = "dataset_info.json"
STORES = {"hf": "hf_hub_url"} | {name: hub.entry for name, hub in HUBS.items()}
"""Hubs, and the key of an entry that names a data set there; the first is taken where the environment chooses none."""
SELECTION = ("subset", "split", "folder", "revision", "num_samples")
"""Which part of a data set is used."""
INFO_KEYS = (*STORES.values(), "script_url", "cloud_file_name", "file_name", "file_sha1", "formatting", "ranking",
             *SELECTION, "columns", "tags")  # fmt: skip
INLINE_KEYS = ("path", "name", "format", "formatting", "ranking", *SELECTION, "weight", "columns", "tags")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")

OPTIONAL = {"history": "history", "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected",
            "images": "images", "videos": "videos", "audios": "audios"}  # fmt: skip
"""Columns that a file named directly brings in under their own names; `dataset_info.json` has to name them."""


def sources(
    dataset: str | Sequence[str | Mapping[str, Any]] | None,
    dataset_dir: str | Mapping[str, Any],
    *,
    key: str = "dataset",
    access: Access = OPEN,
) -> list[Source]:
    """Every data set a key names, in order. Raises ConfigError or DataError."""
    if dataset is None:
        return []
    entries = [part.strip() for part in dataset.split(",")] if isinstance(dataset, str) else list(dataset)
    entries = [entry for entry in entries if entry != ""]
    if not entries:
        raise ConfigError(f"{key}: is empty. Name a data set, or leave the key out.")
    info = _Info(dataset_dir, access)
    return [
        _inline(entry, f"{key}[{nth}]", info) if isinstance(entry, Mapping) else info.named(entry, key)
        for nth, entry in enumerate(entries)
    ]


class _Info:
    """What `dataset_dir` offers, read when first asked."""

    def __init__(self, dataset_dir: str | Mapping[str, Any], access: Access):
        self.online = dataset_dir == "ONLINE"
        self.folder: Path | None = None
        self.title = INFO
        self.entries: Mapping[str, Any] = {}
        if isinstance(dataset_dir, Mapping):
            self.entries, self.title = dataset_dir, "dataset_dir"
        elif dataset_dir.startswith("REMOTE:"):
            file = _remote(dataset_dir.removeprefix("REMOTE:"), access)
            self.entries, self.title = _read_info(file), str(file)
        elif not self.online:
            self.folder = local(dataset_dir)
            self.title = str(self.folder / INFO)
            if is_file(self.folder / INFO):
                self.entries = _read_info(self.folder / INFO)

    def named(self, name: str, key: str) -> Source:
        """The data set of a name, a path or a hub id, in this order."""
        if name in self.entries:
            return self._entry(name)
        if self.online:
            return Source(name=name, place=key, hub=name, store=chosen() or "hf")
        local = self.find(name)
        if local is not None:
            return Source(name=name, place=key, path=local)
        if HUB_ID.fullmatch(name) and Path(name).suffix not in FILE_TYPES:
            return Source(name=name, place=key, hub=name, store=chosen() or "hf")
        if Path(name).suffix in FILE_TYPES or "/" in name or "\\" in name:
            raise DataError(_no_file(name, key, self.folder))
        if not self.entries:
            where = f"{self.title} does not exist" if self.folder else f"{self.title} is empty"
            raise DataError(
                f"{key}: {name!r} is no file, and {where}, so no data set has that name. Give the path of a file, or "
                f"set dataset_dir to the folder that holds {INFO}."
            )
        raise DataError(f"{key}: {miss(f'data set in {self.title}', name, sorted(self.entries))}")

    def find(self, name: str) -> Path | None:
        """A local file or folder, as the user gave it or below `dataset_dir`."""
        path = local(name)
        candidates = [path] if self.folder is None else [path, self.folder / path]
        return next((candidate for candidate in candidates if exists(candidate)), None)

    def _entry(self, name: str) -> Source:
        entry, place = self.entries[name], f"{self.title}: {name}"
        _check(entry, INFO_KEYS, place)
        source = Source(
            name=name,
            place=place,
            format=_format(entry.get("formatting", "alpaca"), place),
            columns=_columns(entry, dict(COLUMNS), place),
            **_selection(entry, place),
        )
        if entry.get("script_url"):
            raise DataError(
                f"{place}: script_url runs code from the data set, which Luthier never does. Use file_name."
            )
        online = _online(entry, place)
        if online is not None:
            return replace(source, store=online[0], hub=online[1])
        if entry.get("cloud_file_name"):
            return replace(source, url=str(entry["cloud_file_name"]))
        if not entry.get("file_name"):
            raise DataError(f"{place}: neither file_name nor hf_hub_url is given, so there is nothing to read.")
        if not isinstance(entry["file_name"], str):
            raise ConfigError(f"{place}: file_name: {excerpt(entry['file_name'])} must be text.")
        path = (self.folder or Path()) / local(entry["file_name"])
        if not exists(path):
            raise DataError(_no_file(str(path), place, self.folder))
        return replace(source, path=path)


def guess(row: Mapping[str, Any], source: Source, path: Path | None) -> Source:
    """A source with format and columns filled in by what its first row holds. Raises DataError."""
    columns = source.columns or Columns(COLUMNS | OPTIONAL)
    if "messages" not in columns.given and columns.name("messages") not in row and "messages" in row:
        columns = replace(columns, names={**columns.names, "messages": "messages"})
    return replace(source, format=source.format or _format_of(row, columns, source, path), columns=columns)


def _format_of(row: Mapping[str, Any], columns: Columns, source: Source, path: Path | None) -> str:
    if path is not None and path.suffix == ".txt":
        return "text"
    messages = columns.get(row, "messages")
    if isinstance(messages, list):
        openai = bool(messages) and isinstance(messages[0], Mapping) and "role" in messages[0]
        return "openai" if openai and columns.tags == TAGS else "sharegpt"
    if isinstance(columns.get(row, "response"), list) and columns.name("score") in row:
        return "ranked"
    if columns.name("prompt") in row or columns.given:
        return "alpaca"
    if "text" in row:
        return "text"
    raise DataError(
        f"{source.place}: the format of {source.name!r} cannot be told from its columns: {', '.join(map(str, row))}. "
        f"Name one with {{path: ..., format: ...}}, one of: {', '.join(names('formats'))}; and the columns."
    )


def _inline(entry: Mapping[str, Any], place: str, info: _Info) -> Source:
    _check(entry, INLINE_KEYS, place)
    if not isinstance(entry.get("path"), str):
        raise ConfigError(f"{place}: path is missing: a file, a folder, a hub id or a name in {INFO}.")
    wanted = entry.get("format", entry.get("formatting"))
    base = info.named(entry["path"], place)
    changes: dict[str, Any] = {"place": place, **_selection(entry, place)}
    if wanted is not None:
        changes["format"] = _format(wanted, place)
    if {"columns", "tags", "ranking"} & set(entry):
        changes["columns"] = _columns(entry, COLUMNS | OPTIONAL, place)
    if "name" in entry:
        changes["name"] = str(entry["name"])
    weight = entry.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
            raise ConfigError(f"{place}: weight: {excerpt(weight)} must be a number above 0.")
        changes["weight"] = float(weight)
    return replace(base, **changes)


def _selection(entry: Mapping[str, Any], place: str) -> dict[str, Any]:
    """subset, split, folder, revision and num_samples, as far as they are given."""
    given = {name: entry[name] for name in SELECTION if entry.get(name) is not None}
    for name in ("subset", "split", "folder", "revision"):
        if not isinstance(given.get(name, ""), str):
            raise ConfigError(f"{place}: {name}: {excerpt(given[name])} must be text.")
    wanted = given.get("num_samples", 1)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ConfigError(f"{place}: num_samples: {excerpt(wanted)} must be a whole number of 1 or more.")
    return given


def _online(entry: Mapping[str, Any], place: str) -> tuple[str, str] | None:
    """Which hub an entry is read from, and its id there: the one the environment chooses, else the first there is."""
    there = {store: entry[key] for store, key in STORES.items() if entry.get(key)}
    for store, name in there.items():
        if not isinstance(name, str):
            raise ConfigError(f"{place}: {STORES[store]}: {excerpt(name)} must be text, such as org/name.")
    wanted = chosen()
    if wanted in there:
        return wanted, there[wanted]
    return next(iter(there.items()), None)


def _columns(entry: Mapping[str, Any], defaults: Mapping[str, str | None], place: str) -> Columns:
    """Resolved columns. As in LLaMA-Factory, naming some columns says that the optional others do not exist."""
    ranking = entry.get("ranking", False)
    if not isinstance(ranking, bool):
        raise ConfigError(f"{place}: ranking: {excerpt(ranking)} must be true or false.")
    given = entry.get("columns") or {}
    _check(given, tuple(COLUMNS), f"{place}: columns")
    tags = entry.get("tags") or {}
    _check(tags, tuple(TAGS), f"{place}: tags")
    for key, renamed in (("columns", given), ("tags", tags)):
        for meaning, name in renamed.items():
            if name and not isinstance(name, str):
                raise ConfigError(f"{place}: {key}: {meaning}: {excerpt(name)} must be text.")
    resolved = dict(defaults)
    if given:
        resolved = {meaning: given.get(meaning) for meaning in COLUMNS}
        resolved |= {meaning: resolved[meaning] or COLUMNS[meaning] for meaning in ("messages", "score")}
    if ranking:
        resolved |= {meaning: resolved[meaning] or meaning for meaning in ("chosen", "rejected")}
    named = frozenset(meaning for meaning, column in given.items() if column)
    return Columns(resolved, dict(TAGS) | {tag: name for tag, name in tags.items() if name}, ranking, named)


def _check(entry: Any, known: Sequence[str], place: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{place}: expected a mapping, got {excerpt(entry)}.")
    for key in entry:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{place}: no such key: {key!r}.{hint} There are: {', '.join(known)}.")


def _format(name: Any, place: str) -> str:
    if name not in names("formats"):
        raise ConfigError(f"{place}: {miss('format', str(name), names('formats'))}")
    return name


def _read_info(file: Path) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{file}: {twice[0]!r} is written twice in one object. Keep one of the two.")
        return dict(pairs)

    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None
    entries = parse_json(text, file, 1, unique)
    if not isinstance(entries, dict):
        raise DataError(f"{file}: expected an object of data set names, got {excerpt(entries)}.")
    return entries


def _remote(repo: str, access: Access) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(repo, INFO, repo_type="dataset", token=access.tokens.get("hf"), cache_dir=access.cache_dir)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"dataset_dir: REMOTE:{repo}: {INFO} could not be fetched from the hub: {error}") from None


def _no_file(name: str, place: str, folder: Path | None) -> str:
    path = local(name)
    parents = [path.parent] if folder is None or path.is_absolute() else [path.parent, folder / path.parent]
    there = {item.name: item for parent in parents if is_folder(parent) for item in parent.iterdir()}
    near = get_close_matches(path.name, sorted(there), n=1)
    hint = f" Did you mean {str(there[near[0]])!r}?" if near else ""
    below = f" (nor below dataset_dir {str(folder)!r})" if folder is not None and not path.is_absolute() else ""
    return f"{place}: no such file or folder: {name!r}{below}.{hint}"
