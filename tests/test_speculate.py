"""`luthier speculate`, called as the command line calls it, against answers generated one by one by transformers."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from luthier.cli import main, verb_help
from luthier.engines.speculate import Speculator
from luthier.speculate import checker, summarise
from tests.conftest import CORPUS, save_lively_model
from tests.test_speculative import save_head

ASKED = ["Hello world", "What is the capital of France?", "one two three", CORPUS[1], "goodbye " * 12]
NEW = 12


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    return save_lively_model(model_folder, tmp_path_factory.mktemp("speculate-model"))


@pytest.fixture(scope="module")
def answers(folder):
    """Transformers alone: chat template, one prompt, no drafts."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for text in ASKED:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"), pad_token_id=0,
        )  # fmt: skip
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def speculate(folder, tmp_path, *overrides, rows=None):
    """Returns the exit code and the output's path."""
    rows = rows or [{"prompt": text} for text in ASKED]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {folder}\nmax_new_tokens: {NEW}\nuse_cpu: true\n")
    return main(["speculate", str(config), "--input", str(source), "--output", str(output), *overrides]), output


def lines(output):
    return [json.loads(line) for line in output.read_text().splitlines()]


def summary(output):
    return json.loads(output.with_suffix(".summary.json").read_text())


@pytest.mark.parametrize("draft", ["prompt_lookup", "draft_model"])
def test_without_a_head_answers_are_those_of_plain_decoding(folder, tmp_path, answers, draft):
    more = [f"draft_model={folder}"] if draft == "draft_model" else []
    code, output = speculate(folder, tmp_path, f"draft={draft}", *more, "draft_tokens=3")
    assert code == 0
    assert [line["predict"] for line in lines(output)] == answers
    assert [line["row"] for line in lines(output)] == list(range(len(ASKED)))
    found = summary(output)["lossless"]
    assert found["passes"] < found["tokens"] == sum(line["ways"]["lossless"]["tokens"] for line in lines(output))
    assert found["tokens_per_pass"] == pytest.approx(found["tokens"] / found["passes"])
    assert "judge" not in summary(output) and "plain" not in summary(output)


def test_comparing_answers_every_prompt_in_three_ways(folder, tmp_path, answers, capsys):
    head = save_head(tmp_path / "head", layout="judge")
    keys = ("draft=early_exit", "draft_layers=1", f"accept_head={head}", "accept_threshold=-1")
    rows = [{"prompt": text, "target": answer} for text, answer in zip(ASKED, answers)]
    code, output = speculate(folder, tmp_path, *keys, "--compare", rows=rows)
    assert code == 0
    for line, expected in zip(lines(output), answers):
        ways = line["ways"]
        assert list(ways) == ["judge", "lossless", "plain"]
        assert ways["plain"]["predict"] == ways["lossless"]["predict"] == expected
        assert line["predict"] == ways["judge"]["predict"]
        assert ways["plain"]["passes"] == ways["plain"]["tokens"] and ways["plain"]["drafted"] == 0
        assert ways["judge"]["kept"] == ways["judge"]["drafted"], "the threshold lets everything pass"
    found = summary(output)
    assert found["plain"]["tokens_per_pass"] == 1 and found["lossless"]["same_as_plain"] == 1
    assert found["judge"]["tokens_per_pass"] > found["lossless"]["tokens_per_pass"] >= 1
    assert found["judge"]["acceptance"] == 1 and found["judge"]["judged"] > 0
    assert found["judge"]["speed_over_lossless"] == pytest.approx(
        found["judge"]["tokens_per_second"] / found["lossless"]["tokens_per_second"]
    )
    assert (found["plain"]["right"], found["plain"]["graded"]) == (1, len(ASKED))
    assert found["judge"]["right"] < 1
    assert speculate(folder, tmp_path, *keys[:3], "accept_threshold=0.2", "--compare", rows=rows)[0] == 2
    table = capsys.readouterr().err
    assert "was asked something else" in table
    assert "with accept head" in table and "plain greedy" in table and f"{found['judge']['tokens']}" in table
    # Trained again into the same folder, the head is another one.
    tensors = load_file(head / "accept_head.safetensors")
    save_file({name: value + 1 for name, value in tensors.items()}, head / "accept_head.safetensors")
    assert speculate(folder, tmp_path, *keys, "--compare", rows=rows)[0] == 2
    assert "was asked something else" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "times"), [((), 0), (("--compare",), 2)])
def test_only_what_is_compared_begins_with_empty_caches(folder, tmp_path, monkeypatch, flags, times):
    emptied, forget = [], Speculator.forget
    monkeypatch.setattr(Speculator, "forget", lambda self: (emptied.append(self), forget(self)))
    assert speculate(folder, tmp_path, "draft=prompt_lookup", "max_new_tokens=3", *flags)[0] == 0
    assert len(emptied) == times * len(ASKED), "the lossless way and the plain one"


def test_a_second_call_goes_on_where_the_first_stopped(folder, tmp_path, answers, capsys):
    code, output = speculate(folder, tmp_path, "draft=prompt_lookup")
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:30])
    assert speculate(folder, tmp_path, "draft=prompt_lookup")[0] == 0
    assert output.read_text().startswith("".join(whole[:2]))
    assert [line["predict"] for line in lines(output)] == answers
    assert summary(output)["rows"] == len(ASKED)
    assert speculate(folder, tmp_path, "draft=prompt_lookup", "draft_tokens=2")[0] == 2
    assert "was asked something else" in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "other")
    assert speculate(other, tmp_path, "draft=prompt_lookup")[0] == 2
    assert "was asked something else" in capsys.readouterr().err


def test_bad_input_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys):
    assert speculate(folder, tmp_path, "draft=prompt_lookup", rows=[{"prompt": "a", "regex": "(b"}])[0] == 2
    assert "row 1: regex is no regular expression" in capsys.readouterr().err
    assert speculate(folder, tmp_path)[0] == 2
    assert "draft is not set" in capsys.readouterr().err
    assert speculate(folder, tmp_path, "draft=prompt_lookup", "do_sample=true")[0] == 2
    assert "do_sample: true" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "wanted", "text", "right"),
    [
        ("regex", r"^\d+ apples$", "12 apples", True),
        ("regex", r"^\d+ apples$", "I have 12 apples", False),
        ("answer", "3 + 4 = 7 #### 7", "So it is 7.0", True),
        ("answer", "7", "first 7, then 8", False),
        ("target", "Paris", "It is paris, of course.", True),
        ("target", "Paris", "Parisians", False),
    ],
)
def test_what_is_right(column, wanted, text, right):
    assert checker(column, wanted)(text) is right


def test_what_rows_add_up_to():
    def way(tokens, passes, seconds, predict, **more):
        return {"predict": predict, "tokens": tokens, "passes": passes, "seconds": seconds,
                "drafted": 0, "kept": 0} | more  # fmt: skip

    rows = [
        {"judge": way(10, 2, 1.0, "a", right=True, drafted=8, kept=6), "plain": way(10, 10, 4.0, "a", right=True)},
        {"judge": way(20, 4, 2.0, "b", right=False, drafted=12, kept=4), "plain": way(10, 10, 4.0, "c", right=True)},
        {"judge": way(0, 0, 0.0, "d"), "plain": way(0, 0, 0.0, "d")},
    ]
    found = summarise(rows)
    judge = found["judge"]
    assert (judge["tokens"], judge["passes"], judge["tokens_per_pass"], judge["acceptance"]) == (30, 6, 5, 0.5)
    assert (judge["right"], judge["graded"], found["plain"]["right"]) == (0.5, 2, 1)
    assert judge["speed_over_plain"] == pytest.approx((30 / 3) / (20 / 8))
    assert judge["same_as_plain"] == pytest.approx(2 / 3)
    assert "speed_over_plain" not in found["plain"]
    assert found["plain"]["acceptance"] is None and not math.isnan(found["plain"]["tokens_per_second"])


def test_help_has_an_example():
    assert "luthier speculate saves/accept" in verb_help("speculate") and "--compare" in verb_help("speculate")
