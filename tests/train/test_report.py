"""Pictures, perplexity and the model card."""

from __future__ import annotations

import importlib.util
import math
import os
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from luthier.core.errors import ConfigError
from luthier.train import report

HISTORY = [
    *({"step": n, "epoch": n / 10, "loss": 3 / n, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens": 10 * n,
       "tokens_per_second": 5.0, "rewards/accuracies": 0.5, "once": 1.0} | ({} if n == 1 else {"once": math.nan})
      for n in range(1, 11)),
    {"step": 5, "eval_loss": 1.0, "eval_runtime": 1.0, "eval_samples_per_second": 2.0},
    {"step": 10, "eval_loss": 0.5, "eval_runtime": 1.0, "eval_samples_per_second": 2.0},
    {"step": 10, "train_runtime": 12.0, "train_loss": 0.7, "total_flos": 1e9, "train_samples_per_second": 3.0},
]  # fmt: skip


def test_every_measure_that_was_logged_twice_gets_a_picture(tmp_path):
    drawn = report.plot_loss(tmp_path, HISTORY)
    names = {"training_loss.png", "training_eval_loss.png", "training_rewards_accuracies.png"}
    assert {path.name for path in drawn} == names == set(os.listdir(tmp_path))
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_picture_holds_the_values_and_their_smoothed_run(tmp_path, monkeypatch):
    import matplotlib.figure

    made = []

    class Spy(matplotlib.figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Spy)
    report.plot_loss(tmp_path, [logs for logs in HISTORY if "loss" in logs or "eval_loss" in logs])
    figures = {figure.axes[0].get_title(): figure.axes[0] for figure in made}
    raw, smooth = figures["Training loss"].lines
    np.testing.assert_array_equal(raw.get_xdata(), range(1, 11))
    np.testing.assert_allclose(raw.get_ydata(), [3 / n for n in range(1, 11)])
    assert list(smooth.get_ydata()) != list(raw.get_ydata())
    (evaluation,) = figures["eval_loss"].lines
    np.testing.assert_allclose(evaluation.get_ydata(), [1.0, 0.5])
    assert figures["Training loss"].get_xlabel() == "step" and figures["Training loss"].get_ylabel() == "loss"


def test_smoothing_averages_without_lagging():
    values = [4.0, 2.0, 8.0, 1.0]
    keep = 1.8 * (1 / (1 + np.exp(-0.05 * 4)) - 0.5)
    there, back = [4.0], [1.0]
    for value in values[1:]:
        there.append(keep * there[-1] + (1 - keep) * value)
    for value in values[-2::-1]:
        back.append(keep * back[-1] + (1 - keep) * value)
    np.testing.assert_allclose(report.smooth(values), (np.array(there) + np.array(back[::-1])) / 2)
    line = np.linspace(5, 1, 200)
    np.testing.assert_allclose(np.array(report.smooth(line.tolist()))[60:-60], line[60:-60], atol=1e-2)
    assert report.smooth([]) == []


def test_nothing_logged_draws_nothing(tmp_path):
    assert report.plot_loss(tmp_path, [{"step": 1, "loss": 2.0}]) == []
    assert os.listdir(tmp_path) == []


def test_matplotlib_is_missed_before_the_run(monkeypatch):
    report.check_plotting()
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(ConfigError, match=r"pip install luthier\[plots\]"):
        report.check_plotting()


def test_perplexity_is_the_exponential_of_every_evaluation_loss():
    metrics = {"eval_loss": 2.0, "eval_wiki_loss": 0.0, "eval_runtime": 3.0, "train_loss": 1.0, "eval_big_loss": 1e4}
    found = report.with_perplexity(metrics)
    assert found == metrics | {
        "eval_perplexity": pytest.approx(math.e**2),
        "eval_wiki_perplexity": 1.0,
        "eval_big_perplexity": math.inf,
    }


def run(**keys):
    keys = {"model_name_or_path": "some/base", "dataset": "persona,plain", "learning_rate": 1e-4} | keys
    return SimpleNamespace(
        keys=keys,
        stage=keys.get("stage", "sft"),
        objective=SimpleNamespace(head=keys.get("head")),
        model=SimpleNamespace(model_name_or_path=keys["model_name_or_path"]),
        data=SimpleNamespace(dataset=keys["dataset"]),
        adapter=SimpleNamespace(finetuning_type=keys.get("finetuning_type", "lora")),
    )


def card(folder, made, metrics=None):
    path = report.write_card(
        folder,
        made,
        metrics or {"eval_loss": 1.23456},
        finished=datetime(2024, 5, 17),
        command=f"luthier train {folder}/my.yaml",
    )
    text = path.read_text()
    return yaml.safe_load(text.split("---\n")[1]), text


def test_the_card_tells_where_the_weights_come_from(tmp_path):
    front, text = card(tmp_path, run(), {"eval_loss": 1.23456, "train_loss": 2, "eval_samples_per_second": 1e-5})
    assert front == {
        "base_model": "some/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["luthier", "sft", "lora"],
    }
    assert text.startswith("---\n") and (tmp_path / "README.md").exists()
    for part in (
        "some/base",
        "`persona`, `plain`",
        "luthier train my.yaml` with the hyper-parameters",
        "| eval_loss | 1.2346 |",
        "2024-05-17",
    ):
        assert part in text
    assert "| `learning_rate` | 0.0001 |" in text and "- transformers " in text and "| train_loss | 2 |" in text


def test_the_card_of_a_model_with_a_head_names_no_task_and_counts_are_whole(tmp_path):
    front, text = card(tmp_path, run(stage="rm", head="value"), {"eval_pairs": 16.0, "eval_loss": 0.5})
    assert "pipeline_tag" not in front and "rm" in front["tags"]
    assert "| eval_pairs | 16 |" in text and "| eval_loss | 0.5000 |" in text


def test_the_card_tells_no_secrets_and_no_places_on_this_machine(tmp_path):
    base = tmp_path / "base-model"
    base.mkdir()
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    made = run(
        model_name_or_path=str(base), dataset=[{"path": str(data), "weight": 2}, "plain"], hf_hub_token="hf_secret",
        output_dir=str(tmp_path), cache_dir=str(tmp_path), finetuning_type="full", deepspeed=str(tmp_path / "ds.json"),
    )  # fmt: skip
    front, text = card(tmp_path / "base-model", made, {"eval_loss": 1.0, "eval_runtime": 2.0, "epoch": 3.0})
    assert "base_model" not in front and front["library_name"] == "transformers"
    assert "eval_runtime" not in text and "epoch" not in text
    assert str(tmp_path) not in text and "hf_secret" not in text
    assert "base-model" in text and "`rows.jsonl`, `plain`" in text
