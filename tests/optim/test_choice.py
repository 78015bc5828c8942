"""Which optimiser a run gets, and what is said where it cannot have the one it asks for."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch
import transformers

from luthier.core.errors import ConfigError
from luthier.core.registry import find, names
from luthier.optim._task import Task
from luthier.train import optimiser
from tests.conftest import build_model

OPTIM = {name: find("optim", name).Config() for name in names("optim")}


def task(*, pure_bf16=False, **keys) -> Task:
    args = transformers.TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **keys)
    return Task(args, adapter=False, pure_bf16=pure_bf16)


def chosen(*, pure_bf16=False, optim="adamw_torch", training=(), **keys):
    configs = dict(OPTIM)
    for key, value in keys.items():
        home = next(name for name, config in OPTIM.items() if key in vars(config))
        configs[home] = type(OPTIM[home])(**{key: value})
    return optimiser.choose(configs, task(pure_bf16=pure_bf16, optim=optim, **dict(training)))


@pytest.fixture
def bare(monkeypatch):
    """No optional package is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def stocked(monkeypatch):
    """Every optional package is installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_by_default_transformers_chooses():
    assert chosen() is None and chosen(optim="sgd") is None


@pytest.mark.parametrize("key", ["use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"])
def test_a_key_chooses_its_rule_and_comes_before_rounding(stocked, key):
    for pure in (False, True):
        factory, settings = chosen(pure_bf16=pure, **{key: True})
        assert settings["rule"].__name__ == f"luthier.optim.{key.removeprefix('use_')}"
        assert getattr(settings["config"], key) is True
    assert chosen(loraplus_lr_ratio=4.0)[1]["rule"].__name__.endswith("loraplus")


def test_two_optimisers_are_one_too_many(stocked):
    with pytest.raises(ConfigError, match="adam_mini and muon are optimisers, and a run has one"):
        chosen(use_muon=True, use_adam_mini=True)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_pure_bf16_rounds_at_random(optim, caplog):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        factory, settings = chosen(pure_bf16=True, optim=optim)
    made = factory()(torch.nn.Linear(3, 2, dtype=torch.bfloat16), **settings)
    assert type(made).__name__ == "StochasticAdamW" and not caplog.records
    assert [group["weight_decay"] for group in made.param_groups] == [0.0, 0.0]


def test_pure_bf16_with_an_optimiser_that_rounds_to_the_nearest_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        assert chosen(pure_bf16=True, optim="adafactor") is None
    assert "pure_bf16 with optim: adafactor" in caplog.text and "vanish" in caplog.text


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("galore_adamw", "galore-torch"), ("apollo_adamw_layerwise", "apollo-torch"), ("adalomo", "lomo-optim"),
        ("lomo", "lomo-optim"), ("grokadamw", "grokadamw"), ("schedule_free_radam", "schedulefree"),
        ("stable_adamw", "torch-optimi"), ("adamw_torch_8bit", "torchao"), ("adamw_8bit", "luthier.quant."),
        ("paged_lion_8bit", "luthier.quant."), ("rmsprop_bnb", "luthier.quant."), ("ademamix", "luthier.quant."),
    ],
)  # fmt: skip
def test_what_optim_names_and_is_not_installed(bare, optim, package):
    with pytest.raises(ConfigError, match=f"optim: {optim} needs the package {package}, .* pip install"):
        chosen(optim=optim)


def test_every_optimiser_of_transformers_that_imports_a_package_is_in_the_table():
    """Read from transformers: each handler's messages name what it needs."""
    import inspect

    from transformers import trainer_optimizer

    starts = tuple(start for start, _, _ in optimiser.PACKAGES)
    for name, handler in trainer_optimizer._OPTIMIZER_HANDLERS.items():
        needs = "import" in inspect.getsource(handler) and handler.__name__ != "_get_adamw_torch"
        assert needs == str(name.value).startswith(starts), name


@pytest.mark.parametrize("key", ["use_galore", "use_apollo", "use_badam", "use_adam_mini"])
def test_what_a_rule_needs_and_is_not_installed(bare, key):
    package = key.removeprefix("use_").replace("_", "-")
    with pytest.raises(ConfigError, match=f"{key} needs the package {package}.*pip install {package}"):
        chosen(**{key: True})


@pytest.mark.parametrize(
    ("optim", "training", "words"),
    [
        ("galore_adamw", {}, "needs optim_target_modules"),
        (
            "apollo_adamw",
            {"optim_target_modules": "all-linear", "optim_args": "rank=4,gap=2"},
            "optim_args: gap=2: optim: apollo_adamw knows no 'gap'. Choose from: rank, proj, ",
        ),
        (
            "galore_adamw",
            {"optim_target_modules": "all-linear", "optim_args": "rank=few"},
            "optim_args: rank=few: expected a number",
        ),
        ("schedule_free_adamw", {"warmup_steps": 0.1}, "warmup_steps: .* wants a number of steps"),
    ],
)
def test_what_transformers_would_ignore_or_stumble_over(stocked, optim, training, words):
    with pytest.raises(ConfigError, match=words):
        chosen(optim=optim, training=training)


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ("adalomo", "needs a CUDA device"),
        ("galore_adamw_8bit", "needs a CUDA device"),
    ],
)
def test_names_that_would_end_in_a_traceback(stocked, optim, words):
    """Each did, after the data were read and the model loaded."""
    if torch.cuda.is_available() and "CUDA" in words:
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=f"optim: {optim} {words}"):
        chosen(optim=optim, training={"optim_target_modules": "all-linear"})


@pytest.mark.parametrize("optim", ["lomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_optimisers_that_step_in_the_backward_pass(stocked, caplog, optim):
    targets = {"optim_target_modules": "all-linear"}
    with pytest.raises(ConfigError, match=f"gradient_accumulation_steps: optim: {optim} .* Write 1."):
        chosen(optim=optim, training=targets | {"gradient_accumulation_steps": 2})
    with caplog.at_level(logging.WARNING, logger="luthier"):
        chosen(optim=optim, training=targets)
        assert "max_grad_norm has no effect" in caplog.text
        caplog.clear()
        chosen(optim=optim, training=targets | {"max_grad_norm": 0.0, "lr_scheduler_type": "constant"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("keys", "training", "words"),
    [
        ({"use_galore": True}, {"optim": "adamw_8bit"}, "use_galore: with optim: adamw_8bit GaLore needs a CUDA"),
        ({"use_muon": True}, {"optim": "sgd"}, "use_muon: goes with optim: adamw_torch"),
        ({"use_badam": True}, {"optim": "adafactor"}, "use_badam: goes with optim: adamw_torch"),
    ],
)
def test_what_a_rule_cannot_do_is_said_before_anything_is_read(stocked, keys, training, words):
    if torch.cuda.is_available() and "CUDA" in words:
        pytest.skip("there is a GPU")
    optim = training["optim"]
    with pytest.raises(ConfigError, match=words):
        chosen(optim=optim, **keys)


@pytest.mark.parametrize("rule", ["galore", "apollo"])
def test_layer_by_layer_under_fp16(rule):
    """Gradients are scaled until the optimiser steps, and here each weight has stepped by then."""
    module = find("optim", rule)
    config = module.Config(**{f"use_{rule}": True, f"{rule}_layerwise": True})
    halved = task(optim="adamw_torch")
    halved.args.fp16 = True
    with pytest.raises(ConfigError, match=f"{rule}_layerwise: fp16 scales gradients"):
        module.check(config, halved)


@pytest.mark.parametrize(
    ("optim", "base", "layerwise"),
    [
        ("galore_adamw", "adamw_torch", False),
        ("galore_adafactor", "adafactor", False),
        ("galore_adafactor_layerwise", "adafactor", True),
        ("apollo_adamw", "adamw_torch", False),
        ("apollo_adamw_layerwise", "adamw_torch", True),
    ],
)
def test_low_rank_optimisers_by_transformers_names(optim, base, layerwise):
    """With transformers' settings, by the files in optim/: transformers cannot read their checkpoints again."""
    kind = optim.split("_")[0]
    pytest.importorskip(f"{kind}_torch")
    given = {"optim_target_modules": ["q_proj"], "optim_args": "rank=3, scale=0.5", "weight_decay": 0.1}
    factory, settings = chosen(optim=optim, training=given)
    assert settings["task"].optim == base and settings["rule"].__name__ == f"luthier.optim.{kind}"
    model = build_model("llama")
    optimizer = factory()(model, **settings)
    special = [group for group in optimizer.param_groups if "rank" in group]
    wanted = {"rank": 3, "update_proj_gap": 200, "scale": 0.5, "proj_type": "std", "weight_decay": 0.1}
    assert all(group.items() >= wanted.items() for group in special)
    assert sum(len(group["params"]) for group in special) == 2
    assert (type(optimizer).__name__ == "InBackward") == layerwise
    _, settings = chosen(optim=optim, training={"optim_target_modules": "all-linear"})
    config = settings["config"]
    found = [vars(config)[f"{kind}_{name}"] for name in ("target", "rank", "scale", "layerwise")]
    assert found == ["all", 128, 0.25 if kind == "galore" else 1.0, layerwise]


def test_what_a_package_forgets_is_said(stocked, caplog):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        chosen(optim="grokadamw")
        assert "a resumed run begins anew" in caplog.text
        chosen(optim="lomo", training={"weight_decay": 0.1})
        assert "weight_decay has no effect" in caplog.text


def test_schedule_free_with_a_schedule_is_pointed_out(stocked, caplog):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        chosen(optim="schedule_free_adamw")
        assert "lr_scheduler_type: constant suits it" in caplog.text
        caplog.clear()
        chosen(optim="schedule_free_adamw", training={"lr_scheduler_type": "constant"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("optim", "training", "words"),
    [
        ("sgd", {"adam_beta2": 0.95}, ["adam_beta2 has no effect on optim: sgd."]),
        ("sgd", {"optim_args": "momentum=0.9, foo=1"}, ["optim_args: foo=1 has no effect on optim: sgd."]),
        ("adamw_torch", {"optim_args": "foo=1", "adam_beta1": 0.8}, ["optim_args: foo=1 has no effect on optim"]),
        ("adafactor", {"adam_epsilon": 1e-6}, ["adam_epsilon has no effect on optim: adafactor."]),
        ("adamw_torch", {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}, []),
    ],
)
def test_settings_that_never_reach_the_optimiser_are_said(caplog, optim, training, words):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        chosen(optim=optim, training=training)
    assert len(caplog.records) == len(words) and all(word in caplog.text for word in words)


def test_optim_args_with_an_optimiser_of_its_own_keys(stocked, caplog):
    with caplog.at_level(logging.WARNING, logger="luthier"):
        chosen(use_galore=True, training={"optim_args": "rank=4"})
    assert "optim_args has no effect: the optimiser is made by galore, whose own keys set it." in caplog.text


@pytest.mark.parametrize("text", ["momentum", "momentum=high"])
def test_optim_args_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match=f"optim_args: '{text}' cannot be read for optim: sgd"):
        chosen(optim="sgd", training={"optim_args": text})
