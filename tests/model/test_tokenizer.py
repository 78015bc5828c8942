"""The tokenizer a run uses: its pad, its added tokens, its errors."""

from __future__ import annotations

import pytest

from luthier.core.errors import ModelError
from luthier.model.source import ModelConfig
from luthier.model.tokenizer import load_tokenizer
from tests.conftest import build_tokenizer


def saved(folder, tokenizer, **keys):
    tokenizer.save_pretrained(folder)
    return load_tokenizer(ModelConfig(model_name_or_path=str(folder), **keys))


def test_it_encodes_as_the_one_that_was_saved(model_folder, tokenizer):
    loaded = load_tokenizer(ModelConfig(model_name_or_path=str(model_folder)))
    text = "A violin maker <|im_end|> zz\n"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.padding_side == "right"
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.pad_token == "<pad>"


def test_a_pad_that_is_eos_is_replaced_by_one_that_is_free(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert saved(tmp_path, tokenizer).pad_token == "<pad>"


def test_the_end_of_text_token_pads_where_turns_end_otherwise(tmp_path):
    from transformers import PreTrainedTokenizerFast

    core = build_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", bos_token="<pad>")
    assert saved(tmp_path, tokenizer).pad_token == "<|endoftext|>"


def test_eos_pads_where_nothing_else_is_free(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer = saved(tmp_path, PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>"))
    assert tokenizer.pad_token_id == 1


def test_nothing_to_pad_with_is_an_error(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match="no pad, eos or unk"):
        saved(tmp_path, PreTrainedTokenizerFast(tokenizer_object=core))


@pytest.mark.parametrize("names", ["zork, blub", ["zork", "blub"]])
def test_added_tokens_become_one_id_each(tmp_path, names):
    tokenizer = saved(tmp_path, build_tokenizer(), add_tokens=names)
    assert len(tokenizer) == 402
    assert tokenizer("zorkblub").input_ids == [400, 401]
    assert tokenizer.decode([400, 401], skip_special_tokens=True).replace(" ", "") == "zorkblub"


def test_special_tokens_are_left_out_of_decoded_text(tmp_path):
    tokenizer = saved(tmp_path, build_tokenizer(), add_special_tokens="<|call|>")
    assert tokenizer("<|call|>").input_ids == [400]
    assert tokenizer.decode([400], skip_special_tokens=True) == ""


def test_special_tokens_in_texts_can_be_split(tmp_path):
    whole = saved(tmp_path, build_tokenizer())
    split = saved(tmp_path, build_tokenizer(), split_special_tokens=True)
    assert whole("<|im_end|>").input_ids == [5]
    assert len(split("<|im_end|>").input_ids) > 1


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_a_broken_tokenizer_file(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


def test_a_name_the_hub_cannot_give():
    with pytest.raises(ModelError, match="nobody/nothing is not a local folder"):
        load_tokenizer(ModelConfig(model_name_or_path="nobody/nothing"))


def test_a_folder_that_is_no_model_is_called_so(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelError, match="is no model folder: it has neither config.json nor a tokenizer"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))
