"""Two processes that see images train what one process trains, although some of their micro-batches show none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from luthier.fit import fit
from luthier.run import resolve
from tests.e2e.killing import in_ranks
from tests.multimodal.conftest import row, write

IMAGES = [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]
"""How many images each row shows, in the order of training: steps of four with one image, with none at all, and a last
one in which the second process has no row left."""


def settings(family, folder, pictures, name, **more):
    rows = [
        row("<image>What?" * n + "Hi " * k, "It is red. " * (1 + k % 3), *["red.png"] * n) for k, n in enumerate(IMAGES)
    ]
    base = {
        "model_name_or_path": str(family.folder), "dataset": str(write(folder, rows)), "media_dir": str(pictures),
        "output_dir": str(folder / name), "data_cache_dir": str(folder / "cache"), "finetuning_type": "full",
        "per_device_train_batch_size": 1,
        "learning_rate": 0.5, "optim": "sgd", "weight_decay": 0.1, "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0, "num_train_epochs": 1, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_shuffling": True,
    }  # fmt: skip
    return base | more


def losses(folder):
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


TRAINED = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}


@pytest.mark.parametrize(
    ("trained", "ranks"),
    [(TRAINED, {}), ({"freeze_vision_tower": True, "freeze_multi_modal_projector": True}, SHARDED)],
    ids=["what sees is trained", "what sees is sharded"],
)
def test_two_processes_train_what_one_does(llava, pictures, tmp_path, trained, ranks):
    """LLaVA never uses the last layer of what sees, so that nothing may wait for its gradients; and it has no layers of
    CLIP's other half, which it names for FSDP to cut."""
    fit(resolve(settings(llava, tmp_path, pictures, "one", gradient_accumulation_steps=4, **trained)))

    def rank(_):
        torch.set_num_threads(1)
        fit(resolve(settings(llava, tmp_path, pictures, "two", gradient_accumulation_steps=2, **trained, **ranks)))

    assert in_ranks(rank) == [0, 0]
    before, one, two = (
        load_file(folder / "model.safetensors") for folder in (llava.folder, tmp_path / "one", tmp_path / "two")
    )
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-6)
    moved = {name for name in one if not torch.equal(one[name], before[name])}
    assert any("vision" in name for name in moved) == (trained is TRAINED)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6, msg=name)
