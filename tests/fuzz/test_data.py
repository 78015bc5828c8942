"""No data file, however broken, ends in a traceback; and every row of it is used, or counted with a reason."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import LuthierError
from luthier.core.registry import find
from luthier.data.encode import prepare
from luthier.data.renderer import make_renderer
from luthier.data.source import DataConfig
from luthier.data.template import TemplateConfig
from luthier.run import objective_in
from tests.conftest import build_tokenizer
from tests.fuzz.strategies import DEEP, SCALARS, TEXTS, VALUES, as_json, mess
from tests.fuzz.test_config import fuzz

RENDERER = make_renderer(TemplateConfig(template="chatml"), build_tokenizer())
COLUMNS = ("instruction", "input", "output", "history", "conversations", "messages", "system", "tools", "chosen",
           "rejected", "score", "text", "prompt", "content", "label", "weight")  # fmt: skip
TURNS = st.dictionaries(
    st.sampled_from(["from", "value", "role", "content", "weight", "loss", "tool_calls", "name"]) | TEXTS,
    st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "function_call", "observation"]) | VALUES,
    max_size=4,
)  # fmt: skip
CHAT = st.lists(
    st.builds(lambda who, says: dict(zip(("from", "value", "role", "content"), (*who, says) * 2)),
              st.sampled_from([("human",), ("gpt",), ("user",), ("assistant",)]), TEXTS) | TURNS, max_size=5,
)  # fmt: skip
GOOD = st.fixed_dictionaries({"instruction": TEXTS.map("q{}".format), "output": TEXTS.map("a{}".format)})
ROWS = GOOD | st.dictionaries(st.sampled_from(COLUMNS) | TEXTS, VALUES | CHAT | st.lists(TEXTS, max_size=3), max_size=5)
LINES = st.lists(
    ROWS.map(as_json) | st.sampled_from(["", "  ", "{}", "[]", "null", '{"a": 1, "a": 2}']) | DEEP, max_size=6
)
FILES = {
    "a.jsonl": mess(LINES.map("\n".join)),
    "a.json": mess(st.lists(ROWS, max_size=5).map(as_json) | VALUES.map(as_json) | DEEP | LINES.map("\n".join)),
    "a.txt": mess(st.lists(TEXTS, max_size=6).map("\n".join)),
    "a.csv": mess(st.lists(st.lists(TEXTS | st.sampled_from(COLUMNS), max_size=3).map(",".join), max_size=5)
                  .map("\n".join).map("instruction,output\n{}".format) | st.text(max_size=60)),
    "a.parquet": st.binary(max_size=40) | st.binary(max_size=40).map(lambda raw: b"PAR1" + raw + b"PAR1"),
    "a.arrow": st.binary(max_size=40) | st.binary(max_size=40).map(lambda raw: b"ARROW1\0\0" + raw + b"ARROW1"),
}  # fmt: skip
STAGES = ("sft", "pt", "dpo", "kto", "rm", "pro", "tuna")
FORMATS = ("alpaca", "sharegpt", "openai", "ranked", "text", None)


def rows_in(name: str, raw: bytes) -> int | None:
    """How many rows a file has, counted without the code under test; None where it cannot be said."""
    text = raw.decode("utf-8-sig", "replace")
    if name == "a.jsonl" or name == "a.txt":
        return sum(1 for line in raw.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
    if name == "a.csv":
        with contextlib.suppress(csv.Error):
            return sum(1 for _ in csv.DictReader(io.StringIO(text, newline="")))
    if name == "a.json":
        with contextlib.suppress(ValueError, RecursionError):
            rows = json.loads(text)
            return len(rows) if isinstance(rows, list) else None
    return None


def survives(folder: Path, config: dict, stage: str, rows: int | None) -> None:
    """Prepared or refused in words; what was prepared accounts for every row."""
    try:
        data = DataConfig(data_cache_dir=str(folder / "cache"), max_bad_rows=1.0, **config)
        objective = objective_in(find("objectives", stage))()
        prepared = prepare(data, objective, RENDERER, cutoff_len=64, seed=0)
    except LuthierError as error:
        assert str(error).strip()
        return
    tally = prepared.report.total
    origins = {origin for _, origin in (prepared.train[i] for i in range(len(prepared.train)))}
    assert len(origins) + tally.bad_rows + tally.idle_rows == tally.rows
    assert rows is None or tally.rows == rows
    for i in range(len(prepared.train)):
        encoded, _ = prepared.train[i]
        assert all(0 < len(path.ids) <= 65 and np.isfinite(path.weights).all() for path in encoded.paths)


@pytest.mark.parametrize("name", sorted(FILES))
def test_files(name):
    @fuzz
    @given(FILES[name], st.sampled_from(STAGES), st.sampled_from(FORMATS), st.booleans())
    def check(raw, stage, form, ranking):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / name).write_bytes(raw)
            entry = {"path": str(folder / name), "ranking": ranking} | ({"format": form} if form else {})
            survives(folder, {"dataset": [entry]}, stage, rows_in(name, raw))

    check()


KEYS = st.sampled_from(["file_name", "formatting", "ranking", "columns", "tags", "split", "subset", "folder", "weight",
                        "num_samples", "path", "format", "name", "hf_hub_url", "images"]) | TEXTS  # fmt: skip
ENTRIES = st.dictionaries(
    KEYS, VALUES | st.sampled_from(["a.jsonl", "alpaca", "openai", "messages", "train"]), max_size=4
)


@fuzz
@given(
    mess(st.dictionaries(st.just("mine") | TEXTS, ENTRIES | VALUES, max_size=3).map(as_json) | DEEP),
    st.just("mine") | TEXTS | st.lists(TEXTS | ENTRIES, max_size=3),
)
def test_dataset_info_and_what_is_named(info, dataset):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "dataset_info.json").write_bytes(info)
        (folder / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n')
        survives(folder, {"dataset": dataset, "dataset_dir": str(folder)}, "sft", None)


MANY = st.lists(GOOD | st.fixed_dictionaries({"instruction": SCALARS, "output": SCALARS}), min_size=1, max_size=30)


@fuzz
@given(MANY, st.integers(1, 7), st.sampled_from([None, 1, 3]))
def test_no_row_is_lost_between_batches(rows, size, most):
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "a.jsonl").write_text("".join(as_json(row) + "\n" for row in rows), "utf-8", "surrogatepass")
        config = {"dataset": str(folder / "a.jsonl"), "preprocessing_batch_size": size, "max_samples": most}
        survives(folder, config, "sft", min(len(rows), most or len(rows)))
