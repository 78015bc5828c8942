"""`trainer_log.jsonl`, written by a plain transformers Trainer that is interrupted and resumed."""

from __future__ import annotations

import json
import math
import resource

import pytest
import torch
import transformers
from tests.conftest import build_model
from transformers import TrainerControl, TrainerState

from luthier.callbacks import runlog
from luthier.train.runlog import NAME, Clock, RunLog, clock_time, read

ROWS = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(16)]


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def train(folder, *callbacks, resume=None, **keys):
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=8, logging_steps=1, save_steps=3, eval_strategy="steps",
        eval_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, **keys,
    )  # fmt: skip
    trainer = transformers.Trainer(
        build_model(), args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[runlog.wanted(None), *callbacks]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def test_every_log_is_a_line_in_llamafactorys_words(tmp_path):
    trainer = train(tmp_path)
    history = [logs for logs in trainer.state.log_history if "train_runtime" not in logs]
    written = lines(tmp_path)
    assert len(written) == len(history) == 12
    for line, logs in zip(written, history):
        assert (line["current_steps"], line["total_steps"], line["epoch"]) == (logs["step"], 8, logs["epoch"])
        assert line["percentage"] == logs["step"] / 8 * 100
        assert line.get("loss") == logs.get("loss") and line.get("eval_loss") == logs.get("eval_loss")
        assert line.get("lr") == logs.get("learning_rate") and "learning_rate" not in line
        assert line["elapsed_time"].count(":") == line["remaining_time"].count(":") == 2
        assert line.get("grad_norm") == logs.get("grad_norm")


def test_a_resumed_run_leaves_no_gaps_and_no_doubles(tmp_path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(straight)
    train(broken, StopAt(5))
    assert lines(broken)[-1]["current_steps"] == 5
    with (broken / NAME).open("a") as file:
        file.write('{"current_steps": 6, "lo')  # the process was killed here
    train(broken, resume=str(broken / "checkpoint-3"))
    names = ("current_steps", "loss", "eval_loss", "lr")
    picked = [[{name: line.get(name) for name in names} for line in lines(folder)] for folder in (straight, broken)]
    assert picked[0] == picked[1]
    assert not list(broken.glob(NAME + ".*"))


def test_a_fresh_run_in_an_old_folder_begins_a_fresh_log(tmp_path):
    train(tmp_path, eval_on_start=True)
    assert lines(tmp_path)[0]["current_steps"] == 0
    train(tmp_path, StopAt(2))
    assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2, 2]


def test_lines_are_there_at_once_and_only_from_rank_zero(tmp_path):
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    other = TrainerState(max_steps=4, is_world_process_zero=False)
    first = TrainerState(max_steps=4, is_world_process_zero=True)
    callback = runlog.wanted(None)
    callback.on_train_begin(args, other, TrainerControl())
    callback.on_log(args, other, TrainerControl(), logs={"loss": 1.0})
    assert not (tmp_path / NAME).exists()
    callback.on_train_begin(args, first, TrainerControl())
    first.global_step = 1
    callback.on_log(args, first, TrainerControl(), logs={"loss": 1.0})
    assert lines(tmp_path)[0]["loss"] == 1.0


def test_a_full_disk_does_not_end_the_run_and_no_line_is_lost(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("luthier.train.runlog.log.warning", lambda text, *values: said.append(text % values))
    log = RunLog(tmp_path)
    log.append({"current_steps": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # From here on the system writes ten bytes more, half a line, and then refuses.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / NAME).stat().st_size + 10, hard))
    try:
        log.append({"current_steps": 2})
        log.append({"current_steps": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(said) == 1 and "cannot be written" in said[0]
    log.append({"current_steps": 4})
    assert [line["current_steps"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_what_is_not_finite_is_null_and_every_line_is_json(tmp_path):
    log = RunLog(tmp_path)
    log.append(log.entry({"loss": math.nan, "eval_loss": math.inf, "note": "text"}, step=1, total=1, clock=Clock()))
    text = (tmp_path / NAME).read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line["loss"] is None and line["eval_loss"] is None and "note" not in line
    assert read(tmp_path) == [line]


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock(first_step=40)
    assert clock.remaining(40, 50) is None
    now[0] = 112.0
    assert clock.elapsed() == 12.0
    assert clock.remaining(44, 50) == 12.0 / 4 * 6
    assert clock.remaining(50, 50) == 0.0
    assert clock_time(3661.9) == "1:01:01"
