"""`tokenized_path`: a folder with the encoded data of a run, and what they were made from, to be checked."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.errors import DataError
from luthier.core.log import get_logger
from luthier.data.report import DataReport, Tally
from luthier.data.store import ITEMS, META, EncodedSet, Store

log = get_logger("data")
ABOUT = "prepared.json"


def tokenized_exists(folder: Path) -> bool:
    """Whether encoded data lie there. Raises DataError for a folder with something else in it."""
    if (folder / ABOUT).is_file():
        return True
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    raise DataError(
        f"tokenized_path: {folder} exists and holds no encoded data of Luthier's ({ABOUT} is missing). Give "
        "another folder; it is made if it does not exist."
    )


def load_tokenized(
    folder: Path, parts: Mapping[str, str]
) -> tuple[EncodedSet | None, dict[str, EncodedSet], DataReport]:
    """The sets of a folder, after checking that every given part is as it was. Raises DataError naming what changed."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    made = about["parts"]
    # A run that names no data takes the folder's, and can only say how they should have been encoded.
    compared = made.keys() | parts.keys() if "dataset" in parts else parts.keys()
    changed = "; ".join(
        _change(name, made.get(name), parts.get(name)) for name in sorted(compared) if made.get(name) != parts.get(name)
    )
    if changed:
        raise DataError(
            f"tokenized_path: {folder} was made with other data or settings: {changed}. Give "
            "another folder, or set overwrite_cache: true to make it anew."
        )
    sets = {
        name: EncodedSet(
            [Store(folder / store["folder"], store["files"]) for store in stored["stores"]],
            *np.load(folder / stored["index"]),
        )
        for name, stored in about["sets"].items()
    }
    report = about["report"]
    tallies = {name: Tally.from_dict(values) for name, values in report["sets"].items()}
    log.info("Encoded data loaded from %s.", folder)
    evaluated = {name.removeprefix("eval:"): part for name, part in sets.items() if name != "train"}
    return sets.get("train"), evaluated, DataReport(tallies, report["train"], report["eval"])


def save_tokenized(
    folder: Path,
    train: EncodedSet | None,
    evaluated: Mapping[str, EncodedSet],
    report: DataReport,
    parts: Mapping[str, str],
    *,
    overwrite: bool,
) -> None:
    """Write a folder that `load_tokenized` reads; it appears complete or not at all. One process at a time."""
    sets = ({} if train is None else {"train": train}) | {f"eval:{name}": part for name, part in evaluated.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            stored = {name: _write_set(aside, nth, part) for nth, (name, part) in enumerate(sets.items())}
            about = {"parts": dict(parts), "sets": stored, "report": report.to_dict()}
            (aside / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
            there = tokenized_exists(folder)
            if there and overwrite:
                # Out of the way first: another process may look at it, and must not find half of it.
                os.replace(folder, aside / "before")
            if overwrite or not there:
                os.chmod(aside, 0o755)
                os.replace(aside, folder)
                shutil.rmtree(folder / "before", ignore_errors=True)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(f"tokenized_path: {folder} cannot be written: {error.strerror or error}.") from error
    log.info("Encoded data saved in %s.", folder)


def _write_set(aside: Path, nth: int, part: EncodedSet) -> dict[str, Any]:
    stores = []
    for store in part.stores:
        home = aside / store.meta["key"]
        if not home.exists():
            home.mkdir()
            for name in (ITEMS, META):
                shutil.copyfile(store.folder / name, home / name)
        stores.append({"folder": home.name, "files": list(store.files)})
    np.save(aside / f"set-{nth}.npy", np.stack([part.which.astype(np.int64), part.item]))
    return {"stores": stores, "index": f"set-{nth}.npy"}


def _change(name: str, before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return f"{name} {'is new' if before is None else 'is gone'}"
    telling = len(before) + len(now) <= 200 and not name.startswith(("the t", "code ", "file ", "rows "))
    return f"{name} was {before}, is {now}" if telling else f"{name} changed"
