"""Log-probs of the reference, computed once: what the reference itself would say, from the cache the second time."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from tests.conftest import build_model
from tests.exact.runs import furthest, items_for, objective_of, trainer_for, weights

from luthier.adapters import lora
from luthier.core.errors import TrainingError
from luthier.core.types import Encoded
from luthier.data.layout import collate
from luthier.data.source import DataConfig
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.policy import REFERENCE_COLUMN, PolicySetup
from luthier.model.reference import AdapterOff, FrozenModel
from luthier.model.source import ModelConfig
from luthier.train.precompute import Precompute, fingerprint
from luthier.train.sampler import Bundles, Collator


class Examples(list):
    """A list that says what it holds, as an EncodedSet does."""

    fingerprint = "these examples"


class Counting(FrozenModel):
    """A reference that counts how often it is asked."""

    asked = 0

    def logps(self, batch):
        self.asked += 1
        return super().logps(batch)


def examples_for(name: str, count: int = 7) -> Examples:
    return Examples(items_for(objective_of(name), count, seed=3))


def setup_with(reference=Counting, seed=99, dtype=torch.float32) -> PolicySetup:
    setup = PolicySetup(build_model("llama", dtype=dtype))
    setup.reference = reference(build_model("llama", dtype=dtype, seed=seed), setup)
    return setup


def computed(setup, examples, folder, *, complete=None, batch_size=3, layout="shared", bundles=None, **keys):
    collator = Collator(collate, layout=layout, pad_id=3, columns=())
    precompute = Precompute(setup, DataConfig(data_cache_dir=str(folder), **keys), collator, batch_size)
    return precompute(Bundles(examples, bundles, complete), "train"), precompute.carrying()


def give_up_reference(trainer, cache) -> None:
    """What `fit` does for `precompute_reference: true`."""
    precompute = Precompute(trainer.setup, DataConfig(data_cache_dir=str(cache)), trainer.data_collator, batch_size=3)
    trainer.train_dataset = precompute(trainer.train_dataset, "train")
    sets = trainer.eval_dataset
    if isinstance(sets, dict):
        trainer.eval_dataset = {name: precompute(part, name) for name, part in sets.items()}
    else:
        trainer.eval_dataset = precompute(sets, "eval")
    trainer.data_collator = precompute.carrying()
    trainer.setup.reference = None


def plain(model, path) -> list[float]:
    """NaN or the log-prob of each token, by a forward pass and a loop of its own."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([path.ids]), use_cache=False).logits[0].log_softmax(-1)
    return [
        logp[i - 1, token].item() if i and weight else math.nan
        for i, (token, weight) in enumerate(zip(path.ids, path.weights))
    ]


@pytest.mark.parametrize("layout", ["padded", "shared"])
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_every_path_brings_the_log_probs_of_the_reference(tmp_path, name, layout):
    setup, examples, objective = setup_with(), examples_for(name), objective_of(name)
    rows, _ = computed(setup, examples, tmp_path, complete=objective.complete, layout=layout)
    assert len(rows) == len(examples)
    for index in range(len(examples)):
        [(encoded, where)] = rows[index]
        wanted, there = objective.complete(index, examples)
        assert where == there and [p.ids for p in encoded.paths] == [p.ids for p in wanted.paths]
        for path in encoded.paths:
            expected = plain(setup.reference.own.model, path)
            assert list(path.columns[REFERENCE_COLUMN]) == pytest.approx(expected, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_training_and_evaluation_are_those_of_the_live_reference(tmp_path, name):
    examples = examples_for(name, 8)
    live = trainer_for(name, tmp_path / "live", items=examples, batch=2, accumulate=2)
    stored = trainer_for(name, tmp_path / "stored", items=examples, batch=2, accumulate=2)
    give_up_reference(stored, tmp_path / "cache")
    before = live.evaluate(), stored.evaluate()
    live.train(), stored.train()
    after = live.evaluate(), stored.evaluate()
    assert furthest(weights(live), weights(stored)) < 1e-6  # columns are float32
    for one, other in (before, after):
        names = [key for key in one if "rewards" in key or key == "eval_loss"]
        assert len(names) > 3
        assert [one[key] for key in names] == pytest.approx([other[key] for key in names], abs=1e-5)
    assert before[0]["eval_rewards/chosen"] != pytest.approx(after[0]["eval_rewards/chosen"], abs=1e-4)


def test_the_second_run_starts_from_the_cache(tmp_path):
    examples, first, again = examples_for("dpo"), setup_with(), setup_with()
    one, _ = computed(first, examples, tmp_path, batch_size=3)
    assert first.reference.asked == 3
    other, _ = computed(again, examples, tmp_path, batch_size=2)
    assert again.reference.asked == 0
    for index in range(len(examples)):
        for a, b in zip(one[index][0][0].paths, other[index][0][0].paths):
            assert list(a.columns[REFERENCE_COLUMN]) == pytest.approx(list(b.columns[REFERENCE_COLUMN]), nan_ok=True)
    computed(again, examples, tmp_path, overwrite_cache=True)
    assert again.reference.asked == 3


def test_other_weights_other_examples_or_another_completion_are_computed_anew(tmp_path):
    def folder(setup, examples, **keys):
        return computed(setup, examples, tmp_path, **keys)[0].examples.folder

    examples, others = examples_for("dpo"), examples_for("dpo")
    others.fingerprint = "those examples"
    touched = setup_with()
    with torch.no_grad():
        touched.reference.own.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    configured = setup_with()
    configured.reference.own.model.config.rms_norm_eps *= 2
    found = [
        folder(setup_with(), examples),
        folder(setup_with(seed=5), examples),
        folder(touched, examples),
        folder(configured, examples),
        folder(setup_with(), others),
        folder(setup_with(), examples, complete=objective_of("dpo").complete),
    ]
    assert len(set(found)) == len(found)
    assert folder(setup_with(), examples) == found[0]


def test_an_interrupted_computation_leaves_nothing_behind(tmp_path):
    class Breaking(Counting):
        def logps(self, batch):
            if self.asked == 2:
                raise KeyboardInterrupt
            return super().logps(batch)

    examples = examples_for("dpo")
    with pytest.raises(KeyboardInterrupt):
        computed(setup_with(Breaking), examples, tmp_path)
    assert [file for file in tmp_path.rglob("*") if not file.name.endswith(".lock")] == []
    whole = setup_with()
    computed(whole, examples, tmp_path)
    assert whole.reference.asked == 3


def test_a_log_prob_that_is_no_number_names_the_row(tmp_path):
    setup = setup_with()
    with torch.no_grad():
        setup.reference.own.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="row 0"):
        computed(setup, examples_for("dpo"), tmp_path)
    assert not list(tmp_path.rglob("*.arrow"))


def with_adapter() -> PolicySetup:
    model = adapt(
        build_model("llama"),
        AdapterConfig(),
        lora.Config(lora_dropout=0.3),
        model_config=ModelConfig(model_name_or_path="here"),
        trainable=True,
        seed=0,
    )
    setup = PolicySetup(model)
    setup.reference = AdapterOff(setup)
    return setup


def test_an_adapter_that_is_switched_off_counts_for_nothing(tmp_path):
    fresh, trained = with_adapter(), with_adapter()
    with torch.no_grad():
        for name, parameter in trained.model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    assert fingerprint(fresh) == fingerprint(trained)
    trained.model.train()
    examples = examples_for("dpo", 4)
    rows, _ = computed(trained, examples, tmp_path)
    base = build_model("llama").eval()
    for index in range(len(examples)):
        for path in rows[index][0][0].paths:
            assert list(path.columns[REFERENCE_COLUMN]) == pytest.approx(plain(base, path), abs=1e-5, nan_ok=True)
    with torch.no_grad():
        next(p for n, p in trained.model.named_parameters() if "lora_" not in n).add_(0.1)
    assert fingerprint(fresh) != fingerprint(trained)


def test_rows_that_hold_several_examples_keep_them_and_travel_to_other_processes(tmp_path):
    examples = examples_for("dpo")
    rows, collator = computed(setup_with(), examples, tmp_path, bundles=[[4, 0], [6]])
    sent = pickle.loads(pickle.dumps(rows))
    assert [where for _, where in sent[0]] == ["row 4", "row 0"]
    batch = collator([sent[0], sent[1]])["batch"]
    assert not batch.columns[REFERENCE_COLUMN].isnan().any()
    assert len(batch.columns[REFERENCE_COLUMN]) == len(batch.edge)
    assert isinstance(sent[0][0][0], Encoded)


def test_a_policy_without_a_reference_reads_the_column(tmp_path):
    setup = setup_with()
    rows, collator = computed(setup, examples_for("dpo"), tmp_path)
    batch = collator([rows[0], rows[1]])["batch"]
    live = setup.reference.logps(batch)
    setup.reference = None
    assert setup.bind().reference(batch).tolist() == pytest.approx(live.tolist(), abs=1e-5)


def test_several_evaluation_sets_are_stored_each_by_itself(tmp_path):
    trainer = trainer_for("dpo", tmp_path, items=examples_for("dpo"))
    other = Examples(items_for(objective_of("dpo"), 3, seed=8))
    other.fingerprint = "the other examples"
    trainer.eval_dataset = {"a": Bundles(examples_for("dpo")), "b": Bundles(other)}
    live = trainer.evaluate()
    give_up_reference(trainer, tmp_path / "cache")
    stored = trainer.evaluate()
    for name in ("eval_a_loss", "eval_b_loss", "eval_b_rewards/margins"):
        assert stored[name] == pytest.approx(live[name], abs=1e-5)
    assert stored["eval_a_loss"] != pytest.approx(stored["eval_b_loss"], abs=1e-4)
