"""`luthier preview FILE` of a batch that training could not compute: the rows as the model was given them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


def show(file: Path, *, rows: int | None, form: str, full: bool, console: Console | None = None) -> None:
    """Write the examples of `file`, the first `rows` of them, to the terminal or as JSON lines to stdout.

    Raises ConfigError where the tokenizer that made them is not found, DataError for a broken file.
    """
    from luthier.preview import as_json
    from luthier.train import bad_batch

    header, lines = bad_batch.read(file)
    examples = [(line, encoded) for line, encoded in lines][:rows]
    if form == "jsonl":
        for line, encoded in examples:
            sys.stdout.write(json.dumps(as_json(line["row"], encoded, header["columns"])) + "\n")
        return
    from luthier import preview_view

    console = _console() if console is None else console
    column = next(iter(header["columns"]), None)
    facts = {"full": full, "column": column, "word": "labelled" if column else "trained"}
    look = preview_view.Look.of(console, _tokenizer(header["tokenizer"]), **facts)
    console.print(f"{header['what']}: {len(examples)} examples as the model was given them.", soft_wrap=True)
    console.print(preview_view.legend(look))
    for line, encoded in examples:
        console.print(preview_view.example(look, line["row"], encoded, line["origin"]), "")


def _console() -> Console:
    from rich.console import Console

    from luthier.preview import WIDE

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the tokenizer of this batch, {name or 'which is not named'}, is not there any more. --format jsonl shows "
            f"its rows as numbers. ({error})"
        ) from error
