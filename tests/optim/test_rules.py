"""Rules of optimisers: which weights each moves at which rate, and that a saved one goes on as if never stopped."""

from __future__ import annotations

import gc
import io

import pytest
import torch
import transformers

from luthier.adapters import lora
from luthier.core.errors import ConfigError
from luthier.core.registry import find
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.source import ModelConfig
from luthier.optim import adam_mini, apollo, badam, galore, loraplus, muon
from luthier.optim._task import Task, matrices
from tests.conftest import build_model

HERE = ModelConfig(model_name_or_path="unused")
IDS = torch.arange(10, 42).reshape(2, 16)
PACKAGES = {"galore": "galore_torch", "apollo": "apollo_torch", "badam": "badam", "adam_mini": "adam_mini"}


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """BAdam collects garbage whenever a block's turn ends, which takes a second in a large process."""
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)


def task(*, adapter=False, **keys) -> Task:
    keys = {"learning_rate": 1e-2, "weight_decay": 0.1, "optim": "adamw_torch", "use_cpu": True} | keys
    return Task(transformers.TrainingArguments(output_dir="unused", report_to="none", **keys), adapter=adapter)


def gradients(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def steps(model, optimizer, seeds) -> None:
    for seed in seeds:
        gradients(model, seed)
        optimizer.step()
        optimizer.zero_grad()


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before) -> set[str]:
    return {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}


CASES = {
    "muon": (muon, muon.Config(use_muon=True), {}),
    "galore": (galore, galore.Config(use_galore=True, galore_rank=4, galore_update_interval=2), {}),
    "galore adafactor": (galore, galore.Config(use_galore=True, galore_rank=4), {"optim": "adafactor"}),
    "apollo": (apollo, apollo.Config(use_apollo=True, apollo_rank=4, apollo_update_interval=2), {}),
    "apollo svd": (apollo, apollo.Config(use_apollo=True, apollo_rank=4, apollo_proj="svd"), {}),
    "badam": (badam, badam.Config(use_badam=True, badam_switch_interval=4, badam_switch_mode="random"), {}),
    "adam_mini": (adam_mini, adam_mini.Config(use_adam_mini=True), {}),
}


def made(name: str, model):
    rule, config, keys = CASES[name]
    pytest.importorskip(PACKAGES.get(name.split()[0], "torch"))
    return rule.build(model, config, task(**keys))


@pytest.mark.filterwarnings("ignore:BAdam expect")
@pytest.mark.parametrize("name", CASES)
def test_saved_after_three_steps_it_goes_on_to_the_last_bit(name):
    torch.manual_seed(0)
    straight = build_model("llama")
    optimizer = made(name, straight)
    steps(straight, optimizer, range(3))
    for group in optimizer.param_groups:
        group["lr"] *= 0.5  # as a schedule does
    kept, held = weights(straight), io.BytesIO()
    torch.save(optimizer.state_dict(), held)
    steps(straight, optimizer, range(3, 7))

    again = build_model("llama")
    again.load_state_dict(kept)
    resumed = made(name, again)
    held.seek(0)
    resumed.load_state_dict(torch.load(held, weights_only=True))  # as transformers reads checkpoints
    steps(again, resumed, range(3, 7))
    assert all(torch.equal(weights(again)[key], value) for key, value in weights(straight).items())
    assert moved(again, kept)


@pytest.mark.parametrize("name", [name for name in CASES if name != "badam"])
def test_every_trained_weight_is_in_one_group_and_shared_ones_once(name):
    model = build_model("llama", tie_word_embeddings=True)
    model.model.layers[0].requires_grad_(False)
    optimizer = made(name, model)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(held) == len(wanted) and {id(p) for p in held} == {id(p) for p in wanted}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    undecayed = {names[id(p)] for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    assert undecayed == {name for name, parameter in model.named_parameters() if "norm" in name} - {
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }


def adapted(**keys):
    model = build_model("llama")
    config = lora.Config(lora_target="q_proj,embed_tokens", **keys)
    given = AdapterConfig(additional_target="lm_head")
    return adapt(model, given, config, model_config=HERE, trainable=True)


def test_loraplus_has_a_rate_for_each_kind_of_matrix():
    model = adapted(use_dora=False)
    config = loraplus.Config(loraplus_lr_ratio=16.0, loraplus_lr_embedding=3e-5)
    optimizer = loraplus.build(model, config, task(adapter=True, learning_rate=1e-3, adam_beta1=0.8))
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert set(rates) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {"lora_A.": 1e-3, "lora_B.": 16e-3, "lora_embedding": 3e-5, "lm_head": 1e-3}
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(next(value for part, value in wanted.items() if part in name)), name
        assert decay == 0.1
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.999)}


def test_loraplus_leaves_the_optimiser_to_optim():
    optimizer = loraplus.build(adapted(), loraplus.Config(loraplus_lr_ratio=4.0), task(optim="sgd", adapter=True))
    assert isinstance(optimizer, torch.optim.SGD)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: -1"):
        loraplus.Config(loraplus_lr_ratio=-1)


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    model, alone = build_model("llama"), build_model("llama")
    optimizer = made("muon", model)
    hidden = {n for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n}
    own = dict(alone.named_parameters())
    right = [
        torch.optim.Muon([own[n] for n in sorted(hidden)], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([own["model.embed_tokens.weight"], own["lm_head.weight"]], lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW([p for n, p in own.items() if "norm" in n], lr=1e-2, weight_decay=0.0),
    ]
    for seed in range(3):
        gradients(model, seed), gradients(alone, seed)
        optimizer.step()
        for one in right:
            one.step()
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, own[name].detach(), msg=name)


def test_muon_obeys_the_schedule():
    """A scheduler writes into the groups of the whole; every part must see it."""
    model = build_model("llama")
    optimizer = made("muon", model)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, [0])
    assert not moved(model, before)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_low_rank_states_of_the_targets_and_of_nothing_else(name):
    pytest.importorskip(PACKAGES[name])
    rule = find("optim", name)
    config = rule.Config(**{f"use_{name}": True, f"{name}_target": "q_proj,up_proj", f"{name}_rank": 3})
    model = build_model("llama")
    optimizer = rule.build(model, config, task())
    steps(model, optimizer, [0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    low = {names[id(p)] for p, state in optimizer.state.items() if 3 in state["exp_avg"].shape}
    assert low == {f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.up_proj")}
    decays = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay for name, decay in decays.items() if "norm" in name} == {0.0}
    assert {decay for name, decay in decays.items() if "norm" not in name} == {0.1}
    with pytest.raises(ConfigError, match=f"{name}_target: the model has no linear module with 'nope' in its name"):
        rule.build(model, rule.Config(**{f"use_{name}": True, f"{name}_target": "nope"}), task())


def test_apollo_projects_the_other_side_only_where_its_channels_allow_it():
    pytest.importorskip("apollo_torch")
    left = {"use_apollo": True, "apollo_rank": 3, "apollo_proj_type": "left"}
    with pytest.raises(
        ConfigError, match=r"apollo_proj_type: left does not suit model.layers.0.*q_proj.weight \(32 x 32"
    ):
        apollo.build(build_model("llama"), apollo.Config(**left), task())
    # down_proj is 32 x 48: its shorter side is the left one
    for keys in ({"apollo_target": "down_proj"}, {"apollo_scale_type": "tensor"}):
        model = build_model("llama")
        steps(model, apollo.build(model, apollo.Config(**left, **keys), task()), [0, 1])


@pytest.mark.parametrize(
    "wanted, ends",
    [
        ("mlp,self_attn", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        (["mlp"], "gate_proj up_proj down_proj"),
        ("self_attn.q_proj", "q_proj"),
    ],
)
def test_a_target_means_every_module_that_has_it_in_its_name(wanted, ends):
    model = build_model("llama")
    expected = {n for n, p in model.named_parameters() if n.split(".")[-2] in ends.split() and p.ndim == 2}
    assert matrices(model, "galore_target", wanted) == expected and len(expected) == 2 * len(ends.split())


def test_galore_all_leaves_out_the_head():
    pytest.importorskip("galore_torch")
    model = build_model("llama")
    optimizer = galore.build(model, galore.Config(use_galore=True), task())
    special = next(group for group in optimizer.param_groups if "rank" in group)
    assert len(special["params"]) == 14 and special["rank"] == 16 and special["update_proj_gap"] == 200
    assert all(p is not model.lm_head.weight for p in special["params"])


LAYERWISE = {
    "galore": (galore, galore.Config, {"galore_rank": 4, "galore_update_interval": 2}, {}),
    "galore adafactor": (galore, galore.Config, {"galore_rank": 4}, {"optim": "adafactor"}),
    "apollo": (apollo, apollo.Config, {"apollo_rank": 4, "apollo_update_interval": 2, "apollo_scale_front": True}, {}),
}


def learn(model, optimizer, scheduler, steps: int) -> None:
    for _ in range(steps):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", LAYERWISE)
def test_layer_by_layer_is_the_same_training_and_can_be_resumed(name):
    """Weight decay and a falling rate are obeyed; no gradient is left after a backward pass."""
    rule, config, keys, training = LAYERWISE[name]
    short = name.split()[0]
    pytest.importorskip(PACKAGES[short])

    def start(layerwise, kept=None):
        model = build_model("llama")
        if kept is not None:
            model.load_state_dict(kept)
        chosen = config(**keys, **{f"use_{short}": True, f"{short}_layerwise": layerwise})
        optimizer = rule.build(model, chosen, task(**training))
        return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    together, alone = start(False), start(True)
    learn(*together, 2)
    learn(*alone, 2)
    kept, held = weights(alone[0]), io.BytesIO()
    torch.save((alone[1].state_dict(), alone[2].state_dict()), held)
    learn(*together, 3)
    learn(*alone, 3)
    assert all(torch.equal(weights(alone[0])[key], weight) for key, weight in weights(together[0]).items())
    alone[0](IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is None for parameter in alone[0].parameters())

    again = start(True, kept)
    held.seek(0)
    for part, state in zip(again[1:], torch.load(held, weights_only=True)):
        part.load_state_dict(state)
    learn(*again, 3)
    assert all(torch.equal(weights(again[0])[key], weight) for key, weight in weights(together[0]).items())


@pytest.mark.filterwarnings("ignore:BAdam expect")
def test_badam_trains_one_block_at_a_time():
    pytest.importorskip("badam")
    model = build_model("llama")
    config = badam.Config(use_badam=True, badam_switch_interval=2, badam_switch_mode="descending")
    optimizer = badam.build(model, config, task())
    turns = []
    for seed in range(6):
        before = weights(model)
        steps(model, optimizer, [seed])
        turns.append({name.split(".")[2] for name in moved(model, before)})
    # BAdam counts its first step as the second of a block.
    assert turns in ([{"1"}, {"0"}, {"0"}, {"1"}, {"1"}, {"0"}], [{"1"}, {"1"}, {"0"}, {"0"}, {"1"}, {"1"}])


def test_adam_mini_keeps_one_second_moment_per_head():
    pytest.importorskip("adam_mini")
    model = build_model("llama")
    optimizer = made("adam_mini", model)
    steps(model, optimizer, [0])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sizes = {names[id(p)]: state["vmean"].numel() for p, state in optimizer.state.items() if "vmean" in state}
    assert sizes["model.layers.0.self_attn.q_proj.weight"] == 4
    assert sizes["model.layers.0.self_attn.k_proj.weight"] == 2
    assert sizes["model.layers.0.mlp.up_proj.weight"] == 48
    for wrong, words in ((task(adapter=True), "an adapter"), (task(optim="sgd"), "goes with optim: adamw_torch")):
        with pytest.raises(ConfigError, match=f"use_adam_mini: .*{words}"):
            adam_mini.check(CASES["adam_mini"][1], wrong)
    with pytest.raises(ConfigError, match="4 heads of 16 in 32"):
        adam_mini.build(build_model("llama", head_dim=16), CASES["adam_mini"][1], task())


@pytest.mark.parametrize(
    ("rule", "keys", "words"),
    [
        (badam, {"use_badam": True, "badam_switch_mode": "fixed"}, "badam_start_block"),
    ],
)
def test_keys_that_make_no_sense(rule, keys, words):
    with pytest.raises(ConfigError, match=words):
        rule.Config(**keys)
