"""Schedule-free optimisers: what a run saves and evaluates are the averaged weights, not those it steps with."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.exact.runs import trainer_for

from luthier.callbacks import schedule_free


class Kept(schedule_free.Average):
    """Remembers what an evaluation found."""

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated = model.lm_head.weight.detach().clone()


def run(folder, **extra):
    pytest.importorskip("schedulefree")
    settings = {"optim": "schedule_free_sgd", "max_steps": 4, "lr": 0.5, "lr_scheduler_type": "constant"}
    trainer = trainer_for("sft", folder, dtype=torch.float32, **settings, **extra)
    kept = Kept()
    trainer.add_callback(kept)
    trainer.train()
    return trainer, kept


def test_the_saved_model_is_the_average(tmp_path):
    trainer, kept = run(tmp_path, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=2)
    trainer.save_final()
    meant = trainer.model.lm_head.weight.detach().clone()
    trainer.optimizer.train()
    stepped = trainer.model.lm_head.weight.detach().clone()
    assert (meant - stepped).abs().max() > 1e-4
    assert torch.equal(load_file(tmp_path / "model.safetensors")["lm_head.weight"], meant)
    assert torch.equal(load_file(tmp_path / "checkpoint-4" / "model.safetensors")["lm_head.weight"], meant)
    assert torch.equal(kept.evaluated, meant)


def test_a_resumed_run_ends_where_the_straight_one_ends(tmp_path):
    straight, _ = run(tmp_path / "a", save_strategy="steps", save_steps=2)
    again = trainer_for(
        "sft", tmp_path / "b", dtype=torch.float32, optim="schedule_free_sgd", max_steps=4, lr=0.5,
        lr_scheduler_type="constant", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    again.add_callback(Kept())
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for (name, one), other in zip(straight.model.named_parameters(), again.model.parameters()):
        assert torch.equal(one, other), name
