"""Base models in few bits: what is quantised and how, what trains on top, and what is refused in plain words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from luthier.adapters import full, lora, oft
from luthier.core.errors import ConfigError
from luthier.model.adapt import AdapterConfig, adapt
from luthier.model.load import load_model
from luthier.model.quantise import QuantConfig, stored_as
from luthier.model.source import ModelConfig
from tests.conftest import build_model, build_tokenizer

IDS = torch.arange(10, 42).reshape(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose rows are as long as a block of 4-bit weights."""
    folder = tmp_path_factory.mktemp("model")
    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder, *, dtype=torch.float32, sharded=False, **keys):
    pytest.importorskip("bitsandbytes")
    config = ModelConfig(model_name_or_path=str(folder))
    return load_model(config, dtype=dtype, quant=QuantConfig(**keys), sharded=sharded)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def error(folder, **keys) -> float:
    """Root mean square error of the logits, as a share of theirs."""
    right = logits(load_model(ModelConfig(model_name_or_path=str(folder)), dtype=torch.float32))
    return float((logits(loaded(folder, **keys)) - right).norm() / right.norm())


def kinds(model) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def test_both_bits_keep_linear_layers_small_and_say_nearly_the_same(folder):
    four, eight = loaded(folder, quantization_bit=4), loaded(folder, quantization_bit=8)
    assert "Linear4bit" in kinds(four) and "Linear8bitLt" in kinds(eight)
    sizes = [m.model.layers[0].mlp.up_proj.weight.nbytes for m in (four, eight)]
    assert sizes == [64 * 128 // 2, 64 * 128]
    assert type(four.lm_head).__name__ == type(four.model.embed_tokens).__name__.replace("Embedding", "Linear")
    assert 0 < error(folder, quantization_bit=8) < 0.03 < error(folder, quantization_bit=4) < 0.3


def test_the_kind_of_four_bit_number_and_its_scales(folder):
    def state(**keys):
        return loaded(folder, quantization_bit=4, **keys).model.layers[0].mlp.up_proj.weight.quant_state

    assert (state().quant_type, state().nested) == ("nf4", True)
    assert (state(quantization_type="fp4").quant_type, state(double_quantization=False).nested) == ("fp4", False)
    assert error(folder, quantization_bit=4) < error(folder, quantization_bit=4, quantization_type="fp4")


def test_sharded_training_gets_weights_in_the_models_own_format(folder):
    """FSDP flattens weights of one dtype together; four-bit numbers hide in bfloat16 then."""
    whole, cut = (loaded(folder, dtype=torch.bfloat16, quantization_bit=4, sharded=s) for s in (False, True))
    assert whole.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    assert {parameter.dtype for parameter in cut.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(whole), logits(cut))
    with pytest.raises(ConfigError, match="quantization_bit: sharded training"):
        loaded(folder, quantization_bit=8, sharded=True)


@pytest.mark.parametrize(
    ("bits", "kind", "keys"),
    [
        (4, "lora", lora.Config()),
        (8, "lora", lora.Config()),
        (4, "lora", lora.Config(use_dora=True)),
        (4, "oft", oft.Config(oft_block_size=32)),
        (8, "oft", oft.Config(oft_block_size=32)),
    ],
)
def test_adapters_learn_on_top_and_the_base_stands_still(folder, bits, kind, keys):
    base = loaded(folder, quantization_bit=bits)
    here = ModelConfig(model_name_or_path=str(folder))
    model = adapt(base, AdapterConfig(finetuning_type=kind), keys, model_config=here, trainable=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(f"{kind}_" in name for name in moved)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_look_in_evaluation_mode_does_not_cost_the_gradients(folder, bits):
    """The first batch is checked in evaluation mode. On some CPUs bitsandbytes then repacks 4-bit weights for a kernel
    that has no backward pass; the gradients of a model with the same weights in float32 tell."""
    import bitsandbytes

    here = ModelConfig(model_name_or_path=str(folder))
    few, whole = loaded(folder, quantization_bit=bits), load_model(here, dtype=torch.float32)
    for name, module in few.named_modules():
        if type(module).__name__ == "Linear4bit":
            exact = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif type(module).__name__ == "Linear8bitLt":
            exact = module.weight.CB.float() * module.weight.SCB[:, None] / 127
        else:
            continue
        whole.get_submodule(name).weight.data.copy_(exact)
    found = []
    for base in (few, whole):
        model = adapt(base, AdapterConfig(), lora.Config(), model_config=here, trainable=True)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        logits(model)
        model.train()(IDS, labels=IDS).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    tolerance = 1e-4 if bits == 4 else 0.05  # 8 bits round what goes in, too
    for name, gradient in found[1].items():
        assert (found[0][name] - gradient).norm() < tolerance * gradient.norm(), name


def test_for_inference_the_adapter_stays_on_top(folder, tmp_path):
    here = ModelConfig(model_name_or_path=str(folder))
    model = adapt(loaded(folder, quantization_bit=4), AdapterConfig(), lora.Config(), model_config=here, trainable=True)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    given = AdapterConfig(adapter_name_or_path=str(tmp_path))
    again = adapt(loaded(folder, quantization_bit=4), given, lora.Config(), model_config=here, trainable=False)
    effect = (wanted - logits(loaded(folder, quantization_bit=4))).abs().max()
    # Some CPUs answer by a faster kernel in bfloat16, which training does not use.
    assert (logits(again) - wanted).abs().max() < 0.03 * effect
    assert not any(weight.requires_grad for weight in again.parameters()) and not again.training


@pytest.mark.parametrize(
    ("adapter", "keys", "trainable", "words"),
    [
        (AdapterConfig(finetuning_type="full"), full.Config(), True, "finetuning_type: full trains the model's own"),
        (AdapterConfig(adapter_name_or_path="A,A"), lora.Config(), True, "2 to be merged into a quantised model"),
        (AdapterConfig(adapter_name_or_path="A,A"), lora.Config(), False, "2 to be merged into a quantised model"),
        (
            AdapterConfig(adapter_name_or_path="A", create_new_adapter=True),
            lora.Config(),
            True,
            "1 to be merged into a quantised model",
        ),
    ],
)
def test_what_cannot_be_done_to_a_quantised_model(folder, tmp_path, monkeypatch, adapter, keys, trainable, words):
    here = ModelConfig(model_name_or_path=str(folder))
    adapt(build_model("llama"), AdapterConfig(), lora.Config(), model_config=here, trainable=True).save_pretrained(
        tmp_path / "A"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=words):
        adapt(loaded(folder, quantization_bit=4), adapter, keys, model_config=here, trainable=trainable)


def test_a_model_that_is_stored_in_four_bits_needs_no_key(folder, tmp_path):
    model = loaded(folder, quantization_bit=4)
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert stored_as(again.config) == "bnb" and "Linear4bit" in kinds(again)
    assert torch.equal(logits(again), logits(model))
    here = ModelConfig(model_name_or_path=str(tmp_path))
    adapted = adapt(again, AdapterConfig(), lora.Config(lora_target="q_proj"), model_config=here, trainable=True)
    assert any(weight.requires_grad for weight in adapted.parameters())
    with pytest.raises(ConfigError, match="quantization_bit: the model is stored quantised already .bnb."):
        loaded(tmp_path, quantization_bit=4)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "gptq needs gptqmodel and optimum, which are not installed: pip install gptqmodel optimum"),
        ("awq", "awq needs gptqmodel, which is not installed"),
        ("aqlm", "aqlm needs"),
    ],
)
def test_stored_methods_whose_packages_are_missing(folder, tmp_path, method, words):
    stored = shutil.copytree(folder, tmp_path / "stored")
    settings = json.loads((stored / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, "bits": 4}
    (stored / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=f"quantization_method: {words}"):
        load_model(ModelConfig(model_name_or_path=str(stored)))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"quantization_bit": 5}, "quantization_bit: bnb keeps 4 or 8 bits, and 5 were asked for"),
        ({"quantization_bit": 4, "quantization_method": "eetq"}, "eetq keeps 8 bits"),
        ({"quantization_bit": 4, "quantization_method": "gptq"}, "gptq cannot quantise a model while it is loaded"),
        ({"quantization_method": "bnbb"}, "quantization_method: There is no method named 'bnbb'. Did you mean 'bnb'"),
        ({"quantization_bit": 5, "quantization_method": "bitsandbytes"}, "bnb keeps 4 or 8 bits, and 5 were asked for"),
        ({"quantization_bit": 8, "quantization_device_map": "auto"}, "quantization_device_map: auto is for 4-bit"),
    ],
)
def test_values_that_mean_nothing(keys, words):
    with pytest.raises(ConfigError, match=words):
        QuantConfig(**keys)


@pytest.mark.parametrize(
    ("method", "bits", "words"),
    [("quanto", 8, "needs optimum-quanto"), ("eetq", 8, "needs kernels"), ("hqq", 4, "needs hqq")],
)
def test_methods_whose_packages_or_devices_are_missing(folder, method, bits, words):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(ConfigError, match=f"quantization_method: {method} {words}"):
        loaded(folder, quantization_bit=bits, quantization_method=method)


def test_random_weights_are_not_quantised(folder):
    config = ModelConfig(model_name_or_path=str(folder), train_from_scratch=True)
    with pytest.raises(ConfigError, match="train_from_scratch: random weights cannot be trained in few bits"):
        load_model(config, quant=QuantConfig(quantization_bit=4))


def test_fp8_checkpoints_are_unpacked(tmp_path):
    """Blocks of 8-bit floats with a scale each, written by hand, come out as the weights they stand for."""
    from safetensors.torch import load_file, save_file

    build_model("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    right = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448.0
        packed = (tensors[name] / scale).to(torch.float8_e4m3fn)
        right[name] = packed.float() * scale
        tensors[name] = packed
        blocks = [-(-size // 128) for size in packed.shape]
        tensors[f"{name}_scale_inv"] = scale.expand(blocks).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.float32)
    for name, wanted in right.items():
        torch.testing.assert_close(model.get_parameter(name), wanted, rtol=1e-2, atol=1e-4)
    here = ModelConfig(model_name_or_path=str(tmp_path))
    trained = adapt(model, AdapterConfig(finetuning_type="full"), full.Config(), model_config=here, trainable=True)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in trained.parameters())


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""Magnitudes of the eight codes of a 4-bit float (OCP Microscaling Formats 1.0, E2M1); the upper bit is the sign."""


def test_mxfp4_checkpoints_are_unpacked(tmp_path):
    """gpt-oss as it is published: two codes a byte, lower half first, 32 of them to a power of two, written by hand."""
    import transformers
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.GptOssConfig(vocab_size=400, layer_types=["full_attention"], **sizes, **more)
    )
    model.save_pretrained(tmp_path)
    tensors, right = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inside, outside = tensors.pop(name).shape
        codes = torch.randint(16, (experts, outside, inside))
        scales = torch.randint(120, 127, (experts, outside, inside // 32))
        signs = torch.where(codes >= 8, -1.0, 1.0)
        values = signs * torch.tensor(FP4)[codes % 8] * (2.0 ** (scales - 127)).repeat_interleave(32, -1)
        right[name] = values.transpose(1, 2)  # in memory an expert's rows are what it is given
        packed = codes[..., 0::2] + 16 * codes[..., 1::2]
        tensors[f"{name}_blocks"] = packed.reshape(experts, outside, inside // 32, 16).to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
    assert len(right) == 2
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = load_model(ModelConfig(model_name_or_path=str(tmp_path)), dtype=torch.float32)
    for name, wanted in right.items():
        assert torch.equal(model.get_parameter(name), wanted), name
    here = ModelConfig(model_name_or_path=str(tmp_path))
    trained = adapt(model, AdapterConfig(finetuning_type="full"), full.Config(), model_config=here, trainable=True)
    assert all(weight.dtype == torch.float32 and weight.requires_grad for weight in trained.parameters())


def test_the_older_name_of_bitsandbytes_means_the_same(folder):
    assert "Linear4bit" in kinds(loaded(folder, quantization_bit=4, quantization_method="bitsandbytes"))


def test_what_is_missing_is_said_before_data_are_read(tmp_path, monkeypatch):
    """A large data set takes an hour to encode."""
    from luthier import fit
    from luthier.run import resolve

    monkeypatch.setattr(fit, "load_data", lambda *args, **keys: pytest.fail("data were read"))
    keys = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(tmp_path), "quantization_bit": 4}
    with pytest.raises(ConfigError, match="quanto needs optimum-quanto"):
        fit.fit(resolve(keys | {"quantization_method": "quanto"}))
