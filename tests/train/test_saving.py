"""Checkpoints: whole or absent, beside training or not, on disks that are full; what is damaged is found by name."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.exact.runs import at, furthest, trainer_for, weights

from luthier.core import manifest
from luthier.core.errors import CheckpointError, ModelError
from luthier.train import checkpoint
from luthier.train.writer import snapshot

SAVED = {"batch": 2, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "lr": 1e-2}


def there(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.complete(folder)]


class Full:
    """A disk on which no file can grow beyond `size` bytes, from step `first` to step `last`."""

    def __init__(self, trainer, first, last, size=4096):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.first, self.last, self.size = first, last, size
        at(trainer, "on_step_begin", self.turn)

    def turn(self, state):
        # What was begun before may end.
        for thread in threading.enumerate():
            if thread.name == "luthier-checkpoint":
                thread.join()
        full = self.first <= state.global_step + 1 <= self.last
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if full else self.limits[0], self.limits[1]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tmp_path, said, beside):
    straight = trainer_for("sft", tmp_path / "straight", **SAVED)
    straight.train()
    trainer = trainer_for("sft", tmp_path / "full", own={"async_save": beside}, save_total_limit=2, **SAVED)
    with Full(trainer, 3, 4):
        trainer.train()
    assert furthest(weights(straight), weights(trainer)) == 0.0
    assert there(tmp_path / "full") == ["checkpoint-5", "checkpoint-6"]
    texts = [text for text in said if "Could not write" in text]
    assert len(texts) == 2
    for text, step in zip(texts, (3, 4)):
        assert f"checkpoint {step}" in text and "MiB are free" in text and "the next save tries again" in text
        assert "checkpoint-2" in text, "the last one that is there"
    assert trainer.failed_save is None
    assert not list((tmp_path / "full").glob(".*"))


def test_all_the_time_there_is_a_whole_checkpoint(tmp_path, said):
    trainer = trainer_for("sft", tmp_path, save_total_limit=1, **SAVED)
    held = []
    at(trainer, "on_step_end", lambda state: held.append([manifest.damage(p) for p in checkpoint.complete(tmp_path)]))
    with Full(trainer, 2, 5):
        trainer.train()
    assert held[1:] == [[None]] * 5


def test_what_is_no_fault_of_the_disk_is_not_hidden(tmp_path):
    for beside in (False, True):
        trainer = trainer_for("sft", tmp_path, own={"async_save": beside}, **SAVED)
        trainer._save_weights = lambda *args: 1 / 0
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        assert there(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_small_and_then_read_only_file_system(tmp_path, said):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        trainer = trainer_for("sft", tmp_path, **SAVED | {"save_steps": 2})
        trainer.train()
        assert any("No space left" in text or "unexpected pos" in text for text in said)
        kept = there(tmp_path)
        assert all(manifest.damage(tmp_path / name) is None for name in kept)
        said.clear()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        trainer = trainer_for("sft", tmp_path, **SAVED | {"save_steps": 3})
        trainer.train()
        assert sum("Read-only file system" in text for text in said) == 2
        assert there(tmp_path) == kept
        with pytest.raises(CheckpointError, match="the trained model.*Read-only"):
            trainer.save_final()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# Beside training


def test_written_beside_training_the_files_are_the_same(tmp_path):
    for name, beside in (("at-once", False), ("beside", True)):
        trainer_for("rm", tmp_path / name, own={"async_save": beside}, dtype=torch.float32, **SAVED).train()
    compared = 0
    for folder in checkpoint.complete(tmp_path / "at-once"):
        twin = tmp_path / "beside" / folder.name
        assert {p.name for p in folder.iterdir()} == {p.name for p in twin.iterdir()}
        for file in folder.iterdir():
            if file.suffix in (".safetensors", ".pt", ".pth"):
                assert file.read_bytes() == (twin / file.name).read_bytes(), file.name
                compared += 1
    assert compared == 6 * 5, "model, head, optimiser, scheduler, random numbers; six times"


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits(tmp_path):
    trainer = trainer_for("sft", tmp_path, own={"async_save": True}, **SAVED | {"save_steps": 3})
    write, gate, begun = trainer._save_weights, threading.Event(), []
    steps = []

    def slow(*args):
        begun.append(trainer.state.global_step)
        assert gate.wait(20)
        write(*args)

    def opens(state):
        steps.append((state.global_step, there(tmp_path)))
        if state.global_step == 5:
            gate.set()

    trainer._save_weights = slow
    at(trainer, "on_step_end", opens)
    trainer.train()
    assert steps[4] == (5, []), "two steps were taken while checkpoint-3 was being written"
    assert begun == [3, 6]
    assert there(tmp_path) == ["checkpoint-3", "checkpoint-6"]
    assert all(manifest.damage(folder) is None for folder in checkpoint.complete(tmp_path))


def test_an_error_beside_training_is_said_at_the_next_step(tmp_path, said):
    trainer = trainer_for("sft", tmp_path, own={"async_save": True}, **SAVED | {"save_steps": 2})
    when = []

    def fails(*args):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    def look(state):
        deadline = time.monotonic() + 20
        while state.global_step == 2 and trainer.writer.failure() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        when.append((state.global_step, len(said)))

    trainer._save_weights = fails
    at(trainer, "on_step_begin", look)
    at(trainer, "on_step_end", lambda state: when.append((state.global_step, len(said))))
    trainer.train()
    # The loader is asked before a step begins: step 3's rows were asked for after the failure or just before it.
    assert dict(when)[4] >= 1 and "quota" in said[0]
    assert trainer.failed_save is not None and "checkpoint 6" in trainer.failed_save


def test_a_snapshot_is_a_copy_that_keeps_what_is_shared():
    weight = torch.randn(4, 3)
    found = snapshot({"a": weight, "b": weight, "c": [weight.t(), 7, "x"]}, copy=True)
    before = weight.clone()
    weight.zero_()
    assert torch.equal(found["a"], before) and torch.equal(found["c"][0], before.t())
    assert found["a"].data_ptr() == found["b"].data_ptr() != weight.data_ptr()
    assert found["c"][1:] == [7, "x"]
    assert snapshot(weight, copy=False).data_ptr() == weight.data_ptr()


# Damage


def cut(path: Path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm, name, words",
    [
        (cut, "model.safetensors", "model.safetensors has"),
        (flip, "optimizer.pt", "optimizer.pt does not have the contents"),
        (Path.unlink, "rng_state.pth", "rng_state.pth is missing"),
        (cut, "manifest.json", "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, said, harm, name, words):
    trainer_for("sft", tmp_path, **SAVED | {"save_steps": 2}).train()
    harm(tmp_path / "checkpoint-6" / name)
    assert checkpoint.last_whole(tmp_path) == tmp_path / "checkpoint-4"
    assert len(said) == 1 and words in said[0] and "checkpoint-6 is damaged" in said[0]
    assert (tmp_path / "damaged-checkpoint-6").is_dir(), "nothing is thrown away"
    assert "The checkpoint before it is checkpoint-4" in said[0]
    for step in (2, 4):
        harm(tmp_path / f"checkpoint-{step}" / name)
    assert checkpoint.last_whole(tmp_path) is None and "There is no checkpoint before it" in said[-1]


def test_damaged_weights_are_refused_by_name_where_they_are_loaded(tmp_path):
    from luthier.model.load import load_model
    from luthier.model.source import ModelConfig

    trainer_for("sft", tmp_path).save_final()
    config = ModelConfig(model_name_or_path=str(tmp_path))
    for harmless in ("config.json", "README.md"):
        with (tmp_path / harmless).open("a") as file:
            file.write("\n")
    load_model(config)
    flip(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="model_name_or_path: .* is damaged: model.safetensors does not have"):
        load_model(config)
    (tmp_path / manifest.NAME).unlink()
    load_model(config)


def test_the_oldest_stays_when_the_newest_is_not_whole(tmp_path, said):
    trainer_for("sft", tmp_path, **SAVED | {"save_steps": 2}).train()
    cut(tmp_path / "checkpoint-6" / "optimizer.pt")
    checkpoint.rotate(tmp_path, tmp_path / "checkpoint-6", keep=1, best=None)
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"] and "are kept" in said[0]
    checkpoint.rotate(tmp_path, tmp_path / "checkpoint-4", keep=1, best=str(tmp_path / "checkpoint-2"))
    assert there(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_final_model_that_was_on_its_way_arrives_after_a_kill(tmp_path):
    trainer = trainer_for("sft", tmp_path)
    trainer.save_final()
    files = {path.name for path in tmp_path.iterdir()}
    staged = checkpoint.aside(tmp_path / "model")
    staged.mkdir()
    for name in ("model.safetensors", manifest.NAME):
        (tmp_path / name).rename(staged / name)
    checkpoint.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == files and manifest.damage(tmp_path) is None
