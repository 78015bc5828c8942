"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from tests.exact.runs import at, furthest, items_for, objective_of, trainer_for, weights
from transformers import EarlyStoppingCallback

from luthier.callbacks.schedule_free import Average
from luthier.callbacks.stop_signals import StopSignals
from luthier.core.config import keys_of
from luthier.core.errors import CheckpointError, ConfigError
from luthier.core.registry import find
from luthier.optim._task import Task
from luthier.run import OWNERS, load_owner, resolve
from luthier.train import checkpoint, resume
from luthier.train.keys import training_keys
from luthier.train.loop_state import LoopState, load
from luthier.train.optimiser import choose
from luthier.train.sampler import Bundles

RUN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "template": "chatml", "val_size": 3}


def stored(folder: Path, rows: int = 8, world: int = 1, **keys) -> Path:
    """A checkpoint of a run with these keys."""
    (folder / "resolved_config.yaml").write_text(resolve(RUN | keys).to_yaml())
    LoopState(world=world, rows_per_step=rows, data="abc").save(folder, 0)
    return folder


def check(folder: Path, rows: int = 8, allow: bool = False, **keys) -> None:
    resume.check_config(folder, resolve(RUN | keys).to_yaml(), rows_per_step=rows, allow=allow)


# The same run?


def test_every_free_key_is_somebodys():
    for table in (resume.FREE, resume.EVALUATION):
        for owner, names in table.items():
            if names != resume.ALL:
                known = training_keys() if owner == "training" else keys_of(load_owner(OWNERS[owner]))
                assert set(names.split()) <= set(known), owner


@pytest.mark.parametrize(
    "then, now, listed",
    [
        ({"learning_rate": 1e-4}, {"learning_rate": 2e-4}, "learning_rate: 0.0001 then, 0.0002 now"),
        ({}, {"lora_rank": 16}, "lora_rank: 8 then, 16 now"),
        ({}, {"cutoff_len": 64}, "cutoff_len: 2048 then, 64 now"),
        ({}, {"seed": 1}, "seed: 42 then, 1 now"),
        ({}, {"max_samples": 7}, "max_samples: None then, 7 now"),
        ({}, {"packing": True}, "packing: None then, True now"),
        ({"num_train_epochs": 1}, {"num_train_epochs": 2}, "num_train_epochs: 1.0 then, 2.0 now"),
        ({}, {"mix_strategy": "interleave_over"}, "mix_strategy"),
        ({}, {"model_name_or_path": "other"}, "model_name_or_path: 'm' then, 'other' now"),
        ({"stage": "dpo"}, {"stage": "dpo", "pref_beta": 0.5}, "pref_beta: 0.1 then, 0.5 now"),
    ],
)
def test_what_decides_what_is_learnt_must_not_change(tmp_path, said, then, now, listed):
    folder = stored(tmp_path, **then)
    with pytest.raises(ConfigError, match="allow_config_change") as caught:
        check(folder, **now)
    assert listed in str(caught.value) and str(caught.value).count(" then, ") == 1
    check(folder, allow=True, **now)
    assert listed in said[-1]


@pytest.mark.parametrize(
    "now",
    [
        {"output_dir": "elsewhere", "logging_steps": 3, "save_steps": 7, "save_total_limit": 1, "report_to": "none"},
        {"dataloader_num_workers": 2, "preprocessing_num_workers": 2, "data_cache_dir": "c", "dataset_dir": "there"},
        {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 1},
        {"async_save": True, "skip_bad_steps": 3, "allow_config_change": True, "overwrite_output_dir": False},
        {"disable_gradient_checkpointing": False, "plot_loss": True, "top_p": 0.5, "layout": "padded"},
    ],
)
def test_what_only_says_where_and_how_may_change(tmp_path, said, now):
    check(stored(tmp_path), **now)
    assert said == []


def test_evaluations_may_change_only_where_nothing_hangs_on_them(tmp_path):
    steered = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    folder = stored(tmp_path, **steered)
    with pytest.raises(ConfigError, match="eval_steps: 2.0 then, 1.0 now"):
        check(folder, **steered | {"eval_steps": 1})


def test_a_step_may_be_cut_otherwise_if_it_keeps_its_rows(tmp_path):
    folder = stored(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    check(folder, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(ConfigError, match="per_device_train_batch_size: 4 then, 2 now"):
        check(folder, rows=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_other_data_are_noticed(tmp_path, said):
    def mark(lengths, bundles=None):
        import numpy as np

        examples = SimpleNamespace(tree_tokens=np.array(lengths), path_tokens=np.array(lengths))
        return resume.data_mark(Bundles(examples, bundles))

    marks = [mark([5, 7]), mark([7, 5]), mark([5, 7, 1]), mark([5, 7], [[0, 1]]), mark([5, 7], [[0], [1]])]
    assert len(set(marks)) == 5 and mark([5, 7]) == marks[0]
    folder = stored(tmp_path)
    resume.check_data(folder, "abc", allow=False)
    resume.check_data(folder, "", allow=True)
    with pytest.raises(ConfigError, match="training data are not those"):
        resume.check_data(folder, "other", allow=False)


@pytest.mark.parametrize(
    "world, batch, accumulate, changes",
    [
        (2, 2, 2, {}),
        (4, 2, 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}),
        (1, 2, 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (8, 2, 2, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}),
        (1, 3, 1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (4, 1, 2, {}),
        (3, 2, 2, {}),
    ],
)
def test_a_step_keeps_its_rows_on_another_number_of_processes(tmp_path, said, world, batch, accumulate, changes):
    folder = stored(tmp_path, rows=8, world=2)
    args = SimpleNamespace(world_size=world, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
                           deepspeed=None)  # fmt: skip
    assert resume.same_step(folder, args) == changes
    assert bool(said) is (world != 2)
    for name, value in changes.items():
        assert f"{name}: {value}" in said[0]


def test_parts_of_zero_belong_to_their_processes(tmp_path):
    folder = stored(tmp_path, world=2)
    (folder / "global_step4").mkdir()
    args = SimpleNamespace(world_size=1, per_device_train_batch_size=1, gradient_accumulation_steps=1, deepspeed="z")
    with pytest.raises(CheckpointError, match="Start 2 processes"):
        resume.same_step(folder, args)


@pytest.mark.parametrize("key, name", [("model_name_or_path", "m"), ("adapter_name_or_path", "a")])
def test_weights_alone_are_not_gone_on_with_in_silence(tmp_path, said, key, name):
    (folder,) = made(tmp_path, 4, ends=8)
    with pytest.raises(CheckpointError, match=f"weights alone .*{key}: {folder}.*allow_config_change: true"):
        resume.check_states(folder, key=key, allow=False)
    resume.check_states(folder, key=key, allow=True)
    assert len(said) == 1 and "a fresh optimiser" in said[0]
    for whole in ("scheduler.pt", "global_step4/here"):
        (folder / whole).parent.mkdir(exist_ok=True)
        (folder / whole).touch()
        resume.check_states(folder, key=key, allow=False)
        (folder / whole).unlink()
        (folder / "global_step4").exists() and (folder / "global_step4").rmdir()
    resume.check_states(*made(tmp_path, 8, ends=8), key=key, allow=False)  # no step is left to be taken
    assert len(said) == 1


def test_sums_of_a_log_line_are_taken_over_by_fewer_processes(tmp_path):
    for rank, loss in enumerate((1.0, 3.0)):
        meter = {"tokens": 9, "trained": 5.0, "steps": 1, "dropped": 0, "sums": {"accuracy": loss}}
        LoopState(world=2, loss=loss, meter=meter).save(tmp_path, rank)
    alone = load(tmp_path, 0, 1)
    assert alone.loss == 2.0 and alone.meter["sums"] == {"accuracy": 4.0} and alone.meter["tokens"] == 9
    assert [load(tmp_path, rank, 3).meter["sums"]["accuracy"] for rank in range(3)] == [4.0, 0.0, 0.0]
    assert load(tmp_path, 1, 2).loss == 3.0


# Which checkpoint?


def arguments(folder: Path, **changes):
    return SimpleNamespace(output_dir=str(folder), do_train=True, process_index=0, world_size=1, **changes)


def made(folder: Path, *steps: int, ends: int = 99) -> list[Path]:
    found = []
    for step in steps:
        made = folder / f"checkpoint-{step}"
        made.mkdir(parents=True)
        (made / checkpoint.STATE).write_text(f'{{"global_step": {step}, "max_steps": {ends}}}')
        found.append(made)
    return found


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_overwriting_puts_old_checkpoints_aside_until_there_is_a_new_one(tmp_path, said):
    made(tmp_path, 2, 40)
    assert resume.choose(arguments(tmp_path), asked=None, overwrite=True) is None
    assert names(tmp_path) == [".replaced-checkpoint-2", ".replaced-checkpoint-40"]
    assert len(said) == 1 and "does not go on from" in said[0] and "checkpoint-40" in said[0]
    (new,) = made(tmp_path, 2)
    checkpoint.rotate(tmp_path, new, keep=None, best=None)
    assert names(tmp_path) == ["checkpoint-2"]


def test_an_earlier_checkpoint_begins_another_line(tmp_path, said):
    two, *_ = made(tmp_path, 2, 4, 6)
    assert resume.choose(arguments(tmp_path), asked=str(two), overwrite=False) == two
    assert names(tmp_path) == [".replaced-checkpoint-4", ".replaced-checkpoint-6", "checkpoint-2"]


def test_a_run_that_began_from_another_ones_checkpoint_goes_on_from_its_own(tmp_path, said):
    (theirs,) = made(tmp_path / "other", 4)
    assert resume.choose(arguments(tmp_path / "mine"), asked=str(theirs), overwrite=False) == theirs
    (own,) = made(tmp_path / "mine", 6)
    assert resume.choose(arguments(tmp_path / "mine"), asked=str(theirs), overwrite=False) == own
    assert resume.choose(arguments(tmp_path / "mine"), asked=str(theirs), overwrite=True) == theirs


def test_what_was_written_before_the_launcher_restarted_its_processes_counts(tmp_path, said, monkeypatch):
    (own,) = made(tmp_path, 6)
    now = (own / checkpoint.STATE).stat().st_mtime
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv(resume.STARTED, str(now - 5))
    assert resume.choose(arguments(tmp_path), asked=None, overwrite=True) == own
    monkeypatch.setenv(resume.STARTED, str(now + 5))
    assert resume.choose(arguments(tmp_path), asked=None, overwrite=True) is None


def test_a_named_checkpoint_must_be_whole(tmp_path, said):
    from luthier.core import manifest

    four, six = made(tmp_path, 4, 6)
    manifest.seal(six)
    (six / checkpoint.STATE).write_text("{}")
    with pytest.raises(CheckpointError, match=f"checkpoint-6 is damaged: trainer_state.json.*{four}"):
        resume.choose(arguments(tmp_path), asked=str(six), overwrite=False)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        resume.choose(arguments(tmp_path / "none"), asked=True, overwrite=False)
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="already holds a trained model"):
        resume.choose(arguments(tmp_path / "done"), asked=None, overwrite=False)


# What a run counts besides weights

OPTIONS = {
    "batch": 1,
    "accumulate": 2,
    "optim": "adamw_torch",
    "lr": 1e-2,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_grad_norm": 1.0,
}
MOVING = ("_runtime", "_per_second", "total_flos")


def history(trainer) -> list[dict]:
    """The log without what says how fast it went."""
    return [{k: v for k, v in e.items() if not k.endswith(MOVING)} for e in trainer.state.log_history]


def resumed(folder: Path, step: int, prepare=lambda trainer: None, **options):
    trainer = trainer_for("sft", folder, **OPTIONS | options)
    prepare(trainer)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs without a break, by what they log and evaluate."""
    done: dict[str, tuple] = {}

    def run(**options):
        key = str(options)
        if key not in done:
            folder = tmp_path_factory.mktemp("straight")
            done[key] = trainer_for("sft", folder, **OPTIONS | {"save_steps": 3} | options), folder
            done[key][0].train()
        return done[key]

    return run


@pytest.mark.parametrize("step", [3, 6, 12])
@pytest.mark.parametrize(
    "logging",
    [
        {"logging_steps": 5, "eval_strategy": "epoch", "eval_on_start": True},
        {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 4},
    ],
)
def test_means_and_evaluations_are_those_of_the_straight_run(straight, step, logging):
    once, folder = straight(**logging)
    again = resumed(folder, step, **logging | {"save_strategy": "no"})
    assert history(again) == history(once)
    assert again.state.global_step == 12 and furthest(weights(once), weights(again)) == 0.0


BY_EVALUATION = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "logging_strategy": "epoch",
    "metric_for_best_model": "loss",
}


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (6, {"save_strategy": "best"}),
        (5, {"save_strategy": "best", "max_steps": 5}),
        (8, {"save_steps": 2, "lr": 30.0, "optim": "sgd", "lr_scheduler_type": "constant"}),
    ],
    ids=["best at the end of an epoch", "best at the last step", "stopped early"],
)
def test_a_checkpoint_that_an_evaluation_decided_about_has_the_line_of_its_epoch(tmp_path, step, options):
    def patient(trainer):
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))

    once = trainer_for("sft", tmp_path, **OPTIONS | BY_EVALUATION | options)
    patient(once)
    once.train()
    assert [p.name for p in checkpoint.complete(tmp_path)][-1 if step != 6 else 2] == f"checkpoint-{step}"
    again = resumed(tmp_path, step, patient, **BY_EVALUATION | options)
    assert history(again) == history(once)


def test_a_finished_run_takes_no_step_more(tmp_path):
    straight = trainer_for("sft", tmp_path, **OPTIONS | {"max_steps": 4})
    straight.train()
    again = resumed(tmp_path, 4, max_steps=4)
    assert again.state.global_step == 4 and furthest(weights(straight), weights(again)) == 0.0


@pytest.mark.parametrize("step", [4, 6])
def test_a_signal_takes_no_evaluation_and_no_line_away(tmp_path, straight, step):
    options = {"eval_strategy": "steps", "eval_steps": 2, "logging_strategy": "epoch", "save_strategy": "no"}
    once, _ = straight(**options)
    first = trainer_for("sft", tmp_path / "stopped", **OPTIONS | options)
    first.add_callback(StopSignals())
    at(first, "on_step_begin", lambda state: state.global_step + 1 == step and os.kill(os.getpid(), 15))
    first.train()
    assert first.state.global_step == step
    assert [p.name for p in checkpoint.complete(tmp_path / "stopped")] == [f"checkpoint-{step}"]
    again = resumed(tmp_path / "stopped", step, lambda trainer: trainer.add_callback(StopSignals()), **options)

    def lines(trainer):
        # An evaluation that was put off comes after the line of the epoch that ended with it, not before it.
        return sorted(history(trainer), key=lambda entry: (entry["step"], "eval_loss" in entry))

    assert lines(again) == lines(once)


def test_patience_survives_and_a_run_that_was_to_end_ends(tmp_path):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "load_best_model_at_end": True,
        "lr": 30.0,
        "optim": "sgd",
    }

    def patient(trainer):
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3))

    straight = trainer_for("sft", tmp_path, **OPTIONS | options)
    patient(straight)
    straight.train()
    end = straight.state.global_step
    assert end < 12, "it was stopped"
    for step in (end - 1, end):
        again = resumed(tmp_path, step, patient, **options)
        assert again.state.global_step == end
        assert furthest(weights(straight), weights(again)) == 0.0


BEST = {"eval_strategy": "steps", "eval_steps": 1, "lr": 30.0, "optim": "sgd", "load_best_model_at_end": True}
BEST |= {"metric_for_best_model": "loss", "lr_scheduler_type": "constant"}


def test_the_best_checkpoint_is_found_where_its_folder_was_moved_and_refused_where_it_is_damaged(tmp_path):
    once = trainer_for("sft", tmp_path / "first", **OPTIONS | BEST)
    once.train()
    best = Path(once.state.best_model_checkpoint)
    assert checkpoint.step_of(best) < 9 < once.state.global_step, "the last model is not the best one"
    (tmp_path / "first").rename(tmp_path / "second")
    again = resumed(tmp_path / "second", 10, **BEST)
    assert furthest(weights(once), weights(again)) == 0.0
    damaged = tmp_path / "second" / best.name / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-8] + bytes(8))
    with pytest.raises(CheckpointError, match=f"load_best_model_at_end: {damaged.parent} is damaged: {damaged.name}"):
        resumed(tmp_path / "second", 10, **BEST)
    shutil.rmtree(damaged.parent)
    last = resumed(tmp_path / "second", 12, **BEST)
    assert furthest(weights(once), weights(last)) > 1e-3, "the model of the last step"


def plans(**keys) -> dict:
    """An optimiser by the keys that ask for it, as a run would be given it."""
    given = {key: keys.pop(key) for key in list(keys) if not key.startswith(("use_", "galore_", "apollo_", "badam_"))}
    configs = {name: find("optim", name).Config for name in ("muon", "galore", "apollo", "badam", "adam_mini")}
    chosen = {n: c(**{k: v for k, v in keys.items() if k in c.__dataclass_fields__}) for n, c in configs.items()}
    arguments = {"learning_rate": 1e-2, "optim": "adamw_torch", "use_cpu": True, "report_to": "none"} | given
    task = Task(transformers.TrainingArguments(output_dir="unused", **arguments), adapter=False)
    return {"optimizer_cls_and_kwargs": choose(chosen, task)}


OPTIMISERS = {
    "muon": ("torch", {"use_muon": True}),
    "galore": ("galore_torch", {"use_galore": True, "galore_rank": 4, "galore_update_interval": 2}),
    "apollo": ("apollo_torch", {"use_apollo": True, "apollo_rank": 4, "apollo_update_interval": 2}),
    "badam": ("badam", {"use_badam": True, "badam_switch_interval": 2}),
    "adam_mini": ("adam_mini", {"use_adam_mini": True}),
    "schedule_free": ("schedulefree", {"optim": "schedule_free_adamw", "warmup_steps": 2}),
    "8 bit": ("bitsandbytes", {"optim": "adamw_bnb_8bit"}),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.filterwarnings("ignore:BAdam expect", "ignore:This implementation of AdamW")
def test_every_optimiser_goes_on_and_leaves_steps_out(tmp_path, said, name):
    """Under a schedule, from the middle; a step that is left out changes neither a weight nor a state."""
    package, keys = OPTIMISERS[name]
    pytest.importorskip(package)
    own = {} if "optim" in keys else plans(**keys)
    options = {"dtype": torch.float32, "num_train_epochs": 1, **(keys if "optim" in keys else {})}

    def prepare(trainer):
        if name == "schedule_free":
            trainer.add_callback(Average())

    def built():
        trainer = trainer_for("sft", tmp_path, own=own | {"skip_bad_steps": 1}, **OPTIONS | options)
        prepare(trainer)
        return trainer

    once = built()
    once.train()
    again = built()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert furthest(weights(once), weights(again)) == 0.0 and said == []

    skips, seen = built(), {}
    ask = skips.ask

    def spoil(model, batch):
        loss, logs = ask(model, batch)
        return loss * (float("nan") if skips.state.global_step == 2 else 1), logs

    def look(state):
        seen[state.global_step] = [*weights(skips).values(), *tensors(skips.optimizer.state_dict())]

    skips.ask = spoil
    at(skips, "on_step_end", look)
    skips.train()
    assert len(said) == 1 and "left out" in said[0]
    same = [all(map(torch.equal, seen[step], seen[step + 1])) for step in (1, 2, 3)]
    assert same == [False, True, False]


def tensors(state) -> list[torch.Tensor]:
    """All numbers of a nest, but the learning rate, which goes on."""
    if isinstance(state, torch.Tensor):
        return [state.detach().clone()]
    if isinstance(state, dict):
        return [t for key, value in state.items() if key not in ("lr", "rates", "scheduled_lr") for t in tensors(value)]
    if isinstance(state, list | tuple):
        return [t for value in state for t in tensors(value)]
    return [torch.tensor(state)] if isinstance(state, int | float) and state == state else []


def test_tensorboard_goes_on_where_it_wrote_and_shows_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"report_to": "tensorboard", "logging_steps": 1, "num_train_epochs": 1}
    once = trainer_for("sft", tmp_path, **OPTIONS | options)
    once.train()
    again = resumed(tmp_path, 3, **options)
    (folder,) = (tmp_path / "runs").iterdir()
    found = EventAccumulator(str(folder)).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6] and len(list(folder.iterdir())) == 2
    logged = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert [loss for _, loss in shown] == pytest.approx(logged)


@pytest.mark.parametrize("accumulate, seen", [(4, 3), (1, 3)])
def test_steps_of_another_size_go_on_where_the_data_were_left(tmp_path, accumulate, seen):
    """Two rows a step become four or one: every row of both epochs is trained once, up to one step's rows."""
    items = items_for(objective_of("sft"), 12)
    first = trainer_for("sft", tmp_path, items=items, **OPTIONS | {"save_steps": seen})
    first.train()
    again = trainer_for("sft", tmp_path, items=items, **OPTIONS | {"accumulate": accumulate, "save_strategy": "no"})
    rows = []
    ask = again.ask
    again.ask = lambda model, batch: rows.extend(batch.names) or ask(model, batch)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{seen}"))
    left = 2 * 12 - seen * 2
    assert left <= len(rows) <= left + accumulate - 1
    assert len(set(rows[-12:])) == 12, "the second epoch is whole"
    assert again.state.global_step == again.state.max_steps
    assert again.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-9), "the rate ends where it should"


@pytest.mark.parametrize("packed, accumulate, total", [(False, 1, 24), (False, 4, 6), (True, 1, 10), (True, 4, 4)])
def test_the_rate_follows_its_closed_form_over_a_resume_and_packed_rows(tmp_path, packed, accumulate, total):
    import math

    items = items_for(objective_of("sft"), 12)
    options = {"items": items, "layout": "packed" if packed else "padded", **OPTIONS, "accumulate": accumulate}
    options["save_steps"] = total // 2 + 1

    def bundled(trainer):
        if packed:
            trainer.train_dataset = Bundles(items, [[0, 1], [2, 3, 4], [5], [6, 7, 8], [9, 10, 11]])

    trainer = trainer_for("sft", tmp_path, **options)
    bundled(trainer)
    trainer.train()
    again = resumed(tmp_path, total // 2 + 1, bundled, **options)
    rates = [entry["learning_rate"] for entry in again.state.log_history if "loss" in entry]
    expected = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / total)) for step in range(total)]
    assert rates == pytest.approx(expected, abs=1e-12)


def test_random_numbers_of_a_new_process_are_always_the_same(tmp_path):
    options = OPTIONS | {"num_train_epochs": 1, "save_steps": 4}
    trainer_for("sft", tmp_path, **options).train()
    (tmp_path / "checkpoint-4" / "rng_state.pth").unlink()
    drawn = []
    for _ in range(2):
        torch.rand(1)
        again = trainer_for("sft", tmp_path, **options)
        at(again, "on_step_begin", lambda state: drawn.append(float(torch.rand(1))))
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert drawn[:2] == drawn[2:] and len(drawn) == 4


def test_sections_are_read_by_owner():
    run = resolve(RUN | {"lora_rank": 4})
    found = resume.sections(run.to_yaml())
    assert found["adapter_keys"]["lora_rank"] == 4 and found["training"]["output_dir"] == "o"
    assert {key: value for part in found.values() for key, value in part.items()} == yaml.safe_load(run.to_yaml())
