"""What the embeddings of added tokens start from."""

from __future__ import annotations

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.model.load import load_model
from luthier.model.source import ModelConfig
from luthier.model.tokenizer import load_tokenizer
from tests.conftest import build_model, build_tokenizer


@pytest.fixture
def described(tmp_path):
    """A YAML file that describes two tokens, of which the model knows neither."""
    path = tmp_path / "tokens.yaml"
    path.write_text('"<|call|>": violin maker\n"<|done|>": the quick brown fox\n')
    return path


def loaded(folder, **keys):
    config = ModelConfig(model_name_or_path=str(folder), resize_vocab=True, **keys)
    tokenizer = load_tokenizer(config)
    return load_model(config, tokenizer=tokenizer, dtype=torch.float32), tokenizer


def mean_of(model_folder, text) -> torch.Tensor:
    weight = load_model(
        ModelConfig(model_name_or_path=str(model_folder)), dtype=torch.float32
    ).model.embed_tokens.weight
    return weight[build_tokenizer()(text).input_ids].mean(0)


@pytest.mark.parametrize("kind", ["desc_init", "desc_init_w_noise"])
def test_described_tokens_start_from_their_words(model_folder, described, kind):
    model, tokenizer = loaded(model_folder, new_special_tokens_config=str(described), init_special_tokens=kind)
    for token, text in (("<|call|>", "violin maker"), ("<|done|>", "the quick brown fox")):
        index = tokenizer.convert_tokens_to_ids(token)
        assert index >= 400 and tokenizer.decode([index], skip_special_tokens=True) == ""
        apart = model.get_input_embeddings().weight[index] - mean_of(model_folder, text)
        if kind == "desc_init":
            assert apart.abs().max() < 1e-6
        else:  # deviation 1 / sqrt(32)
            assert 0.1 < apart.std() < 0.3
    head = model.lm_head.weight
    plain = load_model(ModelConfig(model_name_or_path=str(model_folder)), dtype=torch.float32).lm_head.weight
    if kind == "desc_init":
        wanted = plain[build_tokenizer()("violin maker").input_ids].mean(0)
        torch.testing.assert_close(head[tokenizer.convert_tokens_to_ids("<|call|>")], wanted)


def test_by_default_they_start_from_the_mean_of_all_with_noise(model_folder, described):
    model, tokenizer = loaded(model_folder, new_special_tokens_config=str(described), add_special_tokens="<|more|>")
    assert len(tokenizer) == 403
    weight = model.get_input_embeddings().weight
    apart = weight[400:403] - weight[:400].mean(0)
    assert 0.1 < apart.std() < 0.3


def test_tokens_without_words_beside_described_ones(model_folder, described):
    model, tokenizer = loaded(
        model_folder,
        new_special_tokens_config=str(described),
        init_special_tokens="desc_init",
        add_special_tokens="<|more|>",
    )
    weight = model.get_input_embeddings().weight
    apart = weight[tokenizer.convert_tokens_to_ids("<|more|>")] - weight[:400].mean(0)
    assert apart.std() > 0.1


def test_spare_rows_of_the_model_are_filled_too(described, tmp_path):
    """Models often have more rows than tokens: nothing grows, and the described rows start from their words."""
    build_model("llama", vocab_size=448).save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    model, tokenizer = loaded(
        tmp_path / "wide", new_special_tokens_config=str(described), init_special_tokens="desc_init"
    )
    assert model.config.vocab_size == 448
    wanted = build_model("llama", vocab_size=448).model.embed_tokens.weight[build_tokenizer()("violin maker").input_ids]
    torch.testing.assert_close(model.model.embed_tokens.weight[400], wanted.mean(0))


def test_tokens_that_the_model_knows_keep_what_they_learnt(model_folder, described, tmp_path):
    keys = {"new_special_tokens_config": str(described), "init_special_tokens": "desc_init"}
    model, tokenizer = loaded(model_folder, **keys)
    with torch.no_grad():
        model.get_input_embeddings().weight[400:402] = 7.0
    model.save_pretrained(tmp_path / "trained")
    tokenizer.save_pretrained(tmp_path / "trained")
    again, _ = loaded(tmp_path / "trained", **keys)
    assert (again.get_input_embeddings().weight[400:402] == 7.0).all()


@pytest.mark.parametrize("text", ["- a\n", '"<x>": 3\n', '"<x>": ""\n', "", '"<x>": [\n'])
def test_files_that_describe_nothing(model_folder, tmp_path, text):
    path = tmp_path / "tokens.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="new_special_tokens_config: .*tokens.yaml"):
        loaded(model_folder, new_special_tokens_config=str(path))


def test_keys_that_need_one_another():
    with pytest.raises(ConfigError, match="init_special_tokens: desc_init needs new_special_tokens_config"):
        ModelConfig(model_name_or_path="x", init_special_tokens="desc_init")
