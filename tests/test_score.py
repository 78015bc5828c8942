"""`luthier score` against a plain forward pass per answer: the last hidden state times the head's weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, PeftModel, get_peft_model

from luthier import serving
from luthier.cli import main
from luthier.core.errors import ConfigError, ModelError
from luthier.engines.scoring import Judge, ScoreConfig
from luthier.model import heads
from tests.conftest import CHATML, save_lively_model

PAIRS = [
    {"instruction": "What is the capital of France?", "chosen": "Paris.", "rejected": "one two three four"},
    {"instruction": "add", "input": "one two", "chosen": "three", "rejected": "hello world goodbye"},
    {"instruction": "Who carves the scroll?", "chosen": "A luthier does.", "rejected": "The lazy dog."},
]


@pytest.fixture(scope="module")
def base(model_folder, tmp_path_factory):
    """The tiny model with weights that are far from zero."""
    return save_lively_model(model_folder, tmp_path_factory.mktemp("score-base"))


def save_head(folder, kind, *, seed=5):
    """A head of random weights in a folder, and the same tensors."""
    torch.manual_seed(seed)
    tensors = {"summary.weight": torch.randn(1, 32), "summary.bias": torch.randn(1)}
    if kind == "normal":
        tensors |= {"variance.weight": torch.randn(1, 32), "variance.bias": torch.randn(1), "floor": torch.tensor(0.01)}
    from safetensors.torch import save_file

    save_file({f"v_head.{name}": value for name, value in tensors.items()}, folder / f"{kind}_head.safetensors")
    return tensors


def make_adapter(base, folder):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["value", "normal"])
def judge(request, base, tmp_path_factory):
    """(folder of an adapter with a head, kind, the head's tensors)."""
    folder = make_adapter(base, tmp_path_factory.mktemp(f"rm-{request.param}"))
    return folder, request.param, save_head(folder, request.param)


def render(messages):
    """ChatML by hand: everything up to the answer, and the answer with its end."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return text + "<|im_start|>assistant\n"


def plain(base, adapter, tensors, prompt, answer, *, lcb_k=1.0):
    """Transformers and PEFT alone, one sequence at a time, adapter not merged."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == CHATML
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter).get_base_model() if adapter else model
    text = f"{prompt}{answer}<|im_end|>\n"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.eval().model(ids).last_hidden_state[0, -1]
    mean = float(hidden @ tensors["summary.weight"][0] + tensors["summary.bias"])
    if "floor" not in tensors:
        return {"reward": mean}
    raw = float(hidden @ tensors["variance.weight"][0] + tensors["variance.bias"])
    variance = math.log1p(math.exp(raw)) + 0.01
    return {"mean": mean, "variance": variance, "lcb": mean - lcb_k * variance**0.5}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(base, path, **keys):
    path.write_text(yaml.safe_dump({"model_name_or_path": str(base), "use_cpu": True, "stage": "rm", **keys}))
    return str(path)


def lines(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def run(base, tmp_path, rows, *overrides, output="out.jsonl", **keys):
    write(tmp_path / "in.jsonl", rows)
    name = config(base, tmp_path / "rm.yaml", **keys)
    done = main(["score", name, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / output), *overrides])
    return done, lines(tmp_path / output) if (tmp_path / output).exists() else []


def close(found, expected):
    assert [set(answer) - {"text"} for answer in found["answers"]] == [set(answer) for answer in expected]
    for answer, wanted in zip(found["answers"], expected):
        for name, value in wanted.items():
            assert answer[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("layout", ["auto", "packed", "padded"])
def test_scores_are_those_of_each_answer_alone(base, judge, tmp_path, layout):
    adapter, _, tensors = judge
    done, found = run(
        base, tmp_path, PAIRS, "score_batch_size=2", "lcb_k=0.5", adapter_name_or_path=str(adapter), layout=layout
    )
    assert done == 0 and [line["row"] for line in found] == [0, 1, 2]
    seen = set()
    for row, line in zip(PAIRS, found):
        asked = "\n".join(row[key] for key in ("instruction", "input") if key in row)
        prompt = render([("user", asked)])
        assert line["prompt"] == prompt and "truncated" not in line
        assert [answer["text"] for answer in line["answers"]] == [row["chosen"], row["rejected"]]
        expected = [plain(base, adapter, tensors, prompt, row[key], lcb_k=0.5) for key in ("chosen", "rejected")]
        close(line, expected)
        seen |= {round(next(iter(answer.values())), 3) for answer in expected}
    assert len(seen) == 6


def test_every_usual_shape_of_row_is_understood(base, judge, tmp_path):
    adapter, _, tensors = judge
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    said = [{"role": "assistant", "content": "world"}]
    rows = [
        {"prompt": "Hello", "response": "world"},
        {"prompt": "Hello", "responses": ["goodbye", "world"]},
        {"instruction": "Hello", "output": "world"},
        {"instruction": "Hello", "input": "", "output": ["goodbye", "world", "one"], "score": [1, 3.0, 1]},
        {"messages": [*talk, *said]},
        {"messages": talk, "chosen": said[0], "rejected": {"role": "assistant", "content": "goodbye"}},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "world"}]},
        {
            "conversations": [{"from": "human", "value": "Hello"}],
            "chosen": {"from": "gpt", "value": "world"},
            "rejected": {"from": "gpt", "value": "goodbye"},
        },
        {"prompt": "Hello", "history": [["a", "b"]], "system": "Be brief.", "response": "world"},
    ]
    hello, brief = render([("user", "Hello")]), render([("system", "Be brief."), ("user", "Hello")])
    past = render([("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Hello")])
    expected = [
        (hello, ["world"]), (hello, ["goodbye", "world"]), (hello, ["world"]), (hello, ["goodbye", "world", "one"]),
        (brief, ["world"]), (brief, ["world", "goodbye"]), (hello, ["world"]), (hello, ["world", "goodbye"]),
        (past, ["world"]),
    ]  # fmt: skip
    done, found = run(base, tmp_path, rows, adapter_name_or_path=str(adapter))
    assert done == 0
    for line, (prompt, texts) in zip(found, expected, strict=True):
        assert (line["prompt"], [answer["text"] for answer in line["answers"]]) == (prompt, texts)
        close(line, [plain(base, adapter, tensors, prompt, text) for text in texts])


def test_a_known_order_is_checked(base, judge, tmp_path, caplog):
    adapter, _, tensors = judge
    rows = [*PAIRS, {"prompt": "Hello", "responses": ["world", "bye", "one"], "score": [1.0, 2.0, 1.0]}]
    with caplog.at_level("INFO", logger="luthier"):
        _, found = run(base, tmp_path, rows, adapter_name_or_path=str(adapter))
    ranked = [[answer.get("lcb", answer.get("reward")) for answer in line["answers"]] for line in found]
    right = [a > b for a, b in ranked[:3]] + [ranked[3][1] > ranked[3][0], ranked[3][1] > ranked[3][2]]
    assert f"Of 5 pairs with a known order, {20 * sum(right):.1f} %" in caplog.text


def test_it_goes_on_where_it_stopped(base, judge, tmp_path, monkeypatch, capsys):
    adapter, _, _ = judge
    keys = {"adapter_name_or_path": str(adapter), "score_batch_size": 1}
    _, whole = run(base, tmp_path, PAIRS, **keys)
    kept = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "broken.jsonl").write_bytes(kept[0] + kept[1][:30])  # killed in the middle of the second
    scored = []
    real = Judge.judge
    monkeypatch.setattr(Judge, "judge", lambda self, items: scored.append(len(items)) or real(self, items))
    assert run(base, tmp_path, PAIRS, output="broken.jsonl", **keys) == (0, whole)
    assert scored == [2]
    changed = [PAIRS[0] | {"rejected": "something else"}, *PAIRS[1:]]
    before = (tmp_path / "broken.jsonl").read_bytes()
    assert run(base, tmp_path, changed, output="broken.jsonl", **keys)[0] == 2
    assert "row 0 there was asked something else" in capsys.readouterr().err
    assert (tmp_path / "broken.jsonl").read_bytes() == before


def test_what_is_cut_is_said(base, judge, tmp_path, caplog):
    adapter, _, _ = judge
    long = {"prompt": "one two " * 30, "responses": ["three four " * 30, "five"]}
    _, found = run(base, tmp_path, [long, PAIRS[0]], adapter_name_or_path=str(adapter), cutoff_len=40)
    assert found[0]["truncated"] > 100 and "truncated" not in found[1]
    assert "1 rows were cut to cutoff_len 40" in caplog.text


def test_a_training_folder_or_its_yaml_stands_for_what_was_trained(base, judge, tmp_path):
    adapter, kind, tensors = judge
    expected = [plain(base, adapter, tensors, render([("user", "Hello")]), "world")]
    rows = [{"prompt": "Hello", "response": "world"}]
    stage = {"value": "rm", "normal": "disco_rm"}[kind]
    trained = make_adapter(base, tmp_path / "trained")
    save_head(trained, kind)
    config(base, trained / "resolved_config.yaml", output_dir=str(trained), stage=stage, finetuning_type="lora")
    done, found = run(base, tmp_path, rows, output="yaml.jsonl", output_dir=str(trained), stage=stage)
    assert done == 0
    close(found[0], expected)
    source, output = tmp_path / "in.jsonl", tmp_path / "folder.jsonl"
    assert main(["score", str(trained), "--input", str(source), "--output", str(output)]) == 0
    close(lines(output)[0], expected)


def test_a_model_trained_whole_has_its_head_in_its_own_folder(base, tmp_path):
    whole = tmp_path / "whole"
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(whole)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(whole)
    tensors = save_head(whole, "value")
    done, found = run(whole, tmp_path, [{"prompt": "Hello", "response": "world"}], finetuning_type="full")
    assert done == 0
    close(found[0], [plain(base, None, tensors, render([("user", "Hello")]), "world")])


def test_earlier_adapters_stay_below_the_trained_one(base, tmp_path):
    from luthier.run import resolve

    for name in ("a", "b", "c"):
        make_adapter(base, tmp_path / name)
    keys = {"model_name_or_path": str(base), "adapter_name_or_path": [str(tmp_path / "a"), str(tmp_path / "b")]}
    for new, below in ((False, ["a"]), (True, ["a", "b"])):
        run = serving.as_trained(resolve(keys | {"create_new_adapter": new}, verb="score"), tmp_path / "c")
        assert run.adapter.adapter_name_or_path == [str(tmp_path / name) for name in [*below, "c"]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, ["row 1", "no answer to score"]),
        ({"prompt": "a", "response": ""}, ["row 1", "empty response"]),
        ({"prompt": "a", "responses": ["b", 3]}, ["row 1", "not text", "answer 2"]),
        ({"prompt": "a", "responses": ["b", ""]}, ["row 1", "empty answer", "answer 2"]),
        ({"prompt": "a", "responses": []}, ["row 1", "no answer to score"]),
        ({"prompt": "a", "responses": ["b", "c"], "score": [1]}, ["row 1", "2 answers, 1 scores"]),
        ({"prompt": "a", "responses": ["b", "c"], "score": [1, "2"]}, ["row 1", "score 2", "'2'"]),
        ({"question": "a", "response": "b"}, ["row 1", "prompt"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["row 1", "no answer to score"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_a_model_is_loaded(base, tmp_path, capsys, monkeypatch, row, words):
    monkeypatch.setattr(serving, "load_judge", lambda run: pytest.fail("a model was loaded"))
    assert run(base, tmp_path, [row])[0] == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "out.jsonl").exists()


def test_no_head_is_said_before_a_model_is_loaded(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving, "_load", lambda run: pytest.fail("a model was loaded"))
    adapter = make_adapter(base, tmp_path / "plain")
    assert run(base, tmp_path, PAIRS, adapter_name_or_path=str(adapter))[0] == 2
    said = capsys.readouterr().err
    assert "no reward model" in said and str(adapter) in said and "stage: rm" in said
    assert main(["score", str(adapter), "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "o")]) == 2
    assert "resolved_config.yaml" in capsys.readouterr().err


def test_keys_that_make_no_sense_are_refused():
    for keys in ({"lcb_k": -1.0}, {"lcb_k": math.nan}, {"score_batch_size": 0}):
        with pytest.raises(ConfigError, match=next(iter(keys))):
            ScoreConfig(**keys)
    with pytest.raises(ModelError, match="gives no reward.*value, normal"):
        Judge(None, None, head="accept", cutoff_len=1, config=ScoreConfig())


def test_scores_are_those_of_training(base, judge, tmp_path):
    """Not a plain computation but the training side of Luthier: evaluation records of the same rows."""
    from luthier.data.layout import collate
    from luthier.data.renderer import make_renderer
    from luthier.data.template import TemplateConfig
    from luthier.model.load import load_model
    from luthier.model.policy import PolicySetup
    from luthier.model.source import ModelConfig
    from luthier.objectives.rm import Rm
    from luthier.score import read_row

    whole = tmp_path / "whole"
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(whole)
    save_head(whole, "value")
    _, found = run(whole, tmp_path, PAIRS, finetuning_type="full")
    model = load_model(ModelConfig(model_name_or_path=str(whole)), dtype=torch.float32).eval()
    head = heads.attach(model, "value")
    heads.load(head, "value", whole)
    renderer = make_renderer(TemplateConfig(), tokenizer)
    items = [(Rm().encode(read_row(row), renderer, cutoff_len=2048)[0], "row") for row in PAIRS]
    with torch.no_grad():
        batch = collate(items, layout="shared", pad_id=3)
        reward = Rm().record(PolicySetup(model, head=head).bind(), batch)["reward"]
    assert [answer["reward"] for line in found for answer in line["answers"]] == reward.tolist()
