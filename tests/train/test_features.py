"""A head on stored hidden states trains exactly as it does above the frozen model."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tests.conftest import build_model
from tests.exact.test_accept_head import encoded, some_rounds

from luthier.data.layout import collate
from luthier.data.source import DataConfig
from luthier.model import heads
from luthier.model.policy import PolicySetup
from luthier.objectives.accept_head import SCORE
from luthier.train.features import Features
from luthier.train.sampler import Bundles, Collator
from luthier.train.trainer import Trainer


class Examples(list):
    """Encoded examples with what a data set knows of them."""

    fingerprint = "some rounds"

    @property
    def supervised(self):
        return [sum(int(sum(path.weights)) for path in item.paths) for item, _ in self]

    answers = ()


def trainer_of(objective, setup, rows, collator, folder, **extra):
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "logging_steps": 1,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    made = Trainer(
        setup=setup,
        objective=objective,
        args=transformers.TrainingArguments(**{**arguments, **extra}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.fixture(params=["sep", "hybrid", "judge"])
def parts(request, tmp_path):
    keys = {"accept_rounds_per_tree": 3, "freeze_backbone": True}
    objective, items, *_ = encoded(tmp_path, some_rounds(2, 24), request.param, **keys)

    def fresh():
        model = build_model("llama", dtype=torch.float64).requires_grad_(False).eval()
        setup = PolicySetup(model, head=heads.attach(model, "accept", seed=5))
        return setup, Collator(collate, layout="shared", pad_id=3, columns=[SCORE])

    return objective, Examples(items), fresh, DataConfig(dataset="x", data_cache_dir=str(tmp_path / "cache"))


def head_only(parts, folder, **extra):
    objective, items, fresh, data = parts
    setup, collator = fresh()
    features = Features(setup, data, collator, batch_size=2)
    rows = features(Bundles(items), "rounds")
    setup, collator = features.head_only()
    return trainer_of(objective, setup, rows, collator, folder, **extra)


def test_the_head_becomes_the_same(parts, tmp_path):
    objective, items, fresh, _ = parts
    setup, collator = fresh()
    whole = trainer_of(objective, setup, Bundles(items), collator, tmp_path / "whole")
    alone = head_only(parts, tmp_path / "alone")
    start = {name: p.clone() for name, p in alone.setup.head.state_dict().items()}
    for trainer in (whole, alone):
        trainer.train()
    for name, value in whole.setup.head.state_dict().items():
        assert torch.allclose(value, alone.setup.head.state_dict()[name], atol=1e-9, rtol=0), name
        assert not torch.equal(value, start[name]), name
    assert whole.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], abs=1e-9)
    records = [list(trainer.records(trainer.eval_dataset)) for trainer in (whole, alone)]
    flat = [[m["probability"] for _, r in each for told in r for m in told["mismatches"]] for each in records]
    assert flat[0] == pytest.approx(flat[1], abs=1e-9) and len(flat[0]) > 10


def test_only_the_head_is_saved_and_a_run_goes_on_from_it(parts, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    straight = head_only(parts, tmp_path / "straight", **keys)
    straight.train()
    assert {file.suffix for file in (tmp_path / "straight" / "checkpoint-2").iterdir()} >= {".json", ".safetensors"}
    weights = [file.name for file in (tmp_path / "straight" / "checkpoint-2").glob("*.safetensors")]
    assert weights == ["accept_head.safetensors"]
    facts = json.loads((tmp_path / "straight" / "checkpoint-2" / "accept_head.json").read_text())
    assert facts["frozen"] is True and facts["head"] == "accept" and facts["hidden_size"] == 32
    again = head_only(parts, tmp_path / "straight", **keys)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for name, value in straight.setup.head.state_dict().items():
        assert torch.equal(value, again.setup.head.state_dict()[name]), name


def test_hidden_states_are_computed_once(parts, tmp_path, monkeypatch):
    first = head_only(parts, tmp_path / "a")
    monkeypatch.setattr(Features, "_computed", lambda *_: pytest.fail("computed again"))
    second = head_only(parts, tmp_path / "b")
    assert torch.equal(
        first.data_collator([first.train_dataset[0]])["batch"].hidden,
        second.data_collator([second.train_dataset[0]])["batch"].hidden,
    )
