"""Ids, labels and tensors of rows with images, against what the model's own processor and forward call make of them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn.functional import cross_entropy

from luthier.core.errors import ConfigError, DataError, TemplateError
from luthier.core.types import Answer, Example, Message
from luthier.data.layout import LAYOUTS
from luthier.data.media import MediaConfig
from luthier.data.media_batch import MediaCollate
from luthier.data.processor import Vision
from luthier.data.processor_template import ProcessorRenderer
from luthier.data.slot_media import SlotMediaRenderer
from luthier.data.source import BadRow
from luthier.data.template import TemplateConfig, find_template
from luthier.model.policy import PolicySetup
from luthier.model.sight import looks_ahead
from luthier.model.verify import verify
from luthier.objectives.sft import Sft, SftConfig

FAMILIES = ["llava", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
SMALL = MediaConfig(image_min_pixels=1)


@pytest.fixture
def family(request):
    return request.getfixturevalue(request.param)


def vision_of(family, pictures, config=SMALL):
    return Vision(family.processor, config, pictures)


def example(*turns, answer="It is red."):
    messages = tuple(Message(role, text, media=tuple(images)) for role, text, *images in turns)
    return Example(messages, (Answer((Message("assistant", answer),)),))


def encode(vision, each, cutoff_len=2048, renderer=None, **keys):
    renderer = renderer or ProcessorRenderer(TemplateConfig(), vision)
    found = Sft(SftConfig(**keys)).encode(each, renderer, cutoff_len=cutoff_len)
    return renderer.settle(each, found, cutoff_len=cutoff_len)


def theirs(family, pictures, each):
    """What transformers makes of the whole conversation, in one call."""
    from PIL import Image

    talk = []
    for message in (*each.prompt, *each.answers[0].messages):
        texts = message.content.split("<image>") if message.media else [message.content]
        parts = [part for text in texts for part in ({"type": "image"}, {"type": "text", "text": text})][1:]
        talk.append({"role": message.role, "content": parts})
    images = [Image.open(pictures / name).convert("RGB") for message in each.prompt for name in message.media]
    text = family.processor.apply_chat_template(talk)
    return text, family.processor(
        text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=False
    )


def layouts_of(family):
    """Rows of several examples take a mask of ours, in which image tokens do not see later ones."""
    return ("padded",) if "Gemma3" in type(family.model).__name__ else LAYOUTS


TWO = example(
    ("user", "<image>What is this?", "red.png"),
    ("assistant", "A disc."),
    ("user", "And <image> or <image>?", "blue.png", "red.png"),
)


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_ids_are_the_processors_own_and_answers_alone_are_trained(family, pictures):
    (encoded,) = encode(vision_of(family, pictures), TWO)
    (path,) = encoded.paths
    text, made = theirs(family, pictures, TWO)
    assert path.ids == made["input_ids"][0].tolist()
    assert text.count(family.processor.image_token) == 3
    trained = [token for token, weight in zip(path.ids, path.weights) if weight]
    # The line break after a turn belongs to the template, which writes it before the next one.
    said = family.processor.tokenizer.decode(trained)
    assert said == "A disc.<|im_end|>\nIt is red.<|im_end|>\n"
    assert set(path.weights) == {0.0, 1.0}


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_image_tokens_are_never_trained(family, pictures):
    (encoded,) = encode(vision_of(family, pictures), TWO, train_on_prompt=True)
    (path,) = encoded.paths
    image = family.processor.image_token_id
    assert {weight for token, weight in zip(path.ids, path.weights) if token == image} == {0.0}
    assert {weight for token, weight in zip(path.ids, path.weights) if token != image} == {1.0}


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_the_prompt_of_inference_is_that_of_training(family, pictures):
    renderer = ProcessorRenderer(TemplateConfig(), vision_of(family, pictures))
    (encoded,) = encode(vision_of(family, pictures), TWO)
    prompt = renderer.prompt(TWO.prompt)
    assert prompt == encoded.paths[0].ids[: len(prompt)]
    assert family.processor.tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"], indirect=True)
def test_loss_and_gradients_are_those_of_transformers(family, pictures):
    """Rows of different lengths in one batch, one without images, two answers to one conversation of three images; each
    alone through the model's own forward with labels."""
    vision = vision_of(family, pictures)
    one = example(("user", "Hello <image>", "blue.png"), answer="Blue, I say, and long.")
    rows = [TWO, replace(TWO, answers=example(answer="It is blue.").answers), one, example(("user", "Hi"))]
    encoded = [encode(vision, each)[0] for each in rows]
    pair = replace(encoded[0], paths=(*encoded[0].paths, *encoded[1].paths))
    items = [(each, str(nth)) for nth, each in enumerate([pair, *encoded[2:]])]
    model = copy.deepcopy(family.model).double().train()
    total = sum(sum(weight > 0 for weight in path.weights) for each, _ in items for path in each.paths)
    wanted, told = torch.zeros((), dtype=torch.float64), 0.0
    for each, ours in zip(rows, encoded):
        _, made = theirs(family, pictures, each)
        labels = torch.tensor([[t if w else -100 for t, w in zip(ours.paths[0].ids, ours.paths[0].weights)]])
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in made.items()}
        out = model(**inputs, labels=labels, num_items_in_batch=total)
        told += float(out.loss.detach())  # in float32, whatever the model is in
        wanted = wanted + cross_entropy(out.logits[0, :-1], labels[0, 1:], reduction="sum") / total
    model.zero_grad()
    wanted.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("vision" in name or "visual" in name for name in gradients)

    setup, computed = PolicySetup(model), {}
    lay = MediaCollate(pickle.loads(pickle.dumps(vision)))
    try:
        padded = lay(items, layout="padded", pad_id=3)
        for layout in layouts_of(family):
            batch = lay(items, layout=layout, pad_id=3)
            computed[layout] = int(torch.isin(batch.ids, torch.tensor(vision.token_ids)).sum())
            assert verify(setup, batch, padded).difference < 1e-10
            model.zero_grad()
            loss, _ = Sft(SftConfig()).loss(setup.bind(), batch)
            loss.backward()
            assert abs(loss.item() - wanted.item()) < 1e-10 and abs(loss.item() - told) < 1e-5
            for name, parameter in model.named_parameters():
                if name in gradients:
                    # Norms are computed in float32, and so are the gradients that pass them.
                    torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=5e-8)
    finally:
        setup.close()
    # Of seven images four are left where the two answers share theirs.
    assert len(computed) == 1 or computed["padded"] == computed["packed"] > computed["shared"]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"], indirect=True)
def test_a_blank_image_changes_no_number(family, pictures):
    """Rows of text alone: loss and gradients are what they are without it, and those of what sees are zero."""
    vision = vision_of(family, pictures)
    rows = [example(("user", "Hi")), example(("user", "Hello hello hello, violin"))]
    items = [(encode(vision, each)[0], str(nth)) for nth, each in enumerate(rows)]
    setup = PolicySetup(copy.deepcopy(family.model).double())
    found = {}
    try:
        for blank, layout in product((False, True), layouts_of(family)):
            batch = MediaCollate(vision, blank=blank)(items, layout=layout, pad_id=3)
            assert ("pixel_values" in batch.media) == blank
            padded = batch if layout == "padded" else MediaCollate(vision)(items, layout="padded", pad_id=3)
            assert verify(setup, batch, padded).difference < 1e-10
            setup.model.zero_grad()
            loss, _ = Sft(SftConfig()).loss(setup.bind(), batch)
            loss.backward()
            found[blank, layout] = loss.item(), {name: p.grad for name, p in setup.model.named_parameters()}
            with torch.no_grad():
                empty = MediaCollate(vision, blank=blank)([], layout="padded", pad_id=3)
                assert len(setup.bind().logps(empty)) == 0
        shown = MediaCollate(vision, blank=True)([(encode(vision, TWO)[0], "")], layout="padded", pad_id=3)
        assert len(shown.ids) == 1, "what shows images needs no other"
    finally:
        setup.close()
    for layout in layouts_of(family):
        (loss, plain), (same, gradients) = found[False, layout], found[True, layout]
        assert loss == pytest.approx(same, abs=1e-12)
        new = {name for name, gradient in gradients.items() if gradient is not None and plain[name] is None}
        assert not any(gradients[name].any() for name in new)
        assert sum("vision" in name or "visual" in name for name in new) > 5
        for name in gradients.keys() - new:
            torch.testing.assert_close(gradients[name], plain[name], rtol=1e-6, atol=5e-8)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"], indirect=True)
def test_whether_image_tokens_see_later_ones_is_found_out(family, pictures):
    shown = MediaCollate(vision_of(family, pictures), blank=True)([], layout="padded", pad_id=3)
    assert looks_ahead(family.model.train(), shown) == (layouts_of(family) != LAYOUTS)


def test_an_image_that_would_be_cut_is_refused_with_a_count(llava, pictures):
    """The response is kept and the prompt cut from the right, so that it ends with its last image token, or before."""
    each = example(("user", "one <image><image> two three four five", "red.png", "blue.png"))
    path = encode(vision_of(llava, pictures), each)[0].paths[0]
    last = max(at for at, token in enumerate(path.ids) if token == llava.processor.image_token_id)
    answer = sum(map(bool, path.weights))
    (encoded,) = encode(vision_of(llava, pictures), each, cutoff_len=last + 1 + answer)
    assert encoded.paths[0].ids[last] == llava.processor.image_token_id and encoded.truncated > 0
    with pytest.raises(BadRow, match=f"images do not fit into cutoff_len={last + answer}") as caught:
        encode(vision_of(llava, pictures), each, cutoff_len=last + answer)
    assert "2 images of 8 tokens" in caught.value.detail


def test_a_long_answer_may_be_cut(llava, pictures):
    each = example(("user", "<image>What?", "red.png"), answer="one two three " * 20)
    whole = encode(vision_of(llava, pictures), each)[0].paths[0].ids
    (encoded,) = encode(vision_of(llava, pictures), each, cutoff_len=len(whole) - 3)
    assert encoded.truncated == 3 and encoded.paths[0].ids == whole[:-3]


def test_turns_with_images_that_fall_out_of_history_are_a_refusal(llava, pictures):
    whole = encode(vision_of(llava, pictures), TWO)[0].paths[0].ids
    start = llava.processor.tokenizer.convert_tokens_to_ids("<|im_start|>")
    second = [at for at, token in enumerate(whole) if token == start][2]
    with pytest.raises(BadRow, match="images do not fit"):
        encode(vision_of(llava, pictures), TWO, cutoff_len=len(whole) - second, mask_history=True)


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("none.png", "an image that is not there", "none.png"),
        ("broken.png", "an image that cannot be read", "broken.png"),
        ("base64:!!", "an image that cannot be read", "in the row itself"),
    ],
)
def test_images_that_are_missing_or_broken(llava, pictures, name, reason, detail):
    with pytest.raises(BadRow, match=reason) as caught:
        encode(vision_of(llava, pictures), example(("user", "<image>", name)))
    assert detail in caught.value.detail


def test_a_word_that_means_an_image_is_no_text(llava, pictures):
    with pytest.raises(TemplateError, match="'<image>', which stands for an image"):
        encode(vision_of(llava, pictures), example(("user", "write <image> here")))


def test_a_template_that_drops_images_is_refused(llava, pictures, monkeypatch):
    monkeypatch.setattr(llava.processor, "chat_template", llava.processor.chat_template.replace("<image>", ""))
    monkeypatch.setattr(llava.processor.tokenizer, "chat_template", None)
    with pytest.raises(TemplateError, match="writes 0 images of a conversation that shows 1"):
        encode(vision_of(llava, pictures), example(("user", "<image>?", "red.png")))


def test_an_image_that_changed_since_encoding_is_named(qwen2_vl, pictures, tmp_path):
    from PIL import Image

    (tmp_path / "red.png").write_bytes((pictures / "red.png").read_bytes())
    (encoded,) = encode(vision_of(qwen2_vl, tmp_path), example(("user", "<image>", "red.png")))
    Image.new("RGB", (100, 100)).save(tmp_path / "red.png")
    collate = MediaCollate(vision_of(qwen2_vl, tmp_path))
    with pytest.raises(DataError, match="row 7: its images become .* overwrite_cache"):
        collate([(encoded, "row 7")], layout="padded", pad_id=3)
    (tmp_path / "red.png").unlink()
    with pytest.raises(DataError, match="row 7: an image that is not there"):
        collate([(encoded, "row 7")], layout="padded", pad_id=3)


def test_pixel_limits_are_llamafactorys(pictures):
    """One factor for both sides, each side rounded down (`_preprocess_image` of its mm_plugin)."""
    from luthier.data.media import Pictures

    sizes = [Pictures(pictures, MediaConfig(image_max_pixels=500, image_min_pixels=100))(name).size
             for name in ("red.png", "blue.png", "dot.png")]  # fmt: skip
    # sqrt(500 / 1800) = 0.527; sqrt(100 / 64) = 1.25
    assert sizes == [(31, 15), (15, 31), (10, 10)]


def test_pixel_limits_decide_how_many_tokens(qwen2_vl, pictures):
    counts = [vision_of(qwen2_vl, pictures, MediaConfig(image_max_pixels=most, image_min_pixels=1)).expanded("red.png")
              for most in (60 * 30, 28 * 28)]  # fmt: skip
    # 60 x 30 becomes 56 x 28, two merged patches of 28 x 28; 39 x 19 becomes 28 x 28, one.
    assert [count for _, count in counts] == [2, 1]


@pytest.mark.parametrize("key", ["image_do_pan_and_scan", "crop_to_patches"])
def test_a_wish_that_the_processor_does_not_know_is_refused(llava, pictures, key):
    with pytest.raises(ConfigError, match=f"{key}: true"):
        vision_of(llava, pictures, MediaConfig(**{key: True}))


@pytest.mark.parametrize(
    ("family", "image"),
    [("llava", "<image>" * 4), ("qwen2_vl", "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>")],
    indirect=["family"],
)
def test_a_named_template_writes_images_as_llamafactory_does(family, image, pictures):
    """Its plugins put the expanded image, with Qwen's markers around it, where `<image>` stands in the text."""
    config = TemplateConfig(template="chatml")
    vision = vision_of(family, pictures)
    kept = family.processor.tokenizer.chat_template
    renderer = SlotMediaRenderer(config, find_template("chatml"), vision)
    each = example(("user", "See <image> and <image>!", "red.png", "red.png"))
    (encoded,) = encode(vision, each, renderer=renderer)
    decode = family.processor.tokenizer.decode
    asked = f"<|im_start|>user\nSee {image} and {image}!<|im_end|>\n<|im_start|>assistant\n"
    assert decode(encoded.paths[0].ids) == f"{asked}It is red.<|im_end|>\n"
    assert decode(renderer.prompt(each.prompt)) == asked
    assert encoded.extra["media"]["images"] == ["red.png", "red.png"]
    with pytest.raises(TemplateError, match="stands for an image"):
        encode(vision, example(("user", f"write {family.processor.image_token}")), renderer=renderer)
    family.processor.tokenizer.chat_template = kept


def test_an_image_token_in_a_system_prompt_is_no_image(llava, pictures):
    vision = vision_of(llava, pictures)
    renderer = SlotMediaRenderer(TemplateConfig(template="chatml"), find_template("chatml"), vision)
    each = Example((Message("user", "hi"),), (Answer((Message("assistant", "x"),)),), system="mind <image>")
    with pytest.raises(BadRow, match="a text that stands for an image"):
        encode(vision, each, renderer=renderer)
