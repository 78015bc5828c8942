"""Steps that cannot be computed: numbers that are not finite, memory that runs out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tests.exact.runs import at, furthest, items_for, objective_of, trainer_for, weights

from luthier import cli
from luthier.core.errors import TrainingError
from luthier.train import bad_batch, memory

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: 12 bytes."


def spoilt(trainer, steps, how=lambda loss: loss * math.nan):
    """The trainer, whose loss is not finite in these steps (counted from 1)."""
    ask = trainer.ask

    def spoil(model, batch):
        loss, logs = ask(model, batch)
        return (how(loss), logs) if trainer.state.global_step + 1 in steps else (loss, logs)

    trainer.ask = spoil
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_step_is_left_out_and_changes_nothing(tmp_path, accumulate):
    options = {"optim": "adamw_torch", "lr": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}
    trainer = trainer_for(
        "sft", tmp_path, batch=1, accumulate=accumulate, logging_steps=2, own={"skip_bad_steps": 1}, **options
    )
    spoilt(trainer, {3})
    seen = {}
    at(trainer, "on_step_end", lambda state: seen.update({state.global_step: weights(trainer)}))
    trainer.train()
    assert furthest(seen[2], seen[3]) == 0.0 < furthest(seen[3], seen[4])
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {len(seen) - 1}, "Adam did not see it"
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[1]["skipped_steps"] == 1 and all("skipped_steps" not in entry for entry in logs if entry["step"] != 4)
    assert all(math.isfinite(entry["loss"]) for entry in logs)
    # The rate goes on as if nothing had happened.
    total = len(seen)
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(
        [1e-2 * (1 - (entry["step"] - 1) / total) for entry in logs]
    )


def test_the_logged_loss_is_the_mean_of_the_steps_that_count(tmp_path):
    items = items_for(objective_of("sft"), 4)
    every = trainer_for("sft", tmp_path, items=items, batch=1, logging_steps=1, lr=0.0)
    every.train()
    alone = [entry["loss"] for entry in every.state.log_history if "loss" in entry]
    skipping = spoilt(
        trainer_for("sft", tmp_path, items=items, batch=1, logging_steps=4, lr=0.0, own={"skip_bad_steps": 1}), {2}
    )
    skipping.train()
    found = next(entry for entry in skipping.state.log_history if "loss" in entry)
    assert found["loss"] == pytest.approx((alone[0] + alone[2] + alone[3]) / 3, rel=1e-6)


def test_more_than_so_many_in_a_row_stop_the_run_and_the_count_survives_a_resume(tmp_path):
    options = {"batch": 1, "own": {"skip_bad_steps": 2}, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(TrainingError, match="step 4; .*number 3 in a row"):
        spoilt(trainer_for("sft", tmp_path, **options), {2, 3, 4}).train()
    again = spoilt(trainer_for("sft", tmp_path, **options), {4})
    with pytest.raises(TrainingError, match="number 3 in a row"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    spoilt(trainer_for("sft", tmp_path, **options), {1, 3, 5, 6}).train()


def test_the_module_where_it_begins_is_named(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=2)
    layer = trainer.model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda module, inputs, output: output * math.inf)
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    assert "is model.layers.1.mlp.up_proj." in str(caught.value)
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.v_proj.weight[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"layers\.0\.self_attn\.v_proj \(its weights already hold"):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_traced_to_its_rows_and_its_weight(tmp_path):
    items = items_for(objective_of("sft"), 4)
    trainer = trainer_for("sft", tmp_path, items=items, batch=1, accumulate=4, max_grad_norm=1.0)
    marked = items[2][0].paths[0].ids
    ask = trainer.ask

    def spoil(model, batch):
        loss, logs = ask(model, batch)
        if marked[0] in batch.ids[0].tolist() and batch.names == ("row 2",):
            weight = model.model.layers[0].mlp.gate_proj.weight
            loss = loss + torch.sqrt((weight * 0).sum())  # 0, with an infinite slope
        return loss, logs

    trainer.ask = spoil
    before = weights(trainer)
    words = "gradient norm is nan at step 1; the rows in the batch were row 2.*layers.0.mlp.gate_proj"
    with pytest.raises(TrainingError, match=words):
        trainer.train()
    assert furthest(before, weights(trainer)) == 0.0
    _, lines = bad_batch.read(tmp_path / "bad_step-1.jsonl")
    assert [encoded.paths[0].ids for _, encoded in lines] == [marked]


def test_the_batch_is_kept_and_preview_shows_it(tmp_path, model_folder, capsys):
    from transformers import AutoTokenizer

    items = items_for(objective_of("sft"), 2)
    trainer = spoilt(trainer_for("sft", tmp_path, items=items, batch=2), {1})
    trainer.processing_class = AutoTokenizer.from_pretrained(model_folder)
    with pytest.raises(TrainingError, match="luthier preview"):
        trainer.train()
    file = str(tmp_path / "bad_step-1.jsonl")
    assert cli.main(["preview", file, "--format", "jsonl"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = sorted(tuple(item.paths[0].ids) for item, _ in items)
    assert sorted(tuple(line["branches"][0]["input_ids"]) for line in shown) == expected
    for line in shown:
        branch = line["branches"][0]
        assert any(label == -100 for label in branch["labels"])
        assert all(label in (-100, token) for label, token in zip(branch["labels"], branch["input_ids"]))
    assert cli.main(["preview", file]) == 0
    text = capsys.readouterr().out
    assert "row 0" in text and "row 1" in text and "not finite at step 1" in text


# Memory


def small(trainer, positions):
    """The trainer, on a machine without room for more than so many positions in a forward pass."""

    def look(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if ids.numel() > positions and torch.is_grad_enabled():
            raise RuntimeError(CPU_MESSAGE)

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return trainer


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_what_does_not_fit_is_computed_in_parts_and_the_step_stays_the_same(tmp_path, stage, layout):
    options = {"items": items_for(objective_of(stage), 12), "batch": 6, "accumulate": 2, "layout": layout}
    whole = trainer_for(stage, tmp_path, **options)
    # A failure in the middle of a backward pass leaves half a gradient behind, which must not count.
    parts = small(trainer_for(stage, tmp_path, own={"find_batch": True}, **options), 200)
    parts.model.get_input_embeddings().weight.register_hook(_fails_once())
    for trainer in (whole, parts):
        trainer.accuracy = True
        trainer.train()
    assert parts.fits is not None and parts.fits < 6
    assert furthest(weights(whole), weights(parts)) < 1e-9
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    for one, other in zip(*logs, strict=True):
        for name in one.keys() - {"tokens_per_second"}:
            assert one[name] == pytest.approx(other[name], abs=1e-6), name


def _fails_once():
    calls = []

    def hook(gradient):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    return hook


def test_what_fits_is_remembered_over_a_resume(tmp_path):
    options = {
        "batch": 4,
        "own": {"find_batch": True},
        "save_strategy": "steps",
        "save_steps": 1,
        "num_train_epochs": 2,
    }
    first = small(trainer_for("sft", tmp_path, **options), 40)
    first.train()
    again = small(trainer_for("sft", tmp_path, **options), 40)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.fits == first.fits
    assert furthest(weights(first), weights(again)) == 0.0


@pytest.mark.parametrize("find", [False, True])
def test_out_of_memory_names_the_batch_and_what_helps(tmp_path, find):
    trainer = small(trainer_for("sft", tmp_path, batch=2, accumulate=3, layout="padded", own={"find_batch": find}), 3)
    trainer.estimate = lambda positions: f"about {positions} GiB"
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    text = str(caught.value)
    batch = trainer._inputs[0]["batch"]
    for words in (
        "Out of memory at step 1",
        "the process used up to",
        f"about {batch.ids.numel()} GiB",
        f"{batch.tokens:,} tokens",
        *batch.names,
        "layout: shared",
        "disable_gradient_checkpointing: false",
        "cutoff_len",
    ):
        assert words in text, (words, text)
    halved = "per_device_train_batch_size: 1 with gradient_accumulation_steps: 6, which is the same step"
    assert (halved in text) is not find


def test_other_errors_pass(tmp_path):
    trainer = trainer_for("sft", tmp_path, own={"find_batch": True})
    trainer.ask = lambda model, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not memory.exhausted(RuntimeError("shapes do not fit"))
