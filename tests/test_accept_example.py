"""The example of the accept head: its files mean what they say, and its tasks come from its script."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

from luthier.run import resolve

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "accept_head"


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}_tasks.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_files_fit_together():
    collect = resolve(EXAMPLE / "collect.yaml", verb="collect")
    train = resolve(EXAMPLE / "train.yaml")
    decode = resolve(EXAMPLE / "speculate.yaml", verb="speculate")
    assert (collect.speculate.draft, collect.collect.collect_scorer) == ("prompt_lookup", "rerun")
    keys = train.objective.config
    assert (train.stage, keys.accept_layout, keys.freeze_backbone) == ("accept_head", "judge", True)
    assert decode.speculate.accept_head == train.training["output_dir"]
    assert decode.speculate.draft_tokens == collect.speculate.draft_tokens
    assert decode.speculate.accept_threshold == 0.99


def test_the_tasks_are_those_of_the_script_and_the_test_is_apart(tmp_path):
    shutil.copy(EXAMPLE / "make_tasks.py", tmp_path)
    runpy.run_path(str(tmp_path / "make_tasks.py"), run_name="__main__")
    for name in ("train", "test"):
        assert rows(tmp_path, name) == rows(EXAMPLE, name)
    trained = {row["instruction"].split()[1] for row in rows(EXAMPLE, "train")}
    assert not trained & {row["instruction"].split()[1] for row in rows(EXAMPLE, "test")}
    assert len(rows(EXAMPLE, "train")) == 40 and len(rows(EXAMPLE, "test")) == 24
