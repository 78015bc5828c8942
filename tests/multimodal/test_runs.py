"""Whole runs with images: training, saving, loading again, inference, preview, and what is refused before a step."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch

from luthier.core.errors import DataError
from luthier.fit import fit
from luthier.model.processor import load_processor
from luthier.model.source import ModelConfig
from luthier.run import resolve
from tests.multimodal.conftest import row, write


@pytest.fixture(scope="module")
def data(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("rows")
    colours = ["red", "blue"]
    rows = [row("<image>What colour?", f"It is {colours[n % 2]}.", f"{colours[n % 2]}.png") for n in range(8)]
    write(folder, [*rows, {"messages": row("Hi", "Hello")["messages"]}])
    write(folder, [*rows[:2], row("<image>", "x", "gone.png"), row("none", "x", "red.png")], "bad.jsonl")
    return folder


def keys(family, data, pictures, tmp_path, **more):
    base = {
        "model_name_or_path": str(family.folder), "dataset": str(data / "train.jsonl"), "media_dir": str(pictures),
        "output_dir": str(tmp_path / "out"), "data_cache_dir": str(tmp_path / "cache"), "finetuning_type": "full",
        "learning_rate": 5e-3, "num_train_epochs": 4, "per_device_train_batch_size": 3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "overwrite_output_dir": True,
    }  # fmt: skip
    return base | more


def losses(folder):
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen3_vl"])
def test_a_run_learns_and_what_it_saves_is_whole(family, data, pictures, tmp_path, request, caplog):
    from transformers import AutoModelForImageTextToText

    family = request.getfixturevalue(family)
    more = {"freeze_multi_modal_projector": False, "learning_rate": 2e-2, "num_train_epochs": 8}
    if "Llava" in type(family.model).__name__:
        more["dataloader_num_workers"] = 1
    with caplog.at_level(logging.INFO, "luthier"):
        fit(resolve(keys(family, data, pictures, tmp_path, **more), []))
    found = losses(tmp_path / "out")
    assert found[-1] < 0.5 * found[0]
    assert "first batch checked: padded rows" in caplog.text
    processor = load_processor(ModelConfig(model_name_or_path=str(tmp_path / "out")), family.processor.tokenizer)
    assert processor.image_processor.to_dict() == family.processor.image_processor.to_dict()
    assert processor.chat_template == family.processor.chat_template
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name, value in family.model.state_dict().items() if not torch.equal(value, saved[name])}
    carried = {name for name in moved if re.search("projector|connector|merger", name)}
    assert carried and carried != moved
    assert not any("vision" in name or "visual" in name for name in moved - carried)


@pytest.fixture(scope="module")
def adapter(llava, data, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    more = {"finetuning_type": "lora", "num_train_epochs": 2, "lora_rank": 4}
    fit(resolve(keys(llava, data, pictures, folder, **more), []))
    return folder / "out"


def test_an_adapter_is_exported_with_the_processor(llava, adapter, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from luthier.export import export

    run = resolve({"model_name_or_path": str(llava.folder), "adapter_name_or_path": str(adapter),
                   "export_dir": str(tmp_path / "whole"), "finetuning_type": "lora"}, verb="export")  # fmt: skip
    export(run.model, run.adapter, run.export)
    assert AutoProcessor.from_pretrained(tmp_path / "whole").image_token == "<image>"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole").state_dict()
    moved = {name for name, value in llava.model.state_dict().items() if not torch.equal(value, merged[name])}
    assert moved and all(name.startswith("model.language_model.layers.") for name in moved)


def test_infer_answers_as_transformers_generates(llava, pictures, tmp_path):
    from PIL import Image

    from luthier.infer import main

    asked = [{"prompt": "<image>What?", "images": ["red.png"]}, {"prompt": "Hi"},
             {"prompt": "<image>And <image>?", "images": ["blue.png", "red.png"]}]  # fmt: skip
    source = write(tmp_path, asked, "in.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model_name_or_path": str(llava.folder), "media_dir": str(pictures), "use_cpu": True,
                                  "do_sample": False, "max_new_tokens": 6, "image_min_pixels": 1}))  # fmt: skip
    assert main([str(config), "--input", str(source), "--output", str(tmp_path / "out.jsonl")]) == 0
    said = [json.loads(line)["predict"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    processor = llava.processor
    for each, answer in zip(asked, said, strict=True):
        text = f"<|im_start|>user\n{each['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        images = [Image.open(pictures / name).convert("RGB") for name in each.get("images", [])]
        made = processor(text=[text], images=[images] if images else None, return_tensors="pt")
        new = llava.model.eval().generate(**made, max_new_tokens=6, do_sample=False)[0, made["input_ids"].shape[1] :]
        stop = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        kept = new.tolist()[: new.tolist().index(stop)] if stop in new.tolist() else new.tolist()
        assert answer == processor.tokenizer.decode(kept, skip_special_tokens=True)


def test_infer_says_which_image_is_missing(llava, tmp_path):
    from luthier.infer import main

    source = write(tmp_path, [{"prompt": "<image>", "images": ["gone.png"]}], "in.jsonl")
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model_name_or_path": str(llava.folder), "use_cpu": True}))
    with pytest.raises(DataError, match="row 1: an image that is not there: gone.png"):
        main([str(config), "--input", str(source), "--output", str(tmp_path / "out.jsonl")])


def test_preview_shows_an_image_as_one_thing(llava, data, pictures, tmp_path, capsys):
    from luthier.preview import show, write_json

    run = resolve(keys(llava, data, pictures, tmp_path), [], verb="preview")
    show(run, rows=1, count=2, plot=False, full=False)
    assert "[image: 4 tokens]" in capsys.readouterr().out
    write_json(run, 1)
    (branch,) = json.loads(capsys.readouterr().out)["branches"]
    assert branch["input_ids"].count(llava.processor.image_token_id) == 4
    assert llava.processor.image_token_id not in branch["labels"]


def test_check_counts_image_tokens(idefics3, data, pictures, tmp_path):
    from luthier.check import check

    lines = " ".join(check(resolve(keys(idefics3, data, pictures, tmp_path), [])))
    assert "GiB" in lines and "padded" in lines


def test_bad_rows_are_counted_by_reason(llava, data, pictures, tmp_path):
    with pytest.raises(DataError) as caught:
        fit(resolve(keys(llava, data, pictures, tmp_path, dataset=str(data / "bad.jsonl")), []))
    for reason in (
        "1 rows: an image that is not there",
        "1 rows: as many <image> markers",
        "bad.jsonl:3",
        "bad.jsonl:4",
    ):
        assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("family", "more"), [("qwen3_vl", {"packing": True, "cutoff_len": 80}), ("llava", {"layout": "shared"})]
)
def test_rows_of_several_examples_train_the_same(family, data, pictures, tmp_path, more, request, caplog):
    """In one step of all examples it does not matter how they are laid out."""
    from safetensors.torch import load_file

    family, found = request.getfixturevalue(family), []
    common = {"per_device_train_batch_size": 9, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    for keys_of in ({}, more):
        caplog.clear()
        with caplog.at_level(logging.INFO, "luthier"):
            fit(resolve(keys(family, data, pictures, tmp_path, **common, **keys_of), []))
        found.append(load_file(tmp_path / "out" / "model.safetensors"))
    layout = more.get("layout", "packed")
    assert f"layout: {layout}" in caplog.text and f"first batch checked: {layout} rows agree" in caplog.text
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-6, msg=name)


def test_a_model_of_text_refuses_images(llava, model_folder, data, pictures, tmp_path):
    with pytest.raises(DataError, match="brings images, and this run cannot show them to the model"):
        fit(resolve(keys(llava, data, pictures, tmp_path, model_name_or_path=str(model_folder)), []))


def test_a_run_with_a_named_template(llava, data, pictures, tmp_path):
    fit(resolve(keys(llava, data, pictures, tmp_path, template="chatml", max_steps=2), []))
    assert len(losses(tmp_path / "out")) == 2


def test_a_reward_model_trains_its_head_beside_what_sees(llava, pictures, tmp_path):
    """No image reaches the head through the model's own logits, and it is trained all the same."""
    from safetensors.torch import load_file

    pairs = [
        {"instruction": "<image>What?", "output": [colour, "no"], "score": [1, 0], "images": [f"{colour}.png"]}
        for colour in ("red", "blue")
    ]
    write(tmp_path, pairs)
    more = {"stage": "rm", "finetuning_type": "lora", "freeze_vision_tower": False, "num_train_epochs": 1}
    heads = []
    for steps in (1, 2):
        fit(resolve(keys(llava, tmp_path, pictures, tmp_path, max_steps=steps, learning_rate=0.1, **more), []))
        heads.append(load_file(tmp_path / "out" / "value_head.safetensors"))
    assert any(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
