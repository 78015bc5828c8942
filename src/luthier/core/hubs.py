"""Hubs beside Hugging Face's: whole repositories of ModelScope and Modelers (openMind), fetched into a local folder.

Each has a package of its own, which is asked for when one of its repositories is named; nothing else needs it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from luthier.core.errors import ConfigError, LuthierError
from luthier.core.kinds import is_true
from luthier.core.locks import locked
from luthier.core.log import get_logger
from luthier.core.paths import user_cache

log = get_logger("hub")


@dataclass(frozen=True)
class Hub:
    """A hub, and the package that reads it: `MODULE.snapshot_download(repo_id=..., repo_type=...) -> folder`."""

    title: str
    switch: str
    """Environment variable that makes names ids on this hub, as in LLaMA-Factory."""
    entry: str
    """Key of `dataset_info.json` that names a data set there."""
    module: str
    install: str
    branch: str
    """What the hub calls the branch that Hugging Face calls main."""


HUBS: dict[str, Hub] = {
    "modelscope": Hub("ModelScope", "USE_MODELSCOPE_HUB", "ms_hub_url", "modelscope", "modelscope", "master"),
    "openmind": Hub("Modelers", "USE_OPENMIND_HUB", "om_hub_url", "openmind_hub", "openmind-hub", "main"),
}
"""By name. `hf` is none of them: transformers and datasets read that hub themselves."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a run may reach hubs."""

    tokens: Mapping[str, str | None]
    """By name of the hub, `hf` among them; None leaves it to the package, which looks where its login put one."""
    cache_dir: str | None = None
    """Where hubs keep what was fetched; None: where each keeps it by itself."""


OPEN = Access(tokens={})
"""No token, no folder of one's own."""


def chosen(environ: Mapping[str, str] | None = None) -> str | None:
    """The hub that the environment chooses in place of Hugging Face's; ModelScope where it names both."""
    told = os.environ if environ is None else environ
    return next((name for name, hub in HUBS.items() if is_true(told.get(hub.switch, ""))), None)


def snapshot(name: str, repo: str, *, kind: str, place: str, access: Access, revision: str | None = None) -> Path:
    """The folder of a repository, fetched if it is not here yet. Of several processes one fetches, the others wait.

    name: in `HUBS`. kind: model or dataset. place: who asks, for messages. Raises ConfigError where the package is
    missing, LuthierError where the repository cannot be had.
    """
    revision = HUBS[name].branch if revision in (None, "main") else revision
    token = access.tokens.get(name)
    return _fetched(name, repo, kind, place, revision, access.cache_dir, token)


@cache
def _fetched(
    name: str, repo: str, kind: str, place: str, revision: str, cache_dir: str | None, token: str | None
) -> Path:
    hub = HUBS[name]
    try:
        fetch = importlib.import_module(hub.module).snapshot_download
    except ImportError as error:
        raise ConfigError(
            f"{place}: {repo!r} lies on {hub.title}, and the package that reads it cannot be loaded ({error}). Install "
            f"it with `pip install {hub.install}`, or download the {kind} and name its folder."
        ) from None
    what = {"repo_id": repo, "repo_type": kind, "revision": revision, "cache_dir": cache_dir, "token": token}
    with _alone(f"{name} {kind} {repo}"):
        if is_true(os.environ.get("HF_HUB_OFFLINE", "")):
            return Path(_asked(fetch, what | {"local_files_only": True}, f"{place}: {repo!r} is wanted offline", hub))
        try:
            return Path(fetch(**what))
        except Exception as error:
            log.debug("%s could not be reached: %s", hub.title, error)
            why = f"{place}: {repo!r} could not be fetched from {hub.title} ({_first_line(error)})"
            folder = Path(_asked(fetch, what | {"local_files_only": True}, why, hub))
            log.warning("%s could not be asked for news of %s; using what was fetched before.", hub.title, repo)
            return folder


def _asked(fetch, what: Mapping[str, object], why: str, hub: Hub) -> str:
    """What was fetched before."""
    try:
        return fetch(**what)
    except Exception as error:
        raise LuthierError(
            f"{why}, and there is no copy of it here: {_first_line(error)}. Check the name and the connection, unset "
            f"{hub.switch} if it is set, or name a local folder."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


@contextmanager
def _alone(what: str) -> Iterator[None]:
    """One process at a time for each repository."""
    folder = user_cache() / "hubs"
    file = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:20]}.lock"
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(file, log, f"fetching {what}"))
        except OSError as error:
            raise ConfigError(f"no lock file can be written to {folder}: {error.strerror or error}.") from error
        yield
