"""`luthier check CONFIG --config-only`: what every key comes to. Touches neither data nor weights."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core import log as logging
from luthier.core.compat import RENAMED
from luthier.core.config import Given, read
from luthier.run import Run, resolve
from luthier.schema import sections

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.get_logger("check")

TRAINING_SIGNS = ("dataset", "eval_dataset", "tokenized_path", "output_dir", "do_train", "do_eval", "do_predict")
"""A configuration with none of these set is meant for chat, infer, export and the like."""


def trains(given: Given) -> bool:
    """Whether a configuration asks for training or evaluation; those of chat, infer, score and export do not."""
    return any(given.values.get(key) not in (None, False, "") for key in TRAINING_SIGNS)


def show(config: str | Mapping[str, Any], overrides: Sequence[str], *, as_json: bool) -> int:
    """Resolve a configuration and print it on stdout: one JSON object of flat keys, or a table for people."""
    given = read(config, overrides)
    # What libraries print while they are imported must not stand before the JSON.
    with contextlib.redirect_stdout(sys.stderr):
        run = resolve(config, overrides, verb="check" if trains(given) else "chat")
        if not trains(given):
            log.info("Nothing says train (no dataset, no output_dir): checked for chat, infer, score and export.")
        run.announce(log)
    if as_json:
        print(json.dumps(run.flat(), ensure_ascii=False, default=str))
        return 0
    from rich.console import Console

    Console(soft_wrap=False).print(table(run, given))
    return 0


def table(run: Run, given: Given) -> RenderableType:
    """Keys that were written or derived, with where they come from; keys at their defaults are counted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    places = given.places | {rule.new: given.places[old] for old, rule in RENAMED.items() if old in given.places}
    flat, defaults = run.flat(), _defaults()
    shown = {
        key: places.get(key, "derived")
        for key, value in flat.items()
        if key in places or (key in defaults and value != defaults[key])
    }
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "value", "from"):
        rows.add_column(name, overflow="fold")
    for key, place in shown.items():
        style = "cyan" if place == "derived" else ""
        rows.add_row(Text(key, "bold"), Text(_written(flat[key]), style), Text(place, "dim"))
    rest = f"{len(flat) - len(shown)} more keys have their defaults; --json prints them all."
    return Group(rows, Text(rest, "dim"))


def _defaults() -> dict[str, Any]:
    return {key.name: key.default for section in sections() for key in section.keys.values()}


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
