"""What people see while a run goes on, in a pipe and on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import torch
import transformers
from rich.console import Console
from tests.conftest import build_model
from transformers.utils import logging as bars

from luthier.callbacks import progress
from luthier.callbacks.progress import Bar, ProgressCallback

ROWS = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(16)]


class Tokens(transformers.Trainer):
    """Logs what Luthier's Trainer logs beside the loss."""

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= {"tokens": 4321 * self.state.global_step, "tokens_per_second": 1234.5, "accuracy": 0.25}
        super().log(logs, start_time)


def train(folder, callback, *callbacks, trainer=Tokens, **keys):
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, logging_steps=2, save_steps=2, eval_strategy="steps",
        eval_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1e-3, **keys,
    )  # fmt: skip
    run = trainer(build_model(), args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[callback, *callbacks])
    run.remove_callback(transformers.PrinterCallback)
    run.train()
    return run


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def shown(console):
    return console.file.getvalue()


def test_in_a_pipe_there_is_a_plain_line_for_each_logging_step(tmp_path):
    console = Console(file=io.StringIO(), width=40)
    run = train(tmp_path, ProgressCallback(console))
    out = shown(console).splitlines()
    losses = [f"{logs['loss']:.4f}" for logs in run.state.log_history if "loss" in logs]
    steps = [line for line in out if line.startswith("step ") and "eval_loss" not in line]
    assert [line.split(" | ")[0] for line in steps] == ["step 2/4", "step 4/4"]
    for line, loss in zip(steps, losses):
        assert f"loss {loss}" in line and "1,234 tokens/s" in line and "left" in line
        assert "accuracy 0.2500" in line and "epoch" in line and "lr " in line
    assert "\x1b" not in shown(console)
    assert [line for line in out if "saved" in line] == ["saved checkpoint-2", "saved checkpoint-4"]
    evaluated = next(logs["eval_loss"] for logs in run.state.log_history if "eval_loss" in logs)
    assert f"step 4: eval_loss {evaluated:.4f}" in out
    assert "evaluating 2 batches" in out


def test_logs_without_tokens_are_no_trouble(tmp_path):
    console = Console(file=io.StringIO())
    train(tmp_path, ProgressCallback(console), trainer=transformers.Trainer)
    assert "step 4/4 | loss " in shown(console) and "tokens/s" not in shown(console)


def test_on_a_terminal_there_is_a_bar(tmp_path):
    console = terminal()
    train(tmp_path, ProgressCallback(console))
    out = shown(console)
    assert "training" in out and "4/4" in out and "1,234 tokens/s" in out and "evaluating" in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1  # the cursor was hidden and given back
    assert "saved checkpoint-4" in out


def test_a_narrow_terminal_shows_the_most_telling_facts_and_wraps_nothing(tmp_path):
    console = terminal(width=60)
    display = Bar(console)
    display.show(10, 1000, ["loss 1.2345", "0:00:10, 0:16:30 left", "812 tokens/s", "lr 5.00e-05"], logged=True)
    display.close()
    last = shown(console).replace("\x1b[?25h", "").strip().splitlines()[-1].replace("\x1b[2K", "")
    assert last.rstrip().endswith("10/1000  loss 1.2345") and len(last) <= 60


def test_messages_of_the_log_do_not_tear_the_bar(tmp_path, monkeypatch):
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger("luthier"), "handlers", [handler])
    console = terminal()
    display = Bar(console)
    assert handler.stream is not raw
    logging.getLogger("luthier").warning("a message")
    display.close()
    display.close()
    assert handler.stream is raw and sys.stderr is raw
    assert "a message" in shown(console) and "a message" not in raw.getvalue()


def test_the_bars_of_others_are_away_only_while_ours_is_there(tmp_path):
    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            during.append(bars.is_progress_bar_enabled())

    before, during = bars.is_progress_bar_enabled(), []
    for enabled in (True, False):
        bars.enable_progress_bar() if enabled else bars.disable_progress_bar()
        train(tmp_path, ProgressCallback(Console(file=io.StringIO())), Look())
        assert bars.is_progress_bar_enabled() is enabled
    assert during == [False] * 8
    bars.enable_progress_bar() if before else bars.disable_progress_bar()


def test_an_exception_leaves_the_terminal_usable_once_closed(tmp_path):
    class Broken(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ValueError("broken")

    console, before = terminal(), sys.stderr
    callback = ProgressCallback(console)
    try:
        train(tmp_path, callback, Broken())
    except ValueError:
        callback.close()
    assert shown(console).count("\x1b[?25l") == shown(console).count("\x1b[?25h") == 1
    assert sys.stderr is before


def test_evaluation_on_its_own_shows_how_far_it_is(tmp_path):
    console = Console(file=io.StringIO())
    run = train(tmp_path, ProgressCallback(console))
    console.file.truncate(0)
    run.evaluate()
    assert "evaluating 2 batches" in shown(console)


def test_only_rank_zero_speaks(tmp_path):
    console = Console(file=io.StringIO())
    callback = ProgressCallback(console)
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    state = transformers.TrainerState(max_steps=4, is_world_process_zero=False)
    control = transformers.TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"loss": 1.0})
    callback.on_prediction_step(args, state, control)
    callback.on_save(args, state, control)
    callback.on_train_end(args, state, control)
    assert shown(console) == ""


def test_disable_tqdm_means_lines_even_on_a_terminal(tmp_path):
    given = [progress.wanted(SimpleNamespace(training=keys)) for keys in ({"disable_tqdm": True}, {})]
    assert [callback._bar_wanted for callback in given] == [False, True]
    console = terminal()
    train(tmp_path, ProgressCallback(console, bar=False))
    assert "\x1b" not in shown(console) and "step 4/4 | loss" in shown(console)
