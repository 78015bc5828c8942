"""`prepare`: from the data keys of a run to the encoded examples it trains and evaluates on.

sources --open, guess--> Job --cached, encode_source--> Store --select, mix, split--> EncodedSet
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from luthier.core.errors import ConfigError, DataError
from luthier.core.hubs import OPEN, Access
from luthier.core.locks import locked
from luthier.core.log import get_logger
from luthier.core.objective import Objective
from luthier.core.paths import local
from luthier.core.registry import find
from luthier.data.cache import Printed, cache_folder, cached, digest, key_of, sha, shared_parts, source_parts
from luthier.data.encoder import Job, encode_source, learnt, stage_of, trains_tokens
from luthier.data.files import Jsonl, open_source
from luthier.data.groups import join_of, leaders, open_groups, sibling_of
from luthier.data.info import guess, sources
from luthier.data.mix import Pairs, mix, select, split
from luthier.data.remote import fetched
from luthier.data.report import DataReport, Tally
from luthier.data.source import BadRow, DataConfig, MissingColumn, Source
from luthier.data.store import META, EncodedSet, Store
from luthier.data.stream import Examples, Stream
from luthier.data.tokenized import load_tokenized, save_tokenized, tokenized_exists

__all__ = ["DataReport", "EncodedSet", "Prepared", "prepare"]

log = get_logger("data")
PROBED = 20
"""Rows looked at before anything is encoded, to find wrong columns early."""


@dataclass(frozen=True)
class Prepared:
    """The data of a run."""

    whole: EncodedSet | None
    """What comes of `dataset`, also the examples that bring nothing to train."""
    eval: dict[str, EncodedSet | Examples]
    """By name; "" is the key of a single set."""
    report: DataReport
    stream: Stream | None = None
    """In place of `train`, where rows are encoded while training."""

    @property
    def train(self) -> EncodedSet | None:
        """What is trained on."""
        return None if self.whole is None else self.whole.trained


@dataclass(frozen=True)
class _Ready:
    """A data set that was opened, and then encoded."""

    job: Job
    weight: float | None
    chosen: np.ndarray
    """int64: the rows that are used, as ordinals, perhaps repeated; of rows that belong together, their leaders."""
    used: np.ndarray
    """int64: every row that is encoded, ascending."""
    leaders: np.ndarray | None
    """int64: the leader of each of them, where rows belong together."""
    shared: Mapping[str, str]
    """What decides every store's content in this run."""
    parts: Mapping[str, str]
    """What decides this one's beside that. No names of files or data sets: moving a file changes no token."""


def prepare(
    config: DataConfig, objective: Objective, renderer: Printed, *, cutoff_len: int, seed: int, access: Access = OPEN
) -> Prepared:
    """Read, encode, mix and split the data of a run, from the cache where the same content was encoded before.

    access: how hubs may be reached.
    Raises ConfigError and DataError: what cannot be found, read or used, with file and row.
    """
    make = _streamed if config.streaming else _stored
    prepared = make(config, objective, renderer, cutoff_len=cutoff_len, seed=seed, access=access)
    return replace(prepared, report=replace(prepared.report, word=learnt(objective)))


def _stored(
    config: DataConfig, objective: Objective, renderer: Printed, *, cutoff_len: int, seed: int, access: Access
) -> Prepared:
    """Data that are encoded before training."""
    if config.buffer_size != DataConfig.buffer_size:
        log.warning("buffer_size has no effect: it belongs to streaming, which is off.")
    shared = shared_parts(objective, renderer, cutoff_len)
    tokenized = None if config.tokenized_path is None else local(config.tokenized_path)
    reusable = tokenized is not None and tokenized_exists(tokenized) and not config.overwrite_cache
    if not config.dataset and not config.eval_dataset:
        if tokenized is not None and reusable:
            return Prepared(*load_tokenized(tokenized, shared))
        raise ConfigError("dataset: is not set. Name a data set of dataset_info.json, or the path of a file.")
    named = _sources(config, access)
    jobs = {source.name: _open(config, source, objective, renderer, cutoff_len, access) for _, source in named}
    train, evaluated = (
        [_choose(jobs[source.name], source, config, shared, seed) for key, source in named if key == wanted]
        for wanted in ("dataset", "eval_dataset")
    )
    parts = shared | _plan_parts(config, train, evaluated, seed)
    if tokenized is not None and reusable:
        return Prepared(*load_tokenized(tokenized, parts))
    stores = {ready.job.source.name: _encode(ready, config) for ready in (*train, *evaluated)}
    train_set, eval_sets = _assemble(config, train, evaluated, stores, seed)
    report = DataReport(
        {name: Tally.from_dict(store.meta["tally"]) for name, store in stores.items()},
        0 if train_set is None else len(train_set.trained),
        {name: len(part) for name, part in eval_sets.items()},
    )
    _refuse_if_all_cut(report.total, cutoff_len, train_set)
    if tokenized is not None:
        lock, busy = cache_folder(config) / f"{sha(str(tokenized.absolute()))}.lock", f"writing {tokenized}"
        with locked(lock, log, busy, shared=config.data_shared_file_system) as waited:
            overwrite = config.overwrite_cache and not waited
            save_tokenized(tokenized, train_set, eval_sets, report, parts, overwrite=overwrite)
    return Prepared(train_set, eval_sets, report)


def _streamed(
    config: DataConfig, objective: Objective, renderer: Printed, *, cutoff_len: int, seed: int, access: Access
) -> Prepared:
    """Data that are read while training; what is evaluated is encoded now."""
    if type(objective).complete is not Objective.complete:
        raise ConfigError(f"streaming: stage {stage_of(objective)} needs the whole data set at once; leave it out.")
    evaluated: dict[str, EncodedSet | Examples] = {}
    sets: dict[str, Tally] = {}
    if config.eval_dataset:
        own = replace(config, dataset=None, streaming=False, mix_strategy="concat", interleave_probs=None)
        prepared = prepare(own, objective, renderer, cutoff_len=cutoff_len, seed=seed, access=access)
        evaluated, sets = prepared.eval, dict(prepared.report.sets)
    named = sources(config.dataset, config.dataset_dir, key="dataset", access=access)
    jobs = tuple(_open(config, source, objective, renderer, cutoff_len, access) for source in named)
    for job in jobs:
        if job.groups is not None or job.source.num_samples is not None:
            what = "num_samples" if job.groups is None else f"rows that share a {job.groups.join.key}"
            raise ConfigError(f"{job.source.place}: {what} cannot be streamed; leave streaming out.")
        _probe(job, np.arange(min(PROBED, sum(map(len, job.files)))))
    weights = [source.weight for source in named]
    pairs = None
    if len(jobs) > 1 or weights[0] is not None:
        lengths = [sum(map(len, job.files)) for job in jobs]
        pairs = mix(lengths, config.mix_strategy, probabilities=config.probabilities(), weights=weights, seed=seed)
    stream = Stream(
        jobs,
        pairs,
        skip=int(config.val_size),
        seed=seed,
        shuffle=True,
        block=config.buffer_size,
        rows=config.preprocessing_batch_size,
        capacity=None,
    )
    if stream.epoch <= 0:
        raise DataError(f"val_size: {config.val_size:g} would hold out every row. Give a smaller number.")
    if stream.skip:
        evaluated[""] = stream.held_out()
    report = DataReport(sets, eval={name: len(part) for name, part in evaluated.items()}, streamed=stream.epoch)
    return Prepared(None, evaluated, report, stream)


def _refuse_if_all_cut(total: Tally, cutoff_len: int, train: EncodedSet | None) -> None:
    """A cutoff that no row fits into is a mistake, and nothing a model should learn from."""
    if total.rows and total.truncated_rows == total.rows and len(train or ()) > 1:
        longest = total.truncated_tokens + total.path_tokens
        raise DataError(
            f"cutoff_len: {cutoff_len} is too short: every one of the {total.rows} rows had to be cut (rows have "
            f"{longest // total.rows} tokens on average). Raise cutoff_len; `luthier preview` shows the rows."
        )


def _sources(config: DataConfig, access: Access) -> list[tuple[str, Source]]:
    """(key, data set) of both keys, where one name stands for one way of reading one set."""
    named: dict[str, Source] = {}
    found: list[tuple[str, Source]] = []
    for key, value in (("dataset", config.dataset), ("eval_dataset", config.eval_dataset)):
        for source in sources(value, config.dataset_dir, key=key, access=access):
            if key == "eval_dataset" and source.weight is not None:
                raise ConfigError(
                    f"{source.place}: weight has no meaning in eval_dataset: every row is evaluated once."
                )
            same, name, nth = replace(source, weight=None, place=""), source.name, 1
            while replace(named.setdefault(name, source), weight=None, place="", name=source.name) != same:
                nth += 1
                name = f"{source.name} ({nth})"
            found.append((key, replace(source, name=name)))
    return found


def _open(
    config: DataConfig, source: Source, objective: Objective, renderer: Printed, cutoff_len: int, access: Access
) -> Job:
    """Open the files of a data set and settle its format by its first row."""
    if source.url is not None:
        source = replace(source, path=fetched(source.url, source.place, cache_folder(config) / "fetched"))
    files = open_source(source, reach=config.buffer_size if config.streaming else None, access=access)
    joined = None if source.format is None else join_of(find("formats", source.format))
    # Of a folder, the file that is merged in holds no rows of its own.
    files = tuple(file for file in files if joined is None or file.path.name != joined.sibling)
    first = next(file for file in files if len(file)).take([0])[0]
    source = guess(first, source, files[0].path)
    assert source.format is not None
    join = join_of(find("formats", source.format))
    groups = None if join is None else open_groups(join, files, source.place)
    return Job(source, files, objective, renderer, cutoff_len, groups)


def _choose(job: Job, source: Source, config: DataConfig, shared: Mapping[str, str], seed: int) -> _Ready:
    """Choose the rows that are used, look at the first of them, and say what decides their encoding."""
    rows = sum(map(len, job.files))
    chosen = select(rows, max_samples=config.max_samples, num_samples=source.num_samples, seed=seed)
    used, first_leaders = np.unique(chosen), None
    if job.groups is not None:
        first_leaders = leaders(job.files, job.groups.join.key, used)
        chosen = np.array(list(dict.fromkeys(first_leaders[np.searchsorted(used, chosen)].tolist())), np.int64)
    _probe(job, used[:PROBED])
    assert job.source.format is not None
    parts = source_parts(job.source, job.files, inspect.getfile(find("formats", job.source.format)))
    if job.groups is not None:
        siblings = dict.fromkeys(sibling_of(job.groups.join, file) for file in job.files)
        parts |= {f"sibling {nth + 1}": digest(Jsonl(path)) for nth, path in enumerate(siblings)}
    if len(used) < rows:
        parts["rows"] = sha(used.tobytes().hex())
    return _Ready(job, source.weight, chosen, used, first_leaders, dict(shared), parts)


def _probe(job: Job, ordinals: np.ndarray) -> None:
    """Refuse a data set whose first rows all lack a column or an answer, naming what there is instead."""
    complaints: list[BadRow] = []
    rows = []
    for _, _, row in job.rows(ordinals):
        try:
            job.read(row)
            return
        except BadRow as bad:
            complaints.append(bad)
            rows.append(row)
    there = list(dict.fromkeys(name for row in rows for name in row))
    missing = [bad for bad in complaints if isinstance(bad, MissingColumn)]
    if len(missing) == len(complaints):
        bad = missing[0]
        raise DataError(
            f"data set {job.source.name!r} ({job.source.place}) has no column {bad.column!r}, where the format "
            f"{job.source.format} looks for its {bad.meaning}.{_near(bad.column, there)} It has: {', '.join(there)}. "
            f"Name the right one with columns: {{{bad.meaning}: ...}}, or another format."
        )
    if all(bad.reason.startswith("brings ") for bad in complaints):
        column = job.columns.name("messages" if "messages" in job.columns.given else "response")
        hint = f" There is no column {column!r}." + _near(str(column), there) if column and column not in there else ""
        cure = "Name the column that holds the answers with columns: {response: ...}."
        if job.objective.answers[0] > 1 and not job.columns.ranking:
            hint = ""
            cure = (
                "Answers to compare are pairs, with ranking: true and columns: {chosen: ..., rejected: ...}, or lists "
                "with scores, in the format ranked."
            )
        raise DataError(
            f"data set {job.source.name!r} ({job.source.place}): every row {complaints[0].reason} (stage "
            f"{stage_of(job.objective)}).{hint} It has: {', '.join(there)}. {cure}"
        )


def _near(name: str, there: Sequence[str]) -> str:
    near = get_close_matches(name, there, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _encode(ready: _Ready, config: DataConfig) -> Store:
    """The store of a data set, from the cache if it is there; refused if too little of it can be used."""
    parts = {**ready.shared, **ready.parts}
    key, job = key_of(parts), ready.job

    def build(folder: Path) -> None:
        tally = encode_source(
            job,
            ready.used,
            ready.leaders,
            folder,
            batch_size=config.preprocessing_batch_size,
            workers=config.preprocessing_num_workers or 1,
        )
        meta = {"key": key, "parts": parts, "tally": tally.to_dict()}
        (folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    store = Store(cached(config, key, build), [str(file.path) for file in job.files])
    judge(job, Tally.from_dict(store.meta["tally"]), config.max_bad_rows)
    return store


def judge(job: Job, tally: Tally, max_bad_rows: float) -> None:
    """Refuse a data set of which too little can be used."""
    name = f"data set {job.source.name!r}"
    absent = [column for meaning in sorted(job.columns.given)
              if (column := job.columns.name(meaning)) and column not in tally.columns]  # fmt: skip
    # A part of the rows (max_samples, a preview) may lack a column that only later ones have.
    if absent and tally.rows >= sum(len(file) for file in job.files):
        raise DataError(
            f"{name} ({job.source.place}) names columns that no row has: {', '.join(absent)}."
            f"{_near(absent[0], tally.columns)} There are: {', '.join(tally.columns)}."
        )
    if tally.bad_rows > max_bad_rows * tally.rows:
        reasons = [f"  {bad.count} rows: {reason}: {'; '.join(bad.first)}" for reason, bad in tally.bad.items()]
        hints = [f"  {hint}" for start, hint in HINTS.items() if any(reason.startswith(start) for reason in tally.bad)]
        raise DataError(
            "\n".join([
                f"{name}: {tally.bad_rows} of {tally.rows} rows cannot be used, over max_bad_rows: {max_bad_rows:g}"
                " allows:",
                *reasons,
                *hints,
                "Mend the rows, or allow a larger share with max_bad_rows.",
            ])
        )  # fmt: skip
    if not tally.items or (trains_tokens(job.objective) and not tally.supervised):
        raise DataError(
            f"{name}: nothing is left to train in its {tally.rows} rows: every token is masked. Raise cutoff_len "
            f"({job.cutoff_len}) if prompts fill it, and look at `luthier preview`."
        )


HINTS = {
    "nothing left to train": "Prompts that fill cutoff_len leave no room for the response: raise cutoff_len. A row "
    "whose turns all have weight 0 trains nothing either.",
    "wrong order of roles": "A turn of the user stands before chosen and rejected.",
    "unknown role": "Name the roles of this data set with tags: {user_tag: ..., assistant_tag: ...}.",
}
"""What is likely wrong, by the beginning of a reason."""


def _assemble(
    config: DataConfig, train: Sequence[_Ready], evaluated: Sequence[_Ready], stores: Mapping[str, Store], seed: int
) -> tuple[EncodedSet | None, dict[str, EncodedSet]]:
    """Mix and split rows, then turn rows into examples."""
    eval_sets: dict[str, EncodedSet] = {}
    if evaluated and config.eval_on_each_dataset:
        for ready in evaluated:
            pairs = mix([len(ready.chosen)], "concat", seed=seed)
            eval_sets[ready.job.source.name] = _examples(pairs, [ready], stores)
    elif evaluated:
        pairs = mix([len(ready.chosen) for ready in evaluated], "concat", seed=seed)
        eval_sets[""] = _examples(pairs, evaluated, stores)
    if not train:
        return None, eval_sets
    pairs = mix(
        [len(ready.chosen) for ready in train],
        config.mix_strategy,
        probabilities=config.probabilities(),
        weights=[ready.weight for ready in train],
        seed=seed,
    )
    if config.val_size:
        pairs, held = split(pairs, config.val_size, seed)
        eval_sets[""] = _examples(held, train, stores)
    return _examples(pairs, train, stores), eval_sets


def _examples(pairs: Pairs, readies: Sequence[_Ready], stores: Mapping[str, Store]) -> EncodedSet:
    """Rows as examples, in the same order: a row that could not be used brings none, a long document several."""
    mine = [stores[ready.job.source.name] for ready in readies]
    first, count = np.zeros(len(pairs), np.int64), np.zeros(len(pairs), np.int64)
    for nth, (ready, store) in enumerate(zip(readies, mine)):
        here = pairs[:, 0] == nth
        first[here], count[here] = store.spans(ready.chosen[pairs[here, 1]])
    which = np.repeat(pairs[:, 0], count)
    item = np.arange(len(which)) + np.repeat(first - (np.cumsum(count) - count), count)
    return EncodedSet(mine, which, item)


def _plan_parts(config: DataConfig, train: Sequence[_Ready], evaluated: Sequence[_Ready], seed: int) -> dict[str, str]:
    """What decides the sets of a run beside their stores, by the names of the keys."""
    parts = {
        "dataset": f"{len(train)} sets",
        "eval_dataset": f"{len(evaluated)} sets",
        "mix_strategy": config.mix_strategy,
        "interleave_probs": json.dumps(config.probabilities()),
        "weight": json.dumps([ready.weight for ready in train]),
        "num_samples": json.dumps([ready.job.source.num_samples for ready in (*train, *evaluated)]),
        "max_samples": json.dumps(config.max_samples),
        "val_size": json.dumps(config.val_size),
        "eval_on_each_dataset": json.dumps(config.eval_on_each_dataset),
    }
    drawn = any(ready.weight or ready.job.source.num_samples for ready in (*train, *evaluated))
    if config.val_size or config.interleave_probs or drawn:
        parts["seed"] = str(seed)
    for key, readies in (("dataset", train), ("eval_dataset", evaluated)):
        for nth, ready in enumerate(readies):
            parts |= {f"{part} of {key}[{nth}]": value for part, value in ready.parts.items()}
    return parts
