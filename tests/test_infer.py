"""`luthier infer`, called as the command line calls it, against answers generated one by one by transformers."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from luthier import serving
from luthier.cli import main
from luthier.engines.hf import Engine
from tests.conftest import CORPUS, save_lively_model

ASKED = ["Hello world", "What is the capital of France?", "one two three", "a", CORPUS[1], "goodbye " * 12]
NEW = 10


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The tiny model with weights that do not repeat one token, and no stop token that ends most answers at once."""
    return save_lively_model(model_folder, tmp_path_factory.mktemp("infer-model"))


def one_by_one(folder, asked, *, model=None, system=None, **keys):
    """Transformers alone: chat template, one prompt, no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = model or transformers.AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for messages in asked:
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0, **keys,
        )  # fmt: skip
        answers.append((text, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    return answers


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(folder, source, output, *overrides):
    config = source.parent / "infer.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ndo_sample: false\nmax_new_tokens: {NEW}\ninfer_batch_size: 2\nuse_cpu: true\n"
    )
    return main(["infer", str(config), "--input", str(source), "--output", str(output), *overrides])


def lines(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", [{"prompt": text} for text in ASKED])


def test_answers_are_those_of_each_prompt_alone(folder, source, tmp_path):
    assert run(folder, source, tmp_path / "out" / "answers.jsonl") == 0
    expected = one_by_one(folder, ASKED)
    assert len({answer for _, answer in expected}) == len(ASKED)
    assert lines(tmp_path / "out" / "answers.jsonl") == [
        {"row": row, "prompt": text, "predict": answer} for row, (text, answer) in enumerate(expected)
    ]


def test_every_usual_shape_of_row_is_understood(folder, tmp_path):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello world"},
        {"role": "user", "content": "goodbye"},
    ]
    rows = [
        {"messages": conversation},
        {"messages": [*conversation, {"role": "assistant", "content": "bye"}]},
        {"instruction": "add", "input": "one two", "output": "three", "system": "Be brief."},
        {"instruction": "add", "history": [["Hello", "Hello world"]]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "world"}]},
        {"prompt": "Hello", "label": "world"},
        {"text": "Hello"},
    ]
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello world"}]
    brief = one_by_one(folder, ["add\none two"], system="Be brief.")
    plain = one_by_one(folder, [conversation, conversation, [*history, {"role": "user", "content": "add"}], "Hello"])
    expected = [*plain[:2], *brief, plain[2], plain[3], plain[3], plain[3]]
    run(folder, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    found = lines(tmp_path / "out.jsonl")
    assert [(line["prompt"], line["predict"]) for line in found] == expected
    assert [line.get("label") for line in found] == [None, "bye", "three", None, "world", "world", None]
    assert ["label" in line for line in found] == [False, True, True, False, True, True, False]


def test_json_and_txt_files_too(folder, tmp_path):
    expected = one_by_one(folder, ASKED[:3])
    (tmp_path / "in.txt").write_text("\n".join(ASKED[:3]) + "\n\n")
    (tmp_path / "in.json").write_text(json.dumps([{"prompt": text} for text in ASKED[:3]]))
    for name in ("in.txt", "in.json"):
        output = tmp_path / f"{name}.out"
        assert run(folder, tmp_path / name, output) == 0
        assert [(line["prompt"], line["predict"]) for line in lines(output)] == expected


def test_it_goes_on_where_it_stopped(folder, source, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    sampled = ("do_sample=true", "temperature=1.3", "seed=7")
    run(folder, source, whole, *sampled)
    kept = whole.read_bytes().splitlines(keepends=True)
    broken.write_bytes(b"".join(kept[:3]) + kept[3][:20])  # killed in the middle of the fourth
    asked = []
    real = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, p, *a, **k: asked.append(len(p)) or real(self, p, *a, **k))
    assert run(folder, source, broken, *sampled) == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert asked == [3]
    assert run(folder, source, broken, *sampled) == 0
    assert broken.read_bytes() == whole.read_bytes() and sum(asked) == 3


def test_each_batch_is_on_disk_before_the_next_begins(folder, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", [{"prompt": text} for text in ASKED * 2])
    seen = []
    real = Engine.generate
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(
        Engine, "generate", lambda self, *a, **k: seen.append(len(lines(output))) or real(self, *a, **k)
    )
    run(folder, source, output)
    assert seen == [0, 8] and len(lines(output)) == 12


def test_seeds_change_sampled_answers_and_batches_do_not(folder, source, tmp_path):
    outputs = {}
    for name, keys in {"a": ["seed=1"], "b": ["seed=1", "infer_batch_size=5"], "c": ["seed=2"]}.items():
        run(folder, source, tmp_path / name, "do_sample=true", "temperature=1.5", "top_p=1.0", *keys)
        outputs[name] = [line["predict"] for line in lines(tmp_path / name)]
    assert outputs["a"] == outputs["b"] and all(a != c for a, c in zip(outputs["a"], outputs["c"]))


def test_the_same_prompt_twice_is_drawn_twice(folder, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hello"}] * 3)
    run(folder, source, tmp_path / "out.jsonl", "do_sample=true", "temperature=1.5", "top_p=1.0")
    assert len({line["predict"] for line in lines(tmp_path / "out.jsonl")}) == 3


def test_an_adapter_speaks_too(folder, source, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    adapted.save_pretrained(tmp_path / "adapter")
    run(folder, source, tmp_path / "with.jsonl", f"adapter_name_or_path={tmp_path / 'adapter'}")
    expected = one_by_one(folder, ASKED, model=adapted.eval())
    assert [(line["prompt"], line["predict"]) for line in lines(tmp_path / "with.jsonl")] == expected
    assert expected != one_by_one(folder, ASKED)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '{"row": 0, "prompt": "something else", "predict": ""}\n',
            ["line 1", "row 0", "something else than the input"],
        ),
        ('{"row": 99, "prompt": "x", "predict": ""}\n', ["line 1", "row 99"]),
        ("hello\n", ["line 1", "not JSON"]),
        ('{"a": 1}\n', ["line 1", "no answer"]),
    ],
)
def test_an_output_of_something_else_is_refused_and_kept(folder, source, tmp_path, capsys, text, words):
    output = tmp_path / "out.jsonl"
    output.write_text(text)
    assert run(folder, source, output) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert output.read_text() == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', ["in.jsonl", "line 2"]),
        ('{"prompt": "a"}\n{"question": "b"}\n', ["in.jsonl", "row 2", "prompt"]),
        ('{"messages": [{"role": "boss", "content": "b"}]}\n', ["row 1", "unknown role", "boss"]),
        ("", ["empty"]),
    ],
)
def test_a_row_that_cannot_be_used_is_named_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, content, words
):
    monkeypatch.setattr(serving, "load_engine", lambda run: pytest.fail("a model was loaded"))
    (tmp_path / "in.jsonl").write_text(content)
    assert run(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "out.jsonl").exists()


def test_missing_files_and_flags_are_said(folder, source, tmp_path, capsys):
    assert run(folder, tmp_path / "nowhere.jsonl", tmp_path / "out.jsonl") == 2
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert main(["infer", str(tmp_path / "infer.yaml"), "--input", str(source)]) == 2
    assert "--output" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said_before_a_model_is_loaded(folder, source, capsys, monkeypatch):
    monkeypatch.setattr(serving, "load_engine", lambda run: pytest.fail("a model was loaded"))
    assert run(folder, source, source / "out.jsonl") == 2
    assert "--output" in capsys.readouterr().err


# Best of n


SAMPLED = ("do_sample=true", "temperature=1.2", "top_p=1.0", "top_k=0", "seed=7")


def pick(folder, source, output, *more, n=4):
    return run(folder, source, output, *SAMPLED, "--n", str(n), *more)


def mean_logp(model, prompt, ids):
    """Transformers alone: the mean log-prob of an answer's tokens."""
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    return sum(float(logp[len(prompt) + i - 1, token]) for i, token in enumerate(ids)) / len(ids)


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
    """(source, lines of `--select best` with four candidates)."""
    place = tmp_path_factory.mktemp("drawn")
    source = write(place / "in.jsonl", [{"prompt": text} for text in ASKED])
    assert pick(folder, source, place / "best.jsonl") == 0
    return source, lines(place / "best.jsonl")


def test_the_most_probable_of_n_is_chosen(folder, drawn, tmp_path, monkeypatch):
    source, found = drawn
    asked, said = [], []
    real = Engine.generate

    def spied(self, prompts, *rest, **keys):
        assert keys["keep_stop"]  # the end of an answer is part of how probable it is
        out = real(self, prompts, *rest, **keys)
        asked.extend(prompts)
        said.extend(out)
        return out

    monkeypatch.setattr(Engine, "generate", spied)
    pick(folder, source, tmp_path / "again")
    assert lines(tmp_path / "again") == found
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    logps = iter([mean_logp(model, prompt, ids) for prompt, ids in zip(asked, said, strict=True)])
    for line in found:
        assert (line["n"], line["select"], len(line["candidates"])) == (4, "best", 4)
        expected = [next(logps) for _ in range(4)]
        assert [one["logp"] for one in line["candidates"]] == pytest.approx(expected, abs=1e-5)
        assert line["predict"] == line["candidates"][expected.index(max(expected))]["text"]
        assert len({one["text"] for one in line["candidates"]}) > 1
    assert any(line["predict"] != line["candidates"][0]["text"] for line in found)


def test_candidates_depend_on_their_row_alone_and_the_first_is_the_plain_answer(folder, drawn, tmp_path):
    source, found = drawn
    run(folder, source, tmp_path / "one", *SAMPLED)
    assert [line["predict"] for line in lines(tmp_path / "one")] == [line["candidates"][0]["text"] for line in found]
    pick(folder, source, tmp_path / "two", "infer_batch_size=5", n=2)
    for line, other in zip(found, lines(tmp_path / "two")):
        assert [one["text"] for one in other["candidates"]] == [one["text"] for one in line["candidates"][:2]]
        for one, same in zip(other["candidates"], line["candidates"]):
            assert one["logp"] == pytest.approx(same["logp"], abs=1e-5)


def test_log_probs_are_those_of_the_drawn_tokens_with_their_end(folder):
    from luthier.engines._trees import Trees
    from luthier.engines.best_of import mean_logps
    from luthier.model.policy import PolicySetup

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts, answers = [[9, 8, 7], [11]], [[[20, 21, 5], [20, 22, 23, 5], [5]], [[30, 31], [30, 31]]]
    expected = [mean_logp(model, prompt, ids) for prompt, several in zip(prompts, answers) for ids in several]
    found = mean_logps(Trees(PolicySetup(model), pad_id=3), prompts, answers, 1)
    assert [len(row) for row in found] == [3, 2]
    assert [x for row in found for x in row] == pytest.approx(expected, abs=1e-5)


def test_a_kept_stop_is_the_one_that_ended_the_answer(folder):
    from luthier.engines.sampling import GenerateConfig

    engine = Engine(
        transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    )
    sampling = GenerateConfig(do_sample=False, max_new_tokens=NEW)
    (whole,) = engine.generate([[9, 8, 7]], sampling, [])
    stop = whole[4]
    first = whole.index(stop)
    assert engine.generate([[9, 8, 7]], sampling, [stop]) == [whole[:first]]
    assert engine.generate([[9, 8, 7]], sampling, [stop], keep_stop=True) == [whole[: first + 1]]


def test_a_vote_adds_up_equal_answers():
    from luthier.engines.best_of import Candidate, best, vote

    logs = [-1.0, -1.1, -1.2, -3.0]
    several = [Candidate(text, logp) for text, logp in zip(["a", "b  c", "b\nc ", "a"], logs)]
    shares = [math.exp(x) / sum(map(math.exp, logs)) for x in logs]
    assert shares[1] + shares[2] > shares[0] + shares[3]
    chosen, said = vote(several)
    assert chosen == 1 and best(several)[0] == 0
    assert [one["weight"] for one in said] == pytest.approx(shares)
    assert vote([Candidate("B", -1.0), Candidate("b", -1.1), Candidate("b", -9.0)])[0] == 0


def test_vote_and_its_weights_are_written(folder, drawn, tmp_path):
    source, found = drawn
    pick(folder, source, tmp_path / "vote", "--select", "vote")
    for line, other in zip(found, lines(tmp_path / "vote"), strict=True):
        assert other["select"] == "vote"
        assert [one["text"] for one in other["candidates"]] == [one["text"] for one in line["candidates"]]
        logps = [one["logp"] for one in other["candidates"]]
        shares = [math.exp(x) / sum(map(math.exp, logps)) for x in logps]
        assert [one["weight"] for one in other["candidates"]] == pytest.approx(shares)


@pytest.mark.parametrize("kind", ["value", "normal"])
def test_a_reward_model_chooses(folder, drawn, tmp_path, kind):
    """Its scores are those `luthier score` writes, which tests/test_score.py holds against plain forward passes."""
    from tests.test_score import make_adapter, save_head

    source, found = drawn
    judge = make_adapter(folder, tmp_path / "rm")
    save_head(judge, kind)
    stage = {"value": "rm", "normal": "disco_rm"}[kind]
    (judge / "resolved_config.yaml").write_text(f"model_name_or_path: {folder}\nstage: {stage}\nuse_cpu: true\n")
    keys = (f"reward_model={judge}", "lcb_k=2.0")
    assert pick(folder, source, tmp_path / "rm.jsonl", "--select", "rm", *keys) == 0
    chosen = lines(tmp_path / "rm.jsonl")
    texts = [[one["text"] for one in line["candidates"]] for line in chosen]
    assert texts == [[one["text"] for one in line["candidates"]] for line in found]
    write(tmp_path / "all.jsonl", [{"prompt": ask, "responses": several} for ask, several in zip(ASKED, texts)])
    judged = tmp_path / "judged.jsonl"
    assert main(["score", str(judge), "--input", str(tmp_path / "all.jsonl"), "--output", str(judged), keys[1]]) == 0
    name = {"value": "reward", "normal": "lcb"}[kind]
    for line, wanted in zip(chosen, lines(judged), strict=True):
        scores = [answer[name] for answer in wanted["answers"]]
        assert [one[name] for one in line["candidates"]] == pytest.approx(scores, abs=1e-4)
        assert line["predict"] == line["candidates"][scores.index(max(scores))]["text"]
    assert any(line["predict"] != other["predict"] for line, other in zip(chosen, found))


def test_best_of_n_goes_on_where_it_stopped_and_knows_its_choice(folder, drawn, tmp_path, capsys):
    source, found = drawn
    output = tmp_path / "out.jsonl"
    output.write_text("".join(json.dumps(line) + "\n" for line in found[:4]) + '{"row": 4')
    assert pick(folder, source, output) == 0
    assert [(line["row"], line["predict"]) for line in lines(output)] == [(x["row"], x["predict"]) for x in found]
    for more, n in (((), 3), (("--select", "vote"), 4)):
        assert pick(folder, source, output, *more, n=n) == 2
        assert "row 0 there was asked something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--n", "0"], "--n 0"),
        (["--select", "vote"], "add --n"),
        (["--n", "2"], "do_sample: true"),
        (["--n", "2", "do_sample=true", "num_beams=2"], "num_beams: 1"),
        (["--n", "2", "do_sample=true", "--select", "rm"], "reward_model"),
        (["--n", "2", "do_sample=true", "--select", "most"], "best, vote, rm"),
    ],
)
def test_choices_that_cannot_be_made_are_said_before_a_model_is_loaded(
    folder, source, tmp_path, capsys, monkeypatch, words, said
):
    monkeypatch.setattr(serving, "load_engine", lambda run: pytest.fail("a model was loaded"))
    assert run(folder, source, tmp_path / "out.jsonl", *words) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_with_calls_of_tools_is_read_as_training_reads_it():
    from luthier.core.registry import find
    from luthier.data.source import COLUMNS, Columns
    from luthier.infer import read_row

    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]},
            {"role": "tool", "content": "2"},
        ],
        "tools": [{"name": "add"}],
    }
    columns = Columns({**COLUMNS, "messages": "messages", "tools": "tools"})
    assert read_row(row) == find("formats", "openai").read(row, columns)
    assert [message.role for message in read_row(row).prompt] == ["user", "function", "observation"]
