"""Keys of precision, adapters and optimisers reach the model and the optimiser that a run trains with."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from luthier import fit as module
from luthier.run import resolve
from luthier.train import config as training
from tests.conftest import TINY, build_model, build_tokenizer
from tests.exact.runs import trainer_for, weights


class Stop(Exception):
    """The run has built what the test looks at."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a data set."""
    folder = tmp_path_factory.mktemp("run")
    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def built(folder, tmp_path, **keys):
    """The Trainer that a run would train with."""
    kept = []

    def keep(*args, **parts):
        kept.append(make(*args, **parts))
        raise Stop

    make = module.make_trainer
    base = {"model_name_or_path": str(folder / "model"), "dataset": str(folder / "rows.json"), "cutoff_len": 128}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(module, "make_trainer", keep)
        module.fit(resolve(base | {"output_dir": str(tmp_path), "max_steps": 1} | keys))
    return kept[0]


def kinds(model) -> set[str]:
    return {type(part).__name__ for part in model.modules()}


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_quantised_bases(folder, tmp_path, bits, kind):
    pytest.importorskip("bitsandbytes")
    trainer = built(folder, tmp_path, quantization_bit=bits, quantization_type="fp4")
    assert kind in kinds(trainer.model)
    if bits == 4:
        layer = trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
        assert layer.weight.quant_state.quant_type == "fp4"


def test_fsdp_over_a_four_bit_base(folder, monkeypatch):
    """The keys parse, and weights get the format of the model, so that FSDP can flatten them. What only several GPUs
    show is not tested."""
    pytest.importorskip("bitsandbytes")
    from luthier.assemble import load_base
    from luthier.model.tokenizer import load_tokenizer

    monkeypatch.setattr(training, "has_accelerator", lambda: True)
    run = resolve(
        {"model_name_or_path": str(folder / "model"), "dataset": "d", "output_dir": "o", "quantization_bit": 4,
         "fsdp": "full_shard auto_wrap", "use_cpu": False}
    )  # fmt: skip
    assert run.training["fsdp"]
    model = load_base(run, load_tokenizer(run.model), dtype=torch.bfloat16, device="cpu", sharded=True)
    assert "Linear4bit" in kinds(model) and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_optimisers(folder, tmp_path):
    trainer = built(folder, tmp_path, loraplus_lr_ratio=8.0, learning_rate=1e-3)
    optimizer = trainer.create_optimizer()
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 8e-3}
    trainer = built(folder, tmp_path, finetuning_type="full", use_muon=True)
    assert type(trainer.create_optimizer()).__name__ == "Together"


def test_pure_bf16_on_a_machine_that_has_it(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_native_bf16", lambda: True)
    trainer = built(folder, tmp_path, finetuning_type="full", pure_bf16=True)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert type(trainer.create_optimizer()).__name__ == "StochasticAdamW"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_keeps_the_frozen_base_in_half(folder, tmp_path, name, dtype):
    """What is trained is float32 whatever the frozen base is."""
    from luthier.assemble import weights as chosen

    run = resolve({"model_name_or_path": "m", "dataset": "d", "output_dir": str(tmp_path)})
    args = transformers.TrainingArguments(output_dir="o", report_to="none", use_cpu=True)
    setattr(args, name, True)
    assert chosen(run, args) == dtype
    full = resolve({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "finetuning_type": "full"})
    assert chosen(full, args) == torch.float32
    block = resolve(
        {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "finetuning_type": "full", "use_badam": True}
    )
    assert chosen(block, args) == dtype


def test_the_models_own_keys(folder, tmp_path):
    keys = {"rope_scaling": "linear", "cutoff_len": 1024, "upcast_layernorm": True, "torch_dtype": "bfloat16"}
    trainer = built(folder, tmp_path, **keys)
    assert trainer.model.config.rope_parameters["factor"] == 2.0
    norms = {p.dtype for name, p in trainer.model.named_parameters() if "norm" in name}
    assert norms == {torch.float32}


def test_the_routers_loss(folder, tmp_path):
    config = transformers.MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, num_key_value_heads=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    build_tokenizer().save_pretrained(tmp_path / "mixture")
    keys = {"model_name_or_path": str(tmp_path / "mixture"), "moe_aux_loss_coef": 0.5, "logging_steps": 1}
    trainer = built(folder, tmp_path / "out", **keys, finetuning_type="full")
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "router_loss" in entry)
    assert 0.9 < logged["router_loss"] / 0.5 < 3.0  # 1 is perfect balance, times two experts a token
    plain = built(folder, tmp_path / "plain", **keys | {"moe_aux_loss_coef": None}, finetuning_type="full")
    plain.train()
    apart = logged["loss"] - next(entry for entry in plain.state.log_history if "loss" in entry)["loss"]
    assert apart == pytest.approx(logged["router_loss"], rel=1e-3)


def test_neftune_is_noise_in_training_alone(tmp_path):
    def run(**extra):
        trainer = trainer_for("sft", tmp_path, layout="padded", max_steps=1, dtype=torch.float32, **extra)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, weights(trainer)

    (plain, still), (noisy, moved) = run(), run(neftune_noise_alpha=5.0)
    assert plain == noisy
    assert any(not torch.equal(still[name], moved[name]) for name in still)
