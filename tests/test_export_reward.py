"""Export of reward models: what is saved scores as the adapter and its head do, read by transformers too.

The oracle is transformers and PEFT alone: the last hidden state of one unpadded sequence times the head's weights.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file

from luthier import export as plain_export
from luthier import export_reward as module
from luthier.cli import main
from luthier.core.errors import ConfigError, ModelError
from tests.conftest import build_model, build_tokenizer
from tests.test_score import make_adapter, save_head

ANSWERS = ["Paris.", "one two three four five six", "A luthier carves the scroll by hand.", "hello"]


def make(folder, *, kind="value", model="llama", bias=0.0, tokenizer=None, dtype=None, **changes):
    """A base model, an adapter with a head; returns the head's tensors."""
    torch.manual_seed(4)
    built = build_model(model, **changes)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    built.to(dtype or torch.float32).save_pretrained(folder / "base")
    (tokenizer or build_tokenizer()).save_pretrained(folder / "base")
    make_adapter(folder / "base", folder / "rm")
    tensors = save_head(folder / "rm", kind)
    tensors["summary.bias"] = torch.tensor([bias])
    save_file({f"v_head.{name}": value for name, value in tensors.items()}, folder / "rm" / f"{kind}_head.safetensors")
    return tensors


def export(folder, **keys):
    config = {"model_name_or_path": str(folder / "base"), "adapter_name_or_path": str(folder / "rm")}
    path = folder / "export.yaml"
    path.write_text(yaml.safe_dump(config | {"export_dir": str(folder / "out" / "merged")} | keys))
    return main(["export", str(path)])


def chat(answer, end="<|im_end|>"):
    return f"<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n{answer}{end}"


def alone(folder, tensors, sequences, part="summary"):
    """Scores, one unpadded sequence at a time, with the adapter attached and not merged."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder / "rm").get_base_model().eval()
    with torch.no_grad():
        hidden = torch.stack([model.base_model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in sequences])
    return hidden @ tensors[f"{part}.weight"][0] + tensors[f"{part}.bias"]


def by_transformers(folder, texts, side="right"):
    """Scores of the exported classifier, in one batch that its own tokenizer padded; and the batch's ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return model(**batch).logits.float()[:, 0], batch["input_ids"]


def ids_of(tokenizer, texts):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("kind", ["value", "normal"])
@pytest.mark.parametrize("model", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_classifier_scores_as_the_head_does(tmp_path, kind, model):
    tensors = make(tmp_path, kind=kind, model=model)
    assert export(tmp_path, export_reward_as="sequence_classification") == 0
    texts = [chat(answer) for answer in ANSWERS]
    wanted = alone(tmp_path, tensors, ids_of(build_tokenizer(), texts))
    assert wanted.std() > 0.1
    found, _ = by_transformers(tmp_path / "out" / "merged", texts)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and config["id2label"] == {"0": "reward"}
    assert "luthier" not in json.dumps(config)


@pytest.mark.parametrize(
    ("spare", "chosen"), [((), "<unk>"), (("<|reserved_9|>",), "<|reserved_9|>"), (("<|padding|>",), "<|padding|>")]
)
def test_a_pad_that_equals_eos_is_replaced(tmp_path, spare, chosen):
    """transformers would read the token before the answer's own eos."""
    tokenizer = build_tokenizer(extra_specials=("<|im_end|>", *spare))
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    del vocabulary["model"]["vocab"]["<pad>"], vocabulary["model"]["vocab"]["<|endoftext|>"]
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["content"] not in PADS_HERE]
    tokenizer = rebuilt(tokenizer, vocabulary)
    tensors = make(tmp_path, tokenizer=tokenizer)
    assert export(tmp_path, export_reward_as="sequence_classification") == 0
    folder = tmp_path / "out" / "merged"
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert (saved.pad_token, saved.eos_token, saved.padding_side) == (chosen, "<|im_end|>", "right")
    texts = [chat(answer) for answer in ANSWERS]
    wanted = alone(tmp_path, tensors, ids_of(tokenizer, texts))
    for side in ("right", "left"):
        found, ids = by_transformers(folder, texts, side)
        assert (ids == saved.pad_token_id).any() and (ids[:, 0 if side == "right" else -1] != saved.pad_token_id).all()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # What the test would see if the pad were eos: other scores.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = saved.eos_token_id
    with torch.no_grad():
        wrong = model(torch.tensor(ids_of(saved, texts[:1]))).logits[0, 0]
    assert abs(wrong - wanted[0]) > 0.05


PADS_HERE = ("<pad>", "<|endoftext|>")


def rebuilt(tokenizer, vocabulary, **tokens):
    from tokenizers import Tokenizer

    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"} | tokens
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)), **{k: v for k, v in names.items() if v}
    )
    made.chat_template = tokenizer.chat_template
    return made


def test_a_pad_is_added_where_the_vocabulary_has_none(tmp_path):
    tokenizer = build_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in PADS_HERE:
        del vocabulary["model"]["vocab"][name]
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["content"] not in (*PADS_HERE, "<unk>")]
    vocabulary["model"]["unk_token"] = None
    vocabulary["model"]["vocab"]["no-longer-unk"] = vocabulary["model"]["vocab"].pop("<unk>")
    words = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].__getitem__)
    numbers = vocabulary["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    vocabulary["added_tokens"] = [token | {"id": numbers[token["content"]]} for token in vocabulary["added_tokens"]]
    tokenizer = rebuilt(tokenizer, vocabulary, unk_token=None)
    # Every row of the embedding is taken: one must grow.
    tensors = make(tmp_path, tokenizer=tokenizer, vocab_size=len(tokenizer), pad_token_id=None)
    assert export(tmp_path, export_reward_as="sequence_classification") == 0
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert saved.pad_token == "<|pad|>" and saved.pad_token_id not in tokenizer.get_vocab().values()
    texts = [chat(answer) for answer in ANSWERS]
    found, ids = by_transformers(tmp_path / "out" / "merged", texts)
    assert (ids == saved.pad_token_id).any()
    torch.testing.assert_close(found, alone(tmp_path, tensors, ids_of(tokenizer, texts)), rtol=1e-4, atol=1e-4)


def test_a_pad_that_the_template_ends_with_is_replaced(tmp_path):
    """Not eos itself, but the last token of answers."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>' + '\n'", "<pad>'")
    assert "<pad>" in tokenizer.chat_template
    tensors = make(tmp_path, tokenizer=tokenizer)
    assert export(tmp_path, export_reward_as="sequence_classification") == 0
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "merged")
    assert saved.pad_token == "<|endoftext|>"
    texts = [chat(answer, "<pad>") for answer in ANSWERS]
    found, _ = by_transformers(tmp_path / "out" / "merged", texts)
    torch.testing.assert_close(found, alone(tmp_path, tensors, ids_of(tokenizer, texts)), rtol=1e-4, atol=1e-4)


def test_a_bias_is_said_because_the_classifier_has_none(tmp_path, caplog):
    tensors = make(tmp_path, bias=0.75)
    with caplog.at_level("INFO", logger="luthier"):
        assert export(tmp_path, export_reward_as="sequence_classification") == 0
    assert "the head's minus 0.75, the same for every answer" in caplog.text
    folder, texts = tmp_path / "out" / "merged", [chat(answer) for answer in ANSWERS]
    assert transformers.AutoConfig.from_pretrained(folder).reward_bias == 0.75
    found, _ = by_transformers(folder, texts)
    torch.testing.assert_close(
        found + 0.75, alone(tmp_path, tensors, ids_of(build_tokenizer(), texts)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["value", "normal"])
def test_the_head_lies_beside_the_merged_model_and_scores_the_same(tmp_path, kind):
    tensors = make(tmp_path, kind=kind, bias=0.5)
    assert export(tmp_path) == 0
    folder = tmp_path / "out" / "merged"
    assert {f.name for f in folder.glob("*_head*")} == {f"{kind}_head.safetensors"}
    stored = load_file(folder / f"{kind}_head.safetensors")
    assert all(torch.equal(stored[f"v_head.{name}"], value) for name, value in tensors.items())
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"prompt": "Hello", "responses": ANSWERS}) + "\n")
    (tmp_path / "score.yaml").write_text(f"model_name_or_path: {folder}\nstage: rm\nuse_cpu: true\n")
    output = tmp_path / "scores.jsonl"
    assert main(["score", str(tmp_path / "score.yaml"), "--input", str(rows), "--output", str(output)]) == 0
    answers = json.loads(output.read_text())["answers"]
    found = torch.tensor([answer.get("reward", answer.get("mean")) for answer in answers])
    sequences = ids_of(build_tokenizer(), [chat(answer, "<|im_end|>\n") for answer in ANSWERS])
    torch.testing.assert_close(found, alone(tmp_path, tensors, sequences), rtol=1e-4, atol=1e-4)
    if kind == "normal":
        raw = alone(tmp_path, tensors, sequences, "variance")
        wanted = torch.nn.functional.softplus(raw) + 0.01
        torch.testing.assert_close(torch.tensor([a["variance"] for a in answers]), wanted, rtol=1e-4, atol=1e-4)


def test_the_variance_lies_beside_a_classifier_of_the_mean(tmp_path):
    tensors = make(tmp_path, kind="normal")
    (tmp_path / "rm" / "normal_head.json").write_text('{"head": "normal"}')
    export(tmp_path, export_reward_as="sequence_classification")
    folder = tmp_path / "out" / "merged"
    stored = load_file(folder / "normal_head.safetensors")
    assert torch.equal(stored["v_head.variance.weight"], tensors["variance.weight"])
    assert (folder / "normal_head.json").is_file()


def test_a_16_bit_classifier_stays_one(tmp_path):
    tensors = make(tmp_path, dtype=torch.bfloat16)
    assert export(tmp_path, export_reward_as="sequence_classification") == 0
    folder, texts = tmp_path / "out" / "merged", [chat(answer) for answer in ANSWERS]
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    wanted = alone(tmp_path, tensors, ids_of(build_tokenizer(), texts))
    found, _ = by_transformers(folder, texts)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("form", ["head", "sequence_classification"])
def test_other_scores_are_refused_and_nothing_is_left(tmp_path, monkeypatch, capsys, form):
    make(tmp_path)
    real = plain_export.save_whole

    def wrong(model, tokenizer, folder, config):
        real(model, tokenizer, folder, config)
        if form == "sequence_classification":
            settings = json.loads((folder / "config.json").read_text()) | {"rope_theta": 5.0, "rms_norm_eps": 0.5}
            (folder / "config.json").write_text(json.dumps(settings))

    def other_head(self, folder):
        save_head(folder, "value", seed=77)

    monkeypatch.setattr(plain_export, "save_whole", wrong)
    monkeypatch.setattr(module.WithHead, "write", other_head)
    assert export(tmp_path, export_reward_as=form) == 2
    assert "does not score as the head does" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_no_head_no_classifier(tmp_path, capsys):
    make(tmp_path)
    (tmp_path / "rm" / "value_head.safetensors").unlink()
    assert export(tmp_path, export_reward_as="sequence_classification") == 2
    assert "needs a reward model" in capsys.readouterr().err
    assert export(tmp_path) == 0  # any other model is exported as ever


def test_a_family_without_a_classifier_is_said(monkeypatch):
    model = build_model("llama")
    model.config.model_type = "none"

    def refuse(config):
        raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_config", refuse)
    with pytest.raises(ModelError, match="no sequence classification for LlamaForCausalLM.*export_reward_as: head"):
        module._classifier(model, 3)


def test_the_key_takes_two_values():
    with pytest.raises(ConfigError, match="export_reward_as.*sequence_classification"):
        from luthier.run import resolve

        resolve({"model_name_or_path": "m", "export_reward_as": "both"}, verb="export")
