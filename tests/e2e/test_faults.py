"""Killed anywhere and started again with the same command, a run ends bitwise where it would have ended."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from luthier import cli
from luthier import fit as fit_module
from luthier.core import locks, log, manifest
from luthier.core.errors import ConfigError
from luthier.run import resolve
from luthier.train import checkpoint
from tests.e2e.killing import differing, in_child, in_ranks, left_behind, moment, straight, train
from tests.exact.runs import furthest, trainer_for, weights

pytestmark = pytest.mark.e2e

KILLS = 20


def configuration(folder: Path, model: Path, name: str, **changes) -> dict[str, object]:
    """A run in which everything that has a state has one: packing, interleaving, dropout, accumulation, epochs."""
    for file, count in (("few.jsonl", 10), ("more.jsonl", 16)):
        rows = [{"instruction": f"{file} {n}", "input": "", "output": f"{n} " * (n % 5 + 1)} for n in range(count)]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "template": "chatml",
        "dataset": f"{folder / 'few.jsonl'},{folder / 'more.jsonl'}",
        "mix_strategy": "interleave_once",
        "data_cache_dir": str(folder / "cache"),
        "cutoff_len": 96,
        "packing": True,
        "val_size": 3,
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "output_dir": str(folder / name),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 2,
        "logging_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "metric_for_best_model": "loss",
        **changes,
    }


def kill_often(keys, kills: int, events: int, seed: int, first: Sequence[int] = ()):
    """Run again and again, each time in a folder of its own until it is done; gives each folder as it is done.

    keys: the configuration of the nth run. Checkpoints are written beside training in every other run.
    first: the events at which the first of the other runs are killed first; all other kills are at random.
    """
    rng, done, runs, named = random.Random(seed), 0, 0, list(first)
    while done < kills or named:
        runs += 1
        these = keys(runs)
        at = named.pop(0) if named and runs % 2 else rng.randint(1, events)
        while (code := train(these, die_at=at if done < kills else -1)) == -signal.SIGKILL:
            done += 1
            at = rng.randint(1, events)
        assert code == 0
        yield Path(str(these["output_dir"]))


def test_killed_at_random_points_it_ends_bitwise_the_same(tmp_path, model_folder):
    events = straight(configuration(tmp_path, model_folder, "straight"))
    expected = left_behind(tmp_path / "straight")
    assert len(expected["log"]) > 5, "there is something to compare"
    named = [
        moment(events, "evaluation_loop begins", "ask begins"),
        moment(events, *["training_step ends", "step ends"] * 4, "log begins"),
        moment(events, "publish begins", "publish ends", "publish begins", "seal begins", "flush ends"),
        moment(events, *["rotate begins"] * 3, "rmtree begins"),
    ]

    def keys(run: int):
        return configuration(tmp_path, model_folder, f"run-{run}", async_save=run % 2 == 0)

    folders = list(kill_often(keys, KILLS, len(events), seed=7, first=named))
    assert len(folders) > 1
    for folder in folders:
        assert differing(expected, left_behind(folder)) == [], folder.name


def test_a_stream_goes_on_at_the_row(tmp_path, model_folder):
    stream = {"streaming": True, "max_steps": 6, "val_size": 0, "eval_strategy": "no", "buffer_size": 8}
    stream |= {"eval_dataset": None, "metric_for_best_model": None, "mix_strategy": "interleave_over"}
    events = straight(configuration(tmp_path, model_folder, "straight", **stream))
    expected = left_behind(tmp_path / "straight")
    for folder in kill_often(
        lambda run: configuration(tmp_path, model_folder, f"run-{run}", **stream), 3, len(events), 3
    ):
        assert differing(expected, left_behind(folder)) == [], folder.name


def test_mixed_rows_of_another_process_packed_under_an_optimiser_of_its_own(tmp_path, model_folder):
    """Killed in the fifth of eight steps, and the same command again."""
    own = {"mix_strategy": "interleave_over", "dataloader_num_workers": 1, "finetuning_type": "full", "use_muon": True}
    own |= {"eval_strategy": "no", "metric_for_best_model": None, "logging_steps": 3, "max_steps": 8, "save_steps": 2}
    events = straight(configuration(tmp_path, model_folder, "straight", **own))
    keys = configuration(tmp_path, model_folder, "killed", **own)
    assert train(keys, die_at=moment(events, *["step ends"] * 4, "training_step begins")) == -signal.SIGKILL
    assert [folder.name for folder in checkpoint.complete(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-4"]
    assert train(keys) == 0
    assert differing(left_behind(tmp_path / "straight"), left_behind(tmp_path / "killed")) == []


@pytest.mark.parametrize("stage", ["kto", "rm"])
def test_a_survey_before_each_step_and_a_head_survive_a_kill(tmp_path, stage):
    """With noise in the embeddings, which also the survey draws."""
    options = {"batch": 1, "accumulate": 2, "optim": "adamw_torch", "lr": 1e-2, "neftune_noise_alpha": 5.0}
    options |= {"save_strategy": "steps", "save_steps": 2, "layout": "padded"}
    once = trainer_for(stage, tmp_path / "once", **options)
    once.train()

    def dies() -> None:
        trainer = trainer_for(stage, tmp_path / "killed", **options)
        step = trainer.training_step
        trainer.training_step = lambda *args: os.kill(os.getpid(), 9) if trainer.state.global_step == 3 else step(*args)
        trainer.train()

    assert in_child(dies) == -signal.SIGKILL
    again = trainer_for(stage, tmp_path / "killed", **options)
    again.train(resume_from_checkpoint=str(checkpoint.last_whole(tmp_path / "killed")))
    assert once.state.global_step == again.state.global_step == 6
    assert furthest(weights(once), weights(again)) == 0.0
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (once, again)]
    assert losses[0] == losses[1]


def test_two_runs_do_not_write_into_one_folder(tmp_path, model_folder, monkeypatch):
    """The second is told so, and changes nothing there; nobody holds the folder when a run was killed, whatever it
    left behind."""
    keys = configuration(tmp_path, model_folder, "run", eval_strategy="no", metric_for_best_model=None, max_steps=2)
    monkeypatch.setattr(fit_module, "PATIENCE", 0.2)
    folder, told, orphan = tmp_path / "run", tmp_path / "told", tmp_path / "orphan"

    def first() -> None:
        with locks.alone(folder, patience=0) as free:
            assert free
            (folder / ".partial-checkpoint-1").mkdir()
            if not (child := os.fork()):  # as those that load data
                signal.pause()
            orphan.write_text(str(child))
            with pytest.raises(ConfigError, match="another run is training into") as caught:
                fit_module.fit(resolve(keys))
            told.write_text(str(caught.value))
            assert (folder / ".partial-checkpoint-1").is_dir()
            os.kill(os.getpid(), signal.SIGKILL)

    folder.mkdir()
    try:
        assert in_child(first) == -signal.SIGKILL
        assert str(folder) in told.read_text()
        assert train(keys) == 0
    finally:
        os.kill(int(orphan.read_text()), signal.SIGKILL)


# What the command line says


def command(folder: Path, keys: dict[str, object], limit: int | None = None, word: str = "train") -> tuple[int, str]:
    """`luthier train` in a child on which no file may grow beyond `limit` bytes: exit code and stderr."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(keys))
    said = folder / "stderr.txt"

    def work() -> None:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", buffering=0, closefd=False), write_through=True)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        raise SystemExit(cli.main([word, str(config)]))

    return in_child(work), said.read_text()


def test_a_final_model_that_cannot_be_written_is_exit_code_2_and_one_message(tmp_path, model_folder):
    keys = configuration(tmp_path, model_folder, "run", save_strategy="no", eval_strategy="no", max_steps=2)
    keys |= {"metric_for_best_model": None, "val_size": 0}
    assert command(tmp_path, keys | {"output_dir": str(tmp_path / "first")})[0] == 0  # the data are cached now
    code, said = command(tmp_path, keys, limit=12_000)
    assert code == 2, said
    (error,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "Could not write the trained model" in error and "Traceback" not in said
    assert not list((tmp_path / "run").glob("*.safetensors")) and not list((tmp_path / "run").glob(".partial*"))


def test_a_signal_whose_checkpoint_cannot_be_written_is_exit_code_2(tmp_path, model_folder):
    plugin = tmp_path / "mine" / "callbacks" / "stop.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(
        "import os\nfrom transformers import TrainerCallback\n"
        "class Stop(TrainerCallback):\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        "        if state.global_step == 1:\n            os.kill(os.getpid(), 15)\n"
        "def wanted(run):\n    return Stop()\n"
    )
    keys = configuration(
        tmp_path, model_folder, "run", save_strategy="no", eval_strategy="no", plugins=str(tmp_path / "mine")
    )
    keys |= {"metric_for_best_model": None, "val_size": 0}
    code, said = command(tmp_path, keys)
    assert code == 128 + 15 and manifest.damage(tmp_path / "run" / "checkpoint-2") is None
    code, said = command(tmp_path, keys | {"output_dir": str(tmp_path / "full")}, limit=12_000)
    assert code == 2 and "checkpoint 2" in said and "is lost" in said and "Traceback" not in said, said


def test_weights_alone_are_not_gone_on_with_in_silence(tmp_path, model_folder):
    keys = configuration(tmp_path, model_folder, "run", save_only_model=True, eval_strategy="no", save_steps=1)
    keys |= {"metric_for_best_model": None, "val_size": 0}
    assert train(keys, die_at=300) == -signal.SIGKILL
    (*_, last) = checkpoint.complete(tmp_path / "run")
    assert checkpoint.step_of(last) < 8
    code, said = command(tmp_path, keys)
    assert code == 2 and f"error: {last} holds weights alone" in said, said
    assert f"adapter_name_or_path: {last}" in said and "allow_config_change: true" in said


def test_memory_that_really_runs_out_is_said_in_full(tmp_path, model_folder):
    rows = [{"instruction": "long", "input": "", "output": "word " * 500}] * 8
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = configuration(tmp_path, model_folder, "run", eval_strategy="no", save_strategy="no", packing=False)
    keys |= {"metric_for_best_model": None, "val_size": 0, "dataset": str(tmp_path / "long.jsonl"), "layout": "padded"}
    keys |= {"per_device_train_batch_size": 8, "cutoff_len": 2048, "mix_strategy": "concat", "verify_layout": False}
    plugin = tmp_path / "mine" / "callbacks" / "narrow.py"
    plugin.parent.mkdir(parents=True)
    # Room for little more than there is when training begins.
    plugin.write_text(
        "import resource\nfrom pathlib import Path\nfrom transformers import TrainerCallback\n"
        "class Narrow(TrainerCallback):\n"
        "    def on_train_begin(self, args, state, control, **kwargs):\n"
        "        now = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (now + 2**24, resource.RLIM_INFINITY))\n"
        "def wanted(run):\n    return Narrow()\n"
    )
    code, said = command(tmp_path, keys | {"plugins": str(tmp_path / "mine")})
    assert code == 2 and "Traceback" not in said, said
    for words in ("Out of memory at step 1", "Estimated beforehand", "GiB", "long.jsonl", "auto_find_batch_size: true"):
        assert words in said, (words, said)


# Two processes

RANKS = {"batch": 1, "accumulate": 2, "ddp_backend": "gloo", "optim": "adamw_torch", "lr": 1e-2, "max_grad_norm": 1.0}
RANKS |= {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine", "logging_steps": 2}


def ranks(folder: Path, prepare=lambda trainer, rank: None, resume: Path | None = None, **options) -> list[int]:
    """Two processes train; rank 0 leaves weights.pt in `folder`."""

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        sys.stderr = (folder.parent / f"stderr-{rank}.txt").open("a")
        log.set_up()
        trainer = trainer_for("sft", folder, ddp_find_unused_parameters=False, **RANKS | options)
        prepare(trainer, rank)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if rank == 0:
            torch.save(weights(trainer), folder / "weights.pt")

    return in_ranks(work)


def test_one_of_two_processes_dies_and_two_or_one_go_on(tmp_path):
    def dies(trainer, rank):
        step = trainer.training_step

        def training_step(*args):
            if rank == 1 and trainer.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        trainer.training_step = training_step

    assert ranks(tmp_path / "straight") == [0, 0]
    codes = ranks(tmp_path / "killed", dies)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    last = checkpoint.last_whole(tmp_path / "killed")
    assert last is not None and last.name == "checkpoint-2"
    # One process takes the same rows in a step if it accumulates twice as many.
    alone = trainer_for("sft", tmp_path / "alone", **RANKS | {"accumulate": 4, "ddp_backend": None})
    alone.train(resume_from_checkpoint=str(last))
    assert ranks(tmp_path / "killed", resume=last) == [0, 0]
    expected, found = (torch.load(tmp_path / name / "weights.pt") for name in ("straight", "killed"))
    assert furthest(expected, found) == 0.0
    assert furthest(expected, weights(alone)) < 1e-6


def test_what_happens_on_one_process_is_everybodys_business(tmp_path):
    """Rank 1 has too little memory, then a loss that is not finite, then a disk that is full."""

    def troubled(trainer, rank):
        ask, stage = trainer.ask, trainer._stage

        def narrow(model, batch):
            if rank == 1 and batch.answers > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            loss, logs = ask(model, batch)
            bad = rank == 1 and trainer.state.global_step == 1
            return (loss * float("nan") if bad else loss), logs

        def full(folder):
            if rank == 1 and trainer.state.global_step == 2:
                raise OSError(28, "No space left on device")
            return stage(folder)

        trainer.ask, trainer._stage = narrow, full

    def skips(trainer, rank):
        ask = trainer.ask

        def spoil(model, batch):
            loss, logs = ask(model, batch)
            return (loss * float("nan") if trainer.state.global_step == 1 else loss), logs

        trainer.ask = spoil

    options = {"batch": 2, "own": {"find_batch": True, "skip_bad_steps": 1}, "num_train_epochs": 2}
    assert ranks(tmp_path / "troubled", troubled, **options) == [0, 0]
    said = (tmp_path / "stderr-0.txt").read_text()
    options = {"batch": 2, "own": {"skip_bad_steps": 1}, "num_train_epochs": 2}
    assert ranks(tmp_path / "plain", skips, **options) == [0, 0]
    plain, troubled_ = (torch.load(tmp_path / name / "weights.pt") for name in ("plain", "troubled"))
    assert furthest(plain, troubled_) < 1e-9
    assert "rank 1: The loss is not finite at step 2" in said and "rank 0:" not in said
    assert "another process could not write its part" in said
    assert [p.name for p in (tmp_path / "troubled").glob("bad_step*")] == ["bad_step-2-rank-1.jsonl"]
    assert [p.name for p in checkpoint.complete(tmp_path / "troubled")] == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
