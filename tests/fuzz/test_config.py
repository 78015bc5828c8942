"""No configuration, however broken, ends in anything but a run or one message."""

from __future__ import annotations

import contextlib
import io
import json
import os

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import schema
from luthier.cli import main
from luthier.commands import parse_command
from luthier.core.compat import REFUSED, RENAMED
from luthier.core.errors import LuthierError
from luthier.run import Run, resolve
from tests.fuzz.strategies import DEEP, TEXTS, VALUES, as_json, mess, nested

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
"""So many examples of each test, found anew each time; 0: the same few."""
fuzz = settings(
    max_examples=EXAMPLES or 15,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None if EXAMPLES else 20_000,
    suppress_health_check=list(HealthCheck),
)

BASE = {"model_name_or_path": "some/model", "dataset": "mine", "output_dir": "out"}
KEYS = {key.name: key for section in schema.sections() for key in section.keys.values()}
NAMES = st.sampled_from(sorted({*KEYS, *REFUSED, *RENAMED} - {"plugins"})) | TEXTS
LIKELY = st.sampled_from(sorted({str(key.default) for key in KEYS.values()})) | VALUES
CONFIGS = st.dictionaries(NAMES, LIKELY, max_size=6)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(run: Run) -> None:
    """A run that came through can be written down and read again."""
    json.loads(json.dumps(run.flat(), default=str, allow_nan=False))
    text = run.to_yaml()
    with open("again.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    assert resolve("again.yaml").flat() == run.flat()


def survives(config, overrides=()) -> None:
    try:
        run = resolve(config, overrides)
    except LuthierError as error:
        assert str(error).strip()
        return
    checked(run)


@fuzz
@given(CONFIGS)
def test_mappings(config):
    survives(BASE | config)


@fuzz
@given(
    mess(
        st.one_of(
            CONFIGS.map(lambda c: yaml.safe_dump(BASE | c, allow_unicode=True)),
            st.lists(st.tuples(NAMES, TEXTS), max_size=6).map(lambda p: "".join(f"{k}: {v}\n" for k, v in p)),
            st.text(max_size=60),
            DEEP.map("dataset: {}".format),
        )
    )
)
def test_yaml_files(raw):
    with open("run.yaml", "wb") as file:
        file.write(raw)
    survives("run.yaml")


@fuzz
@given(mess(CONFIGS.map(lambda c: as_json(BASE | c)) | nested(TEXTS).map(as_json) | DEEP))
def test_json_files(raw):
    with open("run.json", "wb") as file:
        file.write(raw)
    survives("run.json")


@fuzz
@given(st.lists(st.tuples(NAMES, TEXTS | VALUES.map(as_json)).map("=".join) | TEXTS, max_size=4))
def test_command_lines(words):
    try:
        command = parse_command(["--output_dir", "o", *words], "train")
    except LuthierError:
        return
    survives(command.config if isinstance(command.config, dict) else BASE, command.overrides)


SOUND = CONFIGS.map(lambda c: yaml.safe_dump(BASE | c, allow_unicode=True))
LINES = st.lists(st.tuples(NAMES, TEXTS), max_size=4).map(
    lambda pairs: yaml.safe_dump(BASE) + "".join(f"{key}: {text}\n" for key, text in pairs)
)


@fuzz
@given(mess(SOUND | LINES), st.sampled_from([["check", "--config-only", "--json"], ["check", "--config-only"]]))
def test_the_command_itself(raw, command):
    """It ends with 0 and what was asked for, or with 2 and one message; never with a traceback."""
    with open("run.yaml", "wb") as file:
        file.write(raw)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([command[0], "run.yaml", *command[1:]])
    assert code in (0, 2) and "Traceback" not in err.getvalue()
    if code == 2:
        assert "error: " in err.getvalue() and not out.getvalue()
    elif "--json" in command:
        assert isinstance(json.loads(out.getvalue()), dict)
