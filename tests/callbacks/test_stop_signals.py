"""Signals sent to this very process while a plain transformers Trainer runs in it."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
import transformers
from tests.conftest import build_model

from luthier.callbacks import stop_signals

ROWS = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(16)]


class Send(transformers.TrainerCallback):
    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def trainer(folder, *callbacks, **keys):
    keys = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1} | keys
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, report_to=[], use_cpu=True, disable_tqdm=True, **keys
    )
    made = transformers.Trainer(build_model(), args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=[*callbacks])
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("keys", [{}, {"save_strategy": "epoch", "eval_strategy": "epoch"}])
def test_the_step_in_hand_is_finished_and_saved(tmp_path, capfd, number, keys):
    before = signal.getsignal(number)
    callback = stop_signals.wanted(None)
    run = trainer(tmp_path, callback, Send(3, number), **keys)
    run.train()
    assert run.state.global_step == 4
    assert callback.stopped_by == number
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").exists()
    evaluated = [logs["step"] for logs in run.state.log_history if "eval_loss" in logs]
    assert evaluated == ([] if keys else [1, 2, 3])  # nobody waits for one more
    assert signal.getsignal(number) == before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_going_on_from_there_gives_what_a_straight_run_gives(tmp_path):
    straight = trainer(tmp_path / "straight")
    straight.train()
    trainer(tmp_path / "broken", stop_signals.wanted(None), Send(2, signal.SIGTERM)).train()
    resumed = trainer(tmp_path / "broken", stop_signals.wanted(None))
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "keys, said", [({}, "Start the same command again"), ({"save_only_model": True}, "a run can begin from them")]
)
def test_it_says_what_the_checkpoint_is_good_for(tmp_path, caplog, keys, said):
    caplog.set_level("INFO", logger="luthier")
    trainer(tmp_path, stop_signals.wanted(None), Send(1, signal.SIGTERM), eval_strategy="no", **keys).train()
    (line,) = [record.message for record in caplog.records if "saving checkpoint-2" in record.message]
    assert said in line


def test_a_second_interrupt_does_not_wait(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(tmp_path, stop_signals.wanted(None), Send(2, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_sigterm_changes_nothing(tmp_path):
    callback = stop_signals.wanted(None)
    run = trainer(tmp_path, callback, Send(2, signal.SIGTERM, signal.SIGTERM))
    run.train()
    assert run.state.global_step == 3 and callback.stopped_by == signal.SIGTERM


def test_a_signal_in_the_last_step_lets_the_run_end_as_it_would(tmp_path):
    callback = stop_signals.wanted(None)
    run = trainer(tmp_path, callback, Send(5, signal.SIGTERM))
    run.train()
    assert run.state.global_step == 6 and callback.stopped_by is None


def test_handlers_come_back_after_an_exception(tmp_path):
    class Broken(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ValueError("broken")

    before = signal.getsignal(signal.SIGTERM)
    callback = stop_signals.wanted(None)
    with pytest.raises(ValueError, match="broken"):
        trainer(tmp_path, callback, Broken()).train()
    callback.close()
    callback.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    seen, errors = [], []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(signal.getsignal(signal.SIGTERM))

    def work():
        try:
            trainer(tmp_path, stop_signals.wanted(None), Look()).train()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and set(seen) == {before}


def test_ranks_agree_on_the_signal_any_of_them_received(monkeypatch):
    votes = {"other rank": int(signal.SIGTERM)}

    def all_reduce(tensor, op):
        tensor.fill_(max(int(tensor), votes["other rank"]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    callback = stop_signals.StopSignals()
    args = transformers.TrainingArguments(report_to=[], use_cpu=True)
    control = transformers.TrainerControl()
    callback.on_step_end(args, transformers.TrainerState(global_step=1, max_steps=4), control)
    assert control.should_training_stop and control.should_save and callback.stopped_by == signal.SIGTERM
