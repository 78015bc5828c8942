"""From text to loss: the end of a turn is learnt, and what is served is what was trained."""

from __future__ import annotations

import json

import pytest
import torch

from luthier.core.types import Answer, Example, Message
from luthier.data.layout import collate
from luthier.data.renderer import make_renderer
from luthier.data.template import TemplateConfig
from luthier.model.policy import PolicySetup
from luthier.objectives.sft import Sft
from tests.conftest import build_model, build_tokenizer

EXAMPLE = Example((Message("user", "hello"),), (Answer((Message("assistant", "goodbye"),)),))


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@pytest.mark.parametrize("template", [None, "qwen", "llama2", "vicuna"])
def test_the_end_is_supervised_although_padding_looks_the_same(template, layout):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    renderer = make_renderer(TemplateConfig(template=template), tokenizer)
    encoded = [*Sft().encode(EXAMPLE, renderer, cutoff_len=200)] * 2
    longer = Example(EXAMPLE.prompt, (Answer((Message("assistant", "goodbye, one two three four five six"),)),))
    encoded += Sft().encode(longer, renderer, cutoff_len=200)
    batch = collate([(item, "") for item in encoded], layout=layout, pad_id=tokenizer.pad_token_id)
    learnt = batch.ids.reshape(-1)[batch.target[batch.edge]]
    stops = torch.isin(learnt, torch.tensor(renderer.stop_ids))
    for answer in range(3):
        assert stops[batch.answer == answer].sum() == 1
    assert batch.weight.sum() == sum(sum(path.weights[1:]) for item in encoded for path in item.paths)


@pytest.mark.parametrize("template", [None, "qwen", "llama2", "vicuna"])
def test_the_prompt_that_is_served_is_the_prompt_that_was_trained(template):
    renderer = make_renderer(TemplateConfig(template=template), build_tokenizer())
    (encoded,) = Sft().encode(EXAMPLE, renderer, cutoff_len=200)
    path = encoded.paths[0]
    prompt = renderer.prompt(EXAMPLE.prompt)
    first = next(i for i, weight in enumerate(path.weights) if weight)
    assert path.ids[:first] == prompt


def test_neftune_adds_noise_in_training_only(tmp_path):
    from tests.exact.runs import trainer_for

    quiet = trainer_for("sft", tmp_path, lr=0.0)
    noisy = trainer_for("sft", tmp_path, lr=0.0, neftune_noise_alpha=50.0)
    for trainer in (quiet, noisy):
        trainer.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (quiet, noisy)]
    assert max(abs(a - b) for a, b in zip(*losses)) > 1e-4
    assert quiet.evaluate()["eval_loss"] == pytest.approx(noisy.evaluate()["eval_loss"], abs=1e-12)


def test_a_weight_of_one_moves_under_bf16(tmp_path, model_folder, monkeypatch):
    """In bfloat16 an update of 1e-5 to a weight of 1.0 is lost; what is trained must be kept in float32."""
    from safetensors.torch import load_file

    from luthier.fit import fit
    from luthier.run import resolve
    from luthier.train import config

    monkeypatch.setattr(config, "_native_bf16", lambda: True)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "hello", "output": "goodbye world"}) + "\n")
    keys = {
        "model_name_or_path": str(model_folder), "stage": "sft", "finetuning_type": "full", "dataset": str(rows),
        "data_cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "max_steps": 3, "bf16": True,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "save_strategy": "no",
    }  # fmt: skip
    run = resolve(keys)
    assert run.training["bf16"] is True
    fit(run)
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert norm.dtype == torch.float32
    assert 0 < (norm - 1).abs().max() < 1e-4
    assert torch.equal(norm.bfloat16(), torch.ones_like(norm, dtype=torch.bfloat16)), "bfloat16 would not have moved"


def test_a_tiny_model_learns_a_row_by_heart_and_says_it(tmp_path, model_folder):
    """The whole line: YAML keys to weights to words."""
    from luthier.fit import fit
    from luthier.infer import main as infer
    from luthier.run import resolve

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "hello", "output": "goodbye world"}) + "\n")
    keys = {
        "model_name_or_path": str(model_folder), "stage": "sft", "finetuning_type": "full", "dataset": str(rows),
        "data_cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), "max_steps": 60,
        "learning_rate": 0.01, "per_device_train_batch_size": 1, "logging_steps": 20, "save_strategy": "no",
    }  # fmt: skip
    fit(resolve(keys))
    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {tmp_path / 'out'}\ndo_sample: false\nmax_new_tokens: 20\n")
    prompts, answers = tmp_path / "in.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(json.dumps({"prompt": "hello"}) + "\n")
    assert infer([str(config), "--input", str(prompts), "--output", str(answers)]) == 0
    assert json.loads(answers.read_text())["predict"] == "goodbye world"


def test_lora_weights_reach_every_layout(model_folder):
    """Gradients of an adapter on a frozen base, with gradient checkpointing, are those without it."""
    from luthier.adapters.lora import Config
    from luthier.model.adapt import AdapterConfig, adapt
    from luthier.model.source import ModelConfig

    renderer = make_renderer(TemplateConfig(), build_tokenizer())
    items = [(item, "") for item in Sft().encode(EXAMPLE, renderer, cutoff_len=200)]
    found = []
    for checkpointing in (False, True):
        model = adapt(
            build_model("llama"), AdapterConfig(), Config(), trainable=True,
            model_config=ModelConfig(model_name_or_path=str(model_folder)),
        )  # fmt: skip
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = collate(items, layout="packed", pad_id=3)
        batch.mean(PolicySetup(model).bind().nll(batch), over="token").backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any(gradient.abs().max() > 0 for gradient in found[0].values())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
