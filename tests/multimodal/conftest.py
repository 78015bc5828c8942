"""Tiny models of six families that read images, with their processors, and pictures drawn here."""

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
    """A model with its processor, and the folder that holds both."""

    model: Any
    processor: Any
    folder: Path


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


def build_gemma3(folder: Path) -> Family:
    """Tokens of an image see one another in both directions; the layers of the language model alternate."""
    import torch
    import transformers
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    build_tokenizer(extra_specials=tuple(names.values())).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "extra_special_tokens": names}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    image, start, end = (tokenizer.convert_tokens_to_ids(name) for name in names.values())
    pixels = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    written = TEMPLATE.replace("IMAGE", "<start_of_image>")
    processor = transformers.Gemma3Processor(pixels, tokenizer, image_seq_length=4, chat_template=written)
    sight = transformers.SiglipVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, image_size=28,
                                            num_attention_heads=2, patch_size=7)  # fmt: skip
    text = transformers.Gemma3TextConfig(vocab_size=len(tokenizer), head_dim=8, sliding_window=16, **TEXT)
    config = transformers.Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4,
                                       image_token_index=image, boi_token_index=start, eoi_token_index=end)  # fmt: skip
    torch.manual_seed(5)
    return _saved(transformers.AutoModelForImageTextToText.from_config(config), processor, folder)


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def build_qwen(kind: str, folder: Path, seed: int, patch: int, sight: dict[str, Any], mrope: dict[str, Any]) -> Family:
    """Positions in three dimensions (M-RoPE), images of any size. The files of the processor are as the hub has them,
    so that transformers wants torchvision for videos."""
    import torch
    import transformers

    from luthier.model.processor import load_processor
    from luthier.model.source import ModelConfig

    tokenizer = build_tokenizer(extra_specials=MARKS)
    image, video, start, end = (tokenizer.convert_tokens_to_ids(mark) for mark in MARKS)
    config = getattr(transformers, f"{kind}Config")(
        text_config={"vocab_size": len(tokenizer), "rope_parameters": mrope, "head_dim": 8, **TEXT},
        vision_config=sight,
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    (folder / "chat_template.jinja").write_text(written)
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{kind}Processor",
        "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    videos = {**settings, "video_processor_type": f"{'Qwen3' if kind == 'Qwen3VL' else 'Qwen2'}VLVideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(videos))
    return Family(model, load_processor(ModelConfig(model_name_or_path=str(folder)), tokenizer), folder)


def build_qwen2_vl(folder: Path) -> Family:
    """Absolute pixels through one projection; the merger stands inside what sees."""
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return build_qwen("Qwen2VL", folder, 2, 14, sight, MROPE)


def build_qwen2_5_vl(folder: Path) -> Family:
    """Attention within windows in all layers of what sees but the last."""
    sight = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
             "fullatt_block_indexes": [1], "window_size": 56}  # fmt: skip
    return build_qwen("Qwen2_5_VL", folder, 3, 14, sight, MROPE)


def build_qwen3_vl(folder: Path) -> Family:
    """What sees adds to several layers of the language model (DeepStack); dimensions of positions interleaved."""
    sight = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
             "deepstack_visual_indexes": [0], "num_position_embeddings": 16}  # fmt: skip
    return build_qwen("Qwen3VL", folder, 4, 16, sight, {**MROPE, "mrope_interleaved": True})


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Family:
    return build_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def idefics3(tmp_path_factory) -> Family:
    return build_idefics3(tmp_path_factory.mktemp("idefics3"))


@pytest.fixture(scope="session")
def qwen2_vl(tmp_path_factory) -> Family:
    return build_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.fixture(scope="session")
def qwen2_5_vl(tmp_path_factory) -> Family:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))


@pytest.fixture(scope="session")
def qwen3_vl(tmp_path_factory) -> Family:
    return build_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory) -> Family:
    return build_gemma3(tmp_path_factory.mktemp("gemma3"))


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
