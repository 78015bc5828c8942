"""Encoded data are cached by content: the key names everything that decides a token, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from luthier.core.errors import DataError
from luthier.core.locks import locked
from luthier.core.log import get_logger
from luthier.core.objective import Objective, Renderer
from luthier.core.paths import local, user_cache
from luthier.data.files import File
from luthier.data.hub import Hub
from luthier.data.source import DataConfig, Source
from luthier.data.store import ITEMS, META

log = get_logger("data")

VERSION = 2
"""Raised when stored data change their shape."""


class Printed(Renderer, Protocol):
    """A renderer that can say what decides its ids."""

    def fingerprint(self) -> str:
        """Text of everything beside the tokenizer that decides ids."""


def sha(text: str) -> str:
    """A short name for a text: 20 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def key_of(parts: Mapping[str, str]) -> str:
    """The key of these parts, whatever their order."""
    return sha(json.dumps(sorted(parts.items())))


def shared_parts(objective: Objective, renderer: Printed, cutoff_len: int) -> dict[str, str]:
    """The parts of a key that all data sets of a run have in common, by names a user understands."""
    file = Path(inspect.getfile(type(objective)))
    declared = [dataclasses.astuple(column) for column in objective.columns]
    return {
        "cutoff_len": str(cutoff_len),
        "the template": sha(renderer.fingerprint()),
        "the tokenizer": sha(_tokenizer(renderer.tokenizer)),
        "the stage": type(objective).__qualname__,
        "keys of the stage": json.dumps(_encoding_keys(objective), sort_keys=True, default=repr),
        "code of the stage": sha(file.read_text(encoding="utf-8") + repr((objective.answers, declared))),
        "code of the encoder": _code(),
        "version of the tokenizers library": version("tokenizers"),
    }


def _encoding_keys(objective: Objective) -> dict[str, Any]:
    """The keys of a stage that decide its tokens, with their values."""
    keys = dataclasses.asdict(objective.config)
    return keys if objective.encoding_keys is None else {name: keys[name] for name in objective.encoding_keys}


def source_parts(source: Source, files: Sequence[File], format_file: str) -> dict[str, str]:
    """The parts of a key that describe one data set."""
    columns = source.columns
    assert columns is not None
    described = [sorted(columns.names.items()), sorted(columns.tags.items()), columns.ranking, sorted(columns.given)]
    parts = {
        "format": str(source.format),
        "columns": json.dumps(described),
        "code of the format": sha(Path(format_file).read_text(encoding="utf-8")),
    }
    return parts | {f"file {nth + 1}": digest(file) for nth, file in enumerate(files)}


def digest(file: File) -> str:
    """What a file holds, as a hash, and how it is read; never its name or date."""
    kind = type(file).__name__
    if isinstance(file, Hub):
        return f"{kind} {file.data._fingerprint}"
    with file.path.open("rb") as stream:
        return f"{kind} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _tokenizer(tokenizer: Any) -> str:
    """Everything a tokenizer consists of. Padding and truncation are a caller's passing wish and left out."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        settings = {name: _content(value) for name, value in tokenizer.init_kwargs.items() if name != "name_or_path"}
        rules = [tokenizer.get_vocab(), str(tokenizer.added_tokens_decoder), settings]
        return json.dumps([type(tokenizer).__qualname__, *rules], sort_keys=True, default=repr)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({name: value for name, value in core.items() if name not in ("padding", "truncation")})


def _content(setting: Any) -> Any:
    """What a setting says; where it names a file, what that file holds."""
    if isinstance(setting, str) and os.path.isfile(setting):
        return hashlib.sha256(Path(setting).read_bytes()).hexdigest()
    return setting


@cache
def _code() -> str:
    """Of the modules that turn rows into stored ids."""
    home = Path(__file__).resolve().parent.parent
    files = [home / "core" / name for name in ("types.py", "tree.py")]
    files += [file for part in ("data", "templates", "tool_formats") for file in sorted((home / part).glob("*.py"))]
    return sha(f"{VERSION}" + "".join(file.read_text(encoding="utf-8") for file in files))


def cache_folder(config: DataConfig) -> Path:
    """Where encoded data are kept."""
    if config.data_cache_dir is not None:
        return local(config.data_cache_dir)
    return user_cache() / "encoded"


def cached(config: DataConfig, key: str, build: Callable[[Path], None]) -> Path:
    """The folder of a key, built if it is not there. Of several processes one builds, the others wait and say so."""
    root = cache_folder(config)
    final = root / key
    # Under a launcher, only the first process of a machine encodes again; the others take what it made.
    overwrite = config.overwrite_cache and os.environ.get("LOCAL_RANK", "0") == "0"
    if (final / META).is_file() and not overwrite:
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        file, busy = root / f"{key}.lock", "encoding the same data"
        with locked(file, log, busy, shared=config.data_shared_file_system) as waited:
            if waited and (final / META).is_file():
                return final
            _build(root, key, build)
    except OSError as error:
        raise DataError(
            f"encoded data cannot be written to {root}: {error.strerror or error}. Make room or change the folder's "
            "rights, or set data_cache_dir to a folder that can be written."
        ) from error
    return final


def _build(root: Path, key: str, build: Callable[[Path], None]) -> None:
    for leftover in root.glob(f"{key}.part-*"):
        shutil.rmtree(leftover)
    aside = Path(tempfile.mkdtemp(prefix=f"{key}.part-", dir=root))
    try:
        build(aside)
        (root / key).mkdir(exist_ok=True)
        for name in (ITEMS, META):  # META last: where it is, everything is.
            with (aside / name).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside / name, root / key / name)
    finally:
        shutil.rmtree(aside)
