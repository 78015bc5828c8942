"""`luthier collect`, called as the command line calls it, against full forward passes of transformers."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from luthier import collect, serving
from luthier.cli import main
from luthier.collection import Pair, summarise
from luthier.core import log
from luthier.core.prefix import common_prefix
from luthier.core.registry import find
from luthier.core.types import Example, Message
from luthier.engines.hf import Engine
from tests.conftest import CORPUS, save_lively_model
from tests.scorers.chains import chain_model

ASKED = [
    "one two one two one two",
    "What is the capital of France?",
    "a a a a a",
    CORPUS[1],
    "é漢字 é漢字 é漢字",
    "bye",
]
NEW = 24
FILES = ("train.jsonl", "context.jsonl", "holdout/train.jsonl", "holdout/context.jsonl")


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """The tiny model with weights that do not repeat one token."""
    return save_lively_model(model_folder, tmp_path_factory.mktemp("collect-model"))


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", [{"prompt": text} for text in ASKED])


@pytest.fixture
def told(monkeypatch, caplog):
    """What is logged, also where no test before this one has set up the log."""
    log.set_up()
    monkeypatch.setattr(logging.getLogger("luthier"), "propagate", True)
    return caplog


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(folder, source, output, *overrides):
    config = source.parent / "collect.yaml"
    config.write_text(
        f"model_name_or_path: {folder}\ndo_sample: false\nmax_new_tokens: {NEW}\ninfer_batch_size: 2\nuse_cpu: true\n"
        "draft: early_exit\ndraft_layers: 1\ndraft_tokens: 3\ncollect_scorer: kl\n"
    )
    return main(["collect", str(config), "--input", str(source), "--output", str(output), *overrides])


def lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def files(output):
    return {name: (output / name).read_bytes() for name in FILES if (output / name).exists()}


@torch.no_grad()
def greedy(model, ids, stop, count):
    out = []
    while len(out) < count and (not out or out[-1] != stop):
        out.append(int(model(torch.tensor([[*ids, *out]]), use_cache=False).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("keys", [(), ("collect_mismatches=all", "collect_stride=4", "draft=prompt_lookup")])
def test_rounds_are_what_the_target_says_along_its_own_answers(folder, source, tmp_path, keys):
    assert run(folder, source, tmp_path / "out", *keys) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    contexts = lines(tmp_path / "out" / "context.jsonl")
    assert [line["req_id"] for line in contexts] == [str(i) for i in range(len(ASKED))]
    for line, text in zip(contexts, ASKED):
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        assert line["prompt_ids"] == tokenizer.encode(rendered, add_special_tokens=False)
        assert line["answer_ids"] == greedy(model, line["prompt_ids"], stop, NEW)
        assert line["finished"] == (line["answer_ids"][-1] == stop)
        assert line["user_text"] == text
        assert line["assistant_text"] == tokenizer.decode(line["answer_ids"]).removesuffix("<|im_end|>")
    by_id = {line["req_id"]: line for line in contexts}
    rounds = lines(tmp_path / "out" / "train.jsonl")
    assert [one["idx"] for one in rounds] == list(range(len(rounds)))
    mismatches = 0
    for one in rounds:
        context = by_id[one["req_id"]]
        cut = one["context_ids_len"] - len(context["prompt_ids"])
        ids = [*context["prompt_ids"], *context["answer_ids"]][: one["context_ids_len"]]
        draft, verifier = one["spd_round_draft_ids"], one["spd_round_verifier_ids"]
        with torch.no_grad():
            logits = [model(torch.tensor([[*ids, *draft[:i]]])).logits[0, -1].double() for i in range(len(draft) + 1)]
        assert verifier == [int(row.argmax()) for row in logits]
        wrong = [i for i, d in enumerate(draft) if d != verifier[i]]
        assert one["mismatch_index"] == (wrong if "collect_mismatches=all" in keys else wrong[:1])
        if keys:
            assert cut % 4 == 0
            for nth, i in enumerate(one["mismatch_index"]):  # n-grams have no distribution: one-hot
                p = logits[i].softmax(-1)
                assert one["mismatch_kl"][nth] == pytest.approx(-math.log(p[draft[i]]), rel=1e-3)
                assert one["mismatch_prob"][nth] == pytest.approx(float(p[draft[i]] / p.max()), rel=1e-3)
                assert one["mismatch_rank"][nth] == 1 + int((p > p[draft[i]]).sum())
        for kl, score in zip(one["mismatch_kl"], one["mismatch_score"], strict=True):
            assert score == pytest.approx(10 * math.exp(-kl), abs=1e-4)
        opening = f"USER: {context['user_text']}\nASSISTANT:"
        said = tokenizer.decode(context["answer_ids"][:cut])
        assert one["context_len"] == len(opening + os.path.commonprefix([said, context["assistant_text"]]))
        mismatches += len(wrong)
    assert mismatches > 10


def test_the_files_are_read_by_the_stage_that_trains_on_them(folder, source, tmp_path):
    from luthier.data.source import COLUMNS, Columns

    assert run(folder, source, tmp_path / "out", "--holdout", "0.3") == 0
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info == {
        "rounds": {"file_name": "train.jsonl", "formatting": "accept_head"},
        "rounds_holdout": {"file_name": "holdout/train.jsonl", "formatting": "accept_head"},
    }
    for entry in info.values():
        train = tmp_path / "out" / entry["file_name"]
        contexts = {line["req_id"]: line for line in lines(train.parent / "context.jsonl")}
        for row in lines(train):
            context = contexts[row["req_id"]]
            example = find("formats", "accept_head").read({**context, **row}, Columns(dict(COLUMNS)))
            ids = context["prompt_ids"] + context["answer_ids"]
            assert example.extra["context_ids"] == ids[: row["context_ids_len"]]
            assert [m["index"] for m in example.extra["mismatches"]] == row["mismatch_index"]


def test_rerun_keeps_the_token_and_goes_on(folder, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"prompt": text} for text in ASKED[:3]])
    # On random text: right is an answer with the same last letter.
    assert run(folder, source, tmp_path / "out", "collect_scorer=rerun", "answer_pattern=([a-z])") == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    contexts = {line["req_id"]: line for line in lines(tmp_path / "out" / "context.jsonl")}

    def last_letter(ids):
        letters = [c for c in tokenizer.decode(ids).removesuffix("<|im_end|>") if c in "abcdefghijklmnopqrstuvwxyz"]
        return letters[-1] if letters else None

    scores = []
    for one in lines(tmp_path / "out" / "train.jsonl"):
        context = contexts[one["req_id"]]
        cut = one["context_ids_len"] - len(context["prompt_ids"])
        for i, score in zip(one["mismatch_index"], one["mismatch_score"], strict=True):
            kept = [*context["answer_ids"][:cut], *one["spd_round_draft_ids"][: i + 1]]
            more = [] if kept[-1] == stop else greedy(model, context["prompt_ids"] + kept, stop, NEW - len(kept))
            right = last_letter(kept + more) == last_letter(context["answer_ids"])
            assert score == 10 * right
            scores.append(score)
    assert {0, 10} == set(scores)


def test_an_answer_that_ends_and_a_character_of_two_tokens(tokenizer, tmp_path):
    first, second = tokenizer.encode("\u00e9", add_special_tokens=False)
    model = chain_model(tokenizer, {"\n": "a", "a": first, first: second, second: "b", "b": "<|im_end|>"})
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = write(tmp_path / "in.jsonl", [{"prompt": "ab"}])
    # Both layers add nothing, so the first drafts what both say; a cut every token.
    assert run(tmp_path / "model", source, tmp_path / "out", "draft_layers=1", "collect_stride=1") == 0
    (context,) = lines(tmp_path / "out" / "context.jsonl")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answer = [*tokenizer.encode("a\u00e9b", add_special_tokens=False), stop]
    assert (context["answer_ids"], context["finished"], context["assistant_text"]) == (answer, True, "a\u00e9b")
    opening = len("USER: ab\nASSISTANT:")
    rounds = lines(tmp_path / "out" / "train.jsonl")
    assert [one["context_len"] - opening for one in rounds] == [0, 1, 1, 2, 3]
    assert [one["spd_round_draft_ids"] for one in rounds] == [answer[i : i + 3] for i in range(5)]
    assert all(one["spd_round_verifier_ids"][:-1] == one["spd_round_draft_ids"] for one in rounds)
    assert all(one["mismatch_index"] == [] for one in rounds)


@pytest.mark.parametrize("cuts", [(0, 0), (0, 3), (5, 1), (4, 2), (-1, 5), (-1, -1)])
def test_it_goes_on_where_it_was_killed(folder, source, tmp_path, monkeypatch, cuts):
    """cuts: how many lines of train.jsonl and of context.jsonl were written; half of the next ones was, too."""
    keys = ("do_sample=true", "temperature=1.3", "seed=7", "draft=prompt_lookup", "--holdout", "0.3")
    run(folder, source, tmp_path / "whole", *keys)
    whole = files(tmp_path / "whole")
    assert len(whole) == 4 and all(whole.values())
    broken = tmp_path / "broken"
    (broken / "holdout").mkdir(parents=True)
    (broken / "collect.json").write_bytes((tmp_path / "whole" / "collect.json").read_bytes())
    requests = lines(tmp_path / "whole" / "context.jsonl")
    rounds = lines(tmp_path / "whole" / "train.jsonl")
    # No context is written before all rounds of its request are.
    complete = [line["req_id"] for line in requests][: cuts[1] % (len(requests) + 1)]
    least = sum(one["req_id"] in complete for one in rounds)
    for name, count, lower in (("train.jsonl", cuts[0], least), ("context.jsonl", cuts[1], 0)):
        text = whole[name].splitlines(keepends=True)
        count = max(count % (len(text) + 1), lower)
        (broken / name).write_bytes(b"".join(text[:count]) + (text[count][:9] if count < len(text) else b""))
    (broken / "holdout" / "train.jsonl").write_bytes(whole["holdout/train.jsonl"][:40])
    walked = []
    real = collect.Collector.request
    monkeypatch.setattr(collect.Collector, "request", lambda self, *a: walked.append(a[0].row) or real(self, *a))
    assert run(folder, source, broken, *keys) == 0
    assert files(broken) == whole
    assert [str(row) for row in walked] == [str(row) for row in range(len(ASKED)) if str(row) not in complete]
    assert run(folder, source, broken, *keys) == 0 and files(broken) == whole


@pytest.mark.e2e
def test_kill_9_in_the_middle(folder, source, tmp_path):
    keys = ("draft=prompt_lookup", "max_new_tokens=200", "infer_batch_size=1", "--holdout", "0.3")
    assert run(folder, source, tmp_path / "whole", *keys) == 0
    command = ["collect", str(tmp_path / "collect.yaml"), "--input", str(source), "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", *command, *keys], stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    context = tmp_path / "killed" / "context.jsonl"
    until = time.monotonic() + 300
    while not (context.exists() and context.stat().st_size) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    assert 1 <= len(lines(context)) < 5
    assert run(folder, source, tmp_path / "killed", *keys) == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_more_prompts_may_follow_and_a_prompt_asked_twice_is_not_parted(folder, tmp_path):
    rows = [{"prompt": text} for text in [*ASKED, ASKED[4], *(f"{i} hello" for i in range(5))]]
    source = write(tmp_path / "in.jsonl", rows)
    assert run(folder, source, tmp_path / "whole", "--holdout", "0.2") == 0
    held = [line["req_id"] for line in lines(tmp_path / "whole" / "holdout" / "context.jsonl")]
    assert "4" in held and "6" in held and 2 <= len(held) <= 4
    write(source, rows[:6])
    assert run(folder, source, tmp_path / "grown", "--holdout", "0.2") == 0
    write(source, rows)
    assert run(folder, source, tmp_path / "grown", "--holdout", "0.2") == 0
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


def test_the_share_that_is_held_out():
    for share in (0.1, 0.25, 0.5):
        for count in (10, 100, 1000):
            questions = [collect.Question(i, "", [i], None) for i in range(count)]
            held = collect.held_out(questions, share)
            assert abs(sum(held) - share * count) <= 2
    assert not any(collect.held_out(questions, 0.0))


def test_what_it_adds_up_to(folder, source, tmp_path, told):
    with told.at_level("INFO", logger="luthier"):
        run(folder, source, tmp_path / "out", "draft=prompt_lookup", "collect_scorer=prob")
    rounds = lines(tmp_path / "out" / "train.jsonl")
    contexts = lines(tmp_path / "out" / "context.jsonl")
    pairs = [(one["spd_round_draft_ids"], one["spd_round_verifier_ids"]) for one in rounds]
    leads = []
    for draft, verifier in pairs:
        lead = 0
        while lead < len(draft) and draft[lead] == verifier[lead]:
            lead += 1
        leads.append(lead)
    scores = [score for one in rounds for score in one["mismatch_score"]]
    empty = sum(line["empty_drafts"] for line in contexts)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == {
        "requests": len(ASKED),
        "held_out": 0,
        "unfinished_answers": sum(len(line["answer_ids"]) == NEW for line in contexts),
        "rounds": len(rounds),
        "drafted": sum(len(draft) for draft, _ in pairs),
        "accepted": sum(leads),
        "unscored": 0,
        "empty_drafts": empty,
        "acceptance_rate": pytest.approx(sum(leads) / sum(len(draft) for draft, _ in pairs)),
        # Greedy answers, walked as decoding goes: no more tokens than the answers have.
        "tokens_per_target_pass": pytest.approx(
            sum(len(line["answer_ids"]) for line in contexts) / (len(rounds) + empty)
        ),
        "mismatches": len(scores),
        "mean_score": pytest.approx(sum(scores) / len(scores)),
        "histogram": [sum(i - 0.5 <= score < i + 0.5 for score in scores) for i in range(11)],
    }
    assert empty > 0 and f"{len(rounds)} rounds" in told.text and f"{empty} drafts were empty" in told.text
    assert "collecting: 6 of 6" in told.text


def test_a_pass_that_ends_an_answer_brings_no_token_after_it(tmp_path):
    home = Pair(tmp_path / "out")
    home.done()
    known = {"prompt_ids": [9, 9, 9], "answer_ids": [5, 6, 7, 2], "finished": True, "empty_drafts": 0, "unscored": 0}
    walked = [(3, [5, 6], [5, 6, 7]), (6, [2], [2, 8])]
    rounds = [
        {"req_id": "0", "context_ids_len": at, "spd_round_draft_ids": draft, "spd_round_verifier_ids": says}
        for at, draft, says in walked
    ]
    home.add([one | {"mismatch_index": [], "mismatch_score": []} for one in rounds], {"req_id": "0", **known})
    summary = summarise(tmp_path / "out", [home])
    assert (summary["accepted"], summary["acceptance_rate"]) == (3, 1)
    assert summary["tokens_per_target_pass"] == 2, "four tokens in two passes"


def test_what_cannot_be_scored_is_left_out_and_counted(folder, source, tmp_path, told):
    run(folder, source, tmp_path / "out", "collect_scorer=rerun", "answer_pattern=no such words")
    assert all(one["mismatch_index"] == one["mismatch_score"] == [] for one in lines(tmp_path / "out" / "train.jsonl"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["unscored"] > 10 and summary["mean_score"] is None
    assert f"{summary['unscored']} mismatches got no score" in told.text


def test_system_tools_and_earlier_turns_are_in_the_text():
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert collect.user_text(Example(turns[:1], ())) == "a"
    assert collect.user_text(Example(turns, ())) == "a\nASSISTANT:b\nUSER: c"
    assert collect.user_text(Example(turns[:1], (), system="s", tools="[]")) == "s\n\n[]\n\na"


def test_a_cut_within_a_character_counts_the_characters_before_it(tokenizer):
    ids = tokenizer.encode("ab\u00e9\u6f22", add_special_tokens=False)
    texts = [tokenizer.decode(ids[:cut]) for cut in range(len(ids) + 1)]
    assert [common_prefix(text, texts[-1]) for text in texts] == [0, 1, 2, 2, 3, 3, 3, 4]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["draft=null"], ["draft is not set", "prompt_lookup"]),
        (["num_beams=2"], ["num_beams: 2"]),
        (["repetition_penalty=1.1", "draft=null"], ["repetition_penalty: 1.1", "draft is not set"]),
        (["--holdout", "1"], ["--holdout 1.0"]),
        (["--holdout", "many"], ["--holdout many", "a number"]),
        (["collect_scorer=klr"], ["no scorer named 'klr'", "Did you mean 'kl'"]),
        (["collect_stride=-1"], ["collect_stride: -1"]),
        (["collect_scorer=llm"], ["collect_llm_url", "collect_llm_model"]),
        (["collect_mismatches=some"], ["collect_mismatches", "first", "all"]),
    ],
)
def test_what_makes_no_sense_is_said_before_a_model_is_loaded(
    folder, source, tmp_path, capsys, monkeypatch, keys, words
):
    monkeypatch.setattr(serving, "load_engine", lambda run: pytest.fail("a model was loaded"))
    assert run(folder, source, tmp_path / "out", *keys) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_room_for_an_answer_is_named_before_anything_is_answered(
    folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Engine, "generate", lambda *a, **k: pytest.fail("something was answered"))
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hello"}, {"prompt": "one two " * 300}])
    assert run(folder, source, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "row 2" in said and "no room for an answer" in said and "512" in said


def test_a_folder_of_something_else_is_refused_and_kept(folder, source, tmp_path, capsys, monkeypatch):
    assert run(folder, source, tmp_path / "out") == 0
    before = files(tmp_path / "out")
    assert run(folder, source, tmp_path / "out", "draft_tokens=2") == 2
    assert "draft_tokens was 3 and is 2" in capsys.readouterr().err
    assert run(folder, source, tmp_path / "out", "--holdout", "0.1") == 2
    assert "holdout was 0.0 and is 0.1" in capsys.readouterr().err
    assert run(folder, source, tmp_path / "out", "infer_batch_size=5") == 0  # the same content, at another pace
    write(source, [{"prompt": text} for text in ["something else", *ASKED[1:]]])
    assert run(folder, source, tmp_path / "out") == 2
    assert "request 0 there was another prompt than row 1" in capsys.readouterr().err
    write(source, [{"prompt": text} for text in ASKED[:3]])
    assert run(folder, source, tmp_path / "out") == 2
    assert "request 3 is no row of --input now" in capsys.readouterr().err
    assert files(tmp_path / "out") == before
    monkeypatch.setattr(serving, "load_engine", lambda run: pytest.fail("a model was loaded"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("{}\n")
    assert run(folder, source, tmp_path / "other") == 2
    assert "of somebody else" in capsys.readouterr().err
    assert run(folder, source, Path(source)) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_answers_of_a_window_are_made_together_when_it_goes_on(folder, source, tmp_path, monkeypatch):
    """What shares a batch may move the last digits of an answer's logits; so it shares the same batch again."""
    run(folder, source, tmp_path / "out")
    for name in ("train.jsonl", "context.jsonl"):
        file = tmp_path / "out" / name
        kept = [line for line in file.read_bytes().splitlines(keepends=True) if json.loads(line)["req_id"] in "012"]
        file.write_bytes(b"".join(kept))
    asked = []
    real = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, p, *a, **k: asked.append(p) or real(self, p, *a, **k))
    run(folder, source, tmp_path / "out")
    prompts = [line["prompt_ids"] for line in lines(tmp_path / "out" / "context.jsonl")]
    assert asked == [prompts[2:4], prompts[4:6]]
