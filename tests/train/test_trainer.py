"""What the Trainer adds to transformers': stops, checkpoints, logs. The equalities are in tests/exact."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tests.exact.runs import furthest, items_for, objective_of, trainer_for, weights

from luthier.core.errors import ConfigError, TrainingError
from luthier.data.layout import collate
from luthier.train import checkpoint
from luthier.train.sampler import Bundles, RankSampler


@pytest.mark.parametrize("size", [1, 7, 8, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_see_everything_once_and_take_equally_many_steps(size, world):
    orders = []
    for epoch in (0, 1):
        seen, lengths = Counter(), set()
        for rank in range(world):
            sampler = RankSampler(size, batch_size=2, rank=rank, world=world, seed=3, shuffle=True)
            sampler.set_epoch(epoch)
            batches = list(sampler)
            lengths.add(len(batches))
            assert len(batches) == len(sampler)
            seen.update(i for batch in batches for i in batch)
            orders.append(batches)
        assert seen == Counter(range(size))
        assert len(lengths) == 1
    if size > 7:
        assert orders[0] != orders[world], "another order each epoch"


def test_without_shuffling_the_order_is_the_datas():
    assert list(RankSampler(5, batch_size=2, shuffle=False)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_learning_rate_follows_its_closed_form(tmp_path, accumulate):
    trainer = trainer_for("sft", tmp_path, items=items_for(objective_of("sft"), 24), batch=1, accumulate=accumulate,
                          lr_scheduler_type="cosine", warmup_steps=0.25, num_train_epochs=2, lr=0.01)  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    total = 2 * math.ceil(24 / accumulate)
    warm = math.ceil(0.25 * total)

    def expected(step):
        return 0.01 * (step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm))))

    # transformers reads the rate after the optimiser step and before the scheduler's.
    assert rates == pytest.approx([expected(step) for step in range(total)], abs=1e-12)


def test_a_loss_that_is_not_finite_names_the_step_and_the_rows_and_keeps_the_checkpoint(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=1, save_strategy="steps", save_steps=2)

    def poison(args, state, control, **kwargs):
        if state.global_step == 3:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = float("nan")

    _on_step_end(trainer, poison)
    with pytest.raises(TrainingError, match=r"step 4; the rows in the batch were row \d+.*lm_head.*checkpoint-2"):
        trainer.train()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["checkpoint-2"]


def _on_step_end(trainer, function):
    from transformers import TrainerCallback

    trainer.add_callback(type("Hook", (TrainerCallback,), {"on_step_end": lambda self, *a, **k: function(*a, **k)})())


def test_the_oldest_goes_only_when_the_newest_is_there(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=2, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == ["checkpoint-5", "checkpoint-6"]


def test_sidecars_are_in_every_saved_folder(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=4, save_strategy="steps", save_steps=1)
    trainer.sidecars = (lambda folder: (folder / "config.yaml").write_text("as written"),)
    trainer.train()
    trainer.save_final()
    for folder in (tmp_path, *checkpoint.complete(tmp_path)):
        assert (folder / "config.yaml").read_text() == "as written"
        assert not (folder / "training_args.bin").exists(), "no pickles"


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=4, save_strategy="steps", eval_strategy="steps", save_steps=1,
                          eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", lr=3.0)  # fmt: skip
    trainer.train()
    evaluations = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(evaluations, key=evaluations.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], abs=1e-9)


@pytest.mark.parametrize("keys", [{}, {"lr_scheduler_type": "reduce_lr_on_plateau"}])
def test_a_metric_that_evaluation_does_not_bring_is_said_with_those_it_does(tmp_path, keys):
    trainer = trainer_for("sft", tmp_path, batch=4, eval_strategy="steps", eval_steps=1,
                          metric_for_best_model="rouge", **keys)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"metric_for_best_model: .*'eval_rouge'.*'eval_loss'.*\. Name one of these\."
    ):
        trainer.train()


def test_decay_leaves_norms_and_biases_alone_and_counts_every_weight_once(tmp_path):
    trainer = trainer_for("sft", tmp_path, optim="adamw_torch", weight_decay=0.1)
    trainer.create_optimizer()
    decayed, plain = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert {names[id(p)] for p in plain["params"]} == {name for name in names.values() if "norm" in name}
    assert sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in trainer.model.parameters()
    )


def test_accuracy_is_the_share_of_supervised_tokens(tmp_path):
    trainer = trainer_for("sft", tmp_path, batch=5)
    trainer.accuracy = True
    items = trainer.eval_dataset.examples
    right = total = 0
    with torch.no_grad():
        for encoded, _ in items:
            path = encoded.paths[0]
            best = trainer.model(input_ids=torch.tensor([path.ids])).logits[0].argmax(-1)
            supervised = [i for i in range(1, len(path.ids)) if path.weights[i]]
            right += sum(int(best[i - 1]) == path.ids[i] for i in supervised)
            total += len(supervised)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(right / total)


def test_packed_bundles_train_like_the_same_examples_one_by_one(tmp_path):
    items = items_for(objective_of("sft"), 12)
    single = trainer_for("sft", tmp_path, items=items, batch=12, layout="padded")
    packed = trainer_for("sft", tmp_path, items=items, batch=4, layout="packed")
    packed.train_dataset = Bundles(items, [[0, 5, 7], [1, 2, 3], [4, 6, 8, 9], [10, 11]])
    for trainer in (single, packed):
        trainer.train()
    assert furthest(weights(single), weights(packed)) < 1e-7


def test_a_token_of_one_document_cannot_change_another():
    from tests.conftest import build_model

    from luthier.model.policy import PolicySetup

    for kind in ("llama", "gpt2"):
        model = build_model(kind).eval()
        setup = PolicySetup(model)
        items = items_for(objective_of("sft"), 2)
        changed = [items[0], (type(items[0][0])((type(items[0][0].paths[0])(
            [399] * len(items[1][0].paths[0].ids), items[1][0].paths[0].weights),)), "")]  # fmt: skip
        found = []
        for pair in (items, changed):
            batch = collate(pair, layout="packed", pad_id=3)
            logps = setup.bind().logps(batch)
            found.append(logps[batch.answer == 0])
        assert torch.equal(*found)


def test_a_folder_holds_the_head_of_its_last_run_only(tmp_path):
    for stage, there in (("disco_rm", "normal"), ("rm", "value"), ("sft", None)):
        trainer = trainer_for(stage, tmp_path, batch=6)
        trainer.save_final()
        heads = {"value", "normal"} & {path.name.split("_head")[0] for path in tmp_path.glob("*_head.safetensors")}
        assert heads == ({there} if there else set())
