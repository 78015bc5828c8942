"""Tiny models of three families that read images, with their processors, and pictures drawn here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import build_tokenizer

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 3, "eos_token_id": 5,
        "bos_token_id": 1}  # fmt: skip

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model with its processor; `folder` holds both where the processor can be loaded without torchvision."""

    model: Any
    processor: Any
    folder: Path | None = None


def _saved(model, processor, folder: Path) -> Family:
    import transformers

    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Family(model, transformers.AutoProcessor.from_pretrained(folder), folder)


def build_llava(folder: Path) -> Family:
    """CLIP, a projector, Llama: four tokens an image."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_tokenizer(extra_specials=("<image>",))
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    sight = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, image_size=28,
                                          num_attention_heads=2, patch_size=14, projection_dim=16)  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT)
    config = transformers.LlavaConfig(vision_config=sight, text_config=text, image_token_index=processor.image_token_id)
    torch.manual_seed(0)
    return _saved(transformers.AutoModelForImageTextToText.from_config(config), processor, folder)


def build_idefics3(folder: Path) -> Family:
    """Images in tiles, with row and column tokens between; pixels nested by row, and padded."""
    import torch
    import transformers
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tiles = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
    marks = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokenizer = build_tokenizer(extra_specials=(*marks, *tiles))
    pixels = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(
        pixels, tokenizer, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    sight = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 28, "patch_size": 7}  # fmt: skip
    text = transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT)
    config = transformers.Idefics3Config(
        vision_config=sight, text_config=text, scale_factor=2, image_token_id=processor.image_token_id, pad_token_id=3
    )
    torch.manual_seed(1)
    return _saved(transformers.AutoModelForImageTextToText.from_config(config), processor, folder)


def build_qwen2_vl() -> Family:
    """Positions in three dimensions (M-RoPE), images of any size."""
    import torch
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from tests.multimodal.images_only import ImagesOnly

    marks = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = build_tokenizer(extra_specials=marks)
    pixels = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=112 * 112)
    written = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = ImagesOnly(pixels, tokenizer, chat_template=written)
    image, video, start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": rope, **TEXT},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    torch.manual_seed(2)
    return Family(transformers.AutoModelForImageTextToText.from_config(config), processor)


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Family:
    return build_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def idefics3(tmp_path_factory) -> Family:
    return build_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="session")
def qwen2_vl() -> Family:
    return build_qwen2_vl()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of small pictures: red.png (60 x 30), blue.png (30 x 60), dot.png (8 x 8), broken.png."""
    from PIL import Image, ImageDraw

    folder = tmp_path_factory.mktemp("pictures")
    for colour, size in (("red", (60, 30)), ("blue", (30, 60)), ("dot", (8, 8))):
        image = Image.new("RGB", size, "white")
        fill = "black" if colour == "dot" else colour
        ImageDraw.Draw(image).ellipse((1, 1, size[0] - 2, size[1] - 2), fill=fill)
        image.save(folder / f"{colour}.png")
    (folder / "broken.png").write_bytes((folder / "red.png").read_bytes()[:60])
    return folder


def row(question: str, answer: str, *images: str, **more: Any) -> dict[str, Any]:
    """A row as OpenAI's format has it."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": list(images), **more}


def write(folder: Path, rows: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return file
