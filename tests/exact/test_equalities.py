"""What must be equal for every file in objectives/, also for one that is added tomorrow."""

from __future__ import annotations

import pytest
import torch

from luthier.core.batch import total_units
from luthier.data.layout import collate
from luthier.train import by_hand
from tests.conftest import build_model
from tests.exact.conftest import in_double
from tests.exact.runs import OBJECTIVES, furthest, items_for, objective_of, setup_for, trainer_for, weights

TOLERANCE = 2e-7  # two SGD steps at a rate of 0.1; RMSNorm rounds to float32 inside transformers

pytestmark = pytest.mark.parametrize("name", OBJECTIVES)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulation_is_exact(name, tmp_path):
    whole, cut = trainer_for(name, tmp_path, batch=4), trainer_for(name, tmp_path, batch=1, accumulate=4)
    start = weights(whole)
    for trainer in (whole, cut):
        trainer.train()
    assert furthest(start, weights(whole)) > 1e-3, "the model must have moved"
    assert furthest(weights(whole), weights(cut)) < TOLERANCE
    assert losses(whole) == pytest.approx(losses(cut), abs=1e-6)


def test_uneven_batches_make_one_step(name):
    """5 examples as 5, as 2+2+1 and as 1+4: the same gradient."""
    objective = objective_of(name)
    items = [objective.complete(i, items_for(objective, 5, seed=3)) for i in range(5)]
    found = []
    for cut in ([5], [2, 2, 1], [1, 4]):
        model = build_model("llama", dtype=torch.float64).eval()
        setup, start, batches = setup_for(objective, model), 0, []
        for size in cut:
            columns = [column.name for column in objective.columns]
            batches.append(collate(items[start : start + size], layout="padded", pad_id=3, columns=columns))
            start += size
        totals = total_units(batches)
        if objective.surveys:
            totals |= by_hand.survey(setup.bind, objective, batches)
        sum(objective.loss(setup.bind(), b.with_totals(totals))[0] for b in batches).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        assert furthest(found[0], other) < 1e-7


def test_trainer_equals_by_hand(name, tmp_path):
    trainer = trainer_for(name, tmp_path, batch=2, accumulate=2)
    twin = trainer_for(name, tmp_path, batch=2, accumulate=2)
    trainer.train()
    batches = [inputs["batch"] for inputs in twin.get_train_dataloader()]
    steps = [batches[i : i + 2] for i in range(0, len(batches), 2)]
    optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1)
    step_losses = by_hand.train(twin.setup, twin.objective, steps, optimizer)
    assert furthest(weights(trainer), weights(twin)) == 0.0
    assert losses(trainer) == pytest.approx(step_losses, abs=1e-6)  # transformers sums losses in float32


def test_layouts_train_the_same_model(name, tmp_path):
    trained = {}
    for layout in ("padded", "packed", "shared"):
        trainer = trainer_for(name, tmp_path, layout=layout, batch=3)
        trainer.train()
        trained[layout] = weights(trainer)
    assert furthest(trained["padded"], trained["packed"]) < TOLERANCE
    assert furthest(trained["padded"], trained["shared"]) < TOLERANCE


def test_resumed_run_is_bitwise_the_straight_run(name, tmp_path):
    options = {
        "optim": "adamw_torch",
        "lr": 1e-3,
        "batch": 1,
        "accumulate": 2,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
    }
    straight = trainer_for(name, tmp_path / "straight", **options)
    straight.train()
    first = trainer_for(name, tmp_path / "resumed", **options)
    first.add_callback(_stop_at(first, 5))
    first.train()
    assert first.state.global_step == 5
    second = trainer_for(name, tmp_path / "resumed", **options)
    torch.manual_seed(12345)  # whatever happened before must not matter
    second.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-4"))
    assert second.state.global_step == straight.state.global_step == 12
    assert furthest(weights(straight), weights(second)) == 0.0
    assert losses(straight) == losses(second)


def _stop_at(trainer, step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step
            return control

    return Stop()


def test_evaluation_does_not_depend_on_the_batch_size(name, tmp_path):
    results = [
        trainer_for(name, tmp_path, batch=size, layout=layout).evaluate()["eval_loss"]
        for size, layout in ((1, "padded"), (5, "packed"), (12, "shared"))
    ]
    assert results[1:] == pytest.approx(results[:1] * 2, abs=1e-7)


def test_a_batch_without_supervision_changes_nothing_and_reaches_every_parameter(name):
    objective = objective_of(name)
    empty = collate([], layout="shared", pad_id=3, columns=[c.name for c in objective.columns])
    model = build_model("llama", dtype=torch.float64)
    setup = setup_for(objective, model)
    totals = dict.fromkeys(empty.units(), 3.0)
    if objective.surveys:
        totals |= by_hand.survey(setup.bind, objective, [empty])
    loss, _ = objective.loss(setup.bind(), empty.with_totals(totals))
    loss.backward()
    assert loss.item() == 0.0
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name


def test_layouts_agree_to_1e_9_on_ragged_lists(name):
    """Loss and gradients, with norms in full precision; lists of different length side by side."""
    objective = objective_of(name)
    items = items_for(objective, 6, seed=11)
    items = [objective.complete(i, items) for i in range(len(items))]
    columns = [column.name for column in objective.columns]
    found = {}
    for layout in ("padded", "packed", "shared"):
        model = in_double(build_model("llama", dtype=torch.float64)).eval()
        setup = setup_for(objective, model)
        in_double(getattr(getattr(setup.reference, "own", None), "model", model))
        batch = collate(items, layout=layout, pad_id=3, columns=columns)
        totals = batch.units()
        if objective.surveys:
            totals |= by_hand.survey(setup.bind, objective, [batch])
        loss, logs = objective.loss(setup.bind(), batch.with_totals(totals, 0.5))
        loss.backward()
        measures = {key: value.detach() for key, value in logs.items()}
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found[layout] = {"loss": loss.detach(), **measures, **gradients}
    for layout in ("packed", "shared"):
        assert furthest(found["padded"], found[layout]) < 1e-9, layout
