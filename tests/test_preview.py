"""`luthier preview`: the machine-readable form to the last token, and what people see."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from luthier import preview_counts, preview_view
from luthier.cli import main
from luthier.core.types import Encoded, Path
from luthier.data.report import Bad, DataReport, Tally
from luthier.preview import chosen
from luthier.preview_tree import pieces
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def path(answer: str, name: str = "response", *, prompt: str = PROMPT, weight: float = 1.0, **facts) -> Path:
    given, said = ids(prompt), ids(answer)
    return Path(given + said, [0.0] * len(given) + [weight] * len(said), name, **facts)


def drawn(encoded: Encoded, **facts) -> str:
    """An example without colours."""
    console = Console(file=io.StringIO(), width=1000, color_system=None)
    look = preview_view.Look(TOKENIZER, plain=True, **facts)
    console.print(preview_view.example(look, 7, encoded, "file.jsonl:8"))
    return console.file.getvalue()


def write(folder, name: str, rows: list) -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def preview(model_folder, tmp_path, *words: str) -> int:
    common = [f"model_name_or_path={model_folder}", f"data_cache_dir={tmp_path / 'cache'}", "template=chatml"]
    return main(["preview", *common, *words])


# The machine-readable form, which outside tools rely on


def test_jsonl_of_a_conversation(model_folder, tmp_path, capsys):
    turns = [("human", "Hello"), ("gpt", "A violin."), ("human", "And?"), ("gpt", "Paris is.\n")]
    rows = [{"conversations": [{"from": who, "value": text} for who, text in turns]}] * 2
    file = write(tmp_path, "a.jsonl", rows)
    assert preview(model_folder, tmp_path, f"dataset={file}", "--format", "jsonl") == 0
    lines = capsys.readouterr().out.splitlines()
    text = "".join(
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{said}<|im_end|>\n"
        for asked, said in (("Hello", "A violin."), ("And?", "Paris is.\n"))
    )
    assert len(lines) == 2
    for row, line in enumerate(lines):
        shown = json.loads(line)
        assert list(shown) == ["row", "branches"] and shown["row"] == row
        (branch,) = shown["branches"]
        assert list(branch) == ["name", "input_ids", "labels", "score"]
        assert (branch["name"], branch["score"]) == ("response", None)
        assert TOKENIZER.decode(branch["input_ids"]) == text
        labelled = "".join(TOKENIZER.decode([label]) for label in branch["labels"] if label != -100)
        assert labelled == "A violin.<|im_end|>\nParis is.\n<|im_end|>\n"
        assert all(label in (-100, token) for label, token in zip(branch["labels"], branch["input_ids"], strict=True))


def test_jsonl_of_pairs_counts_rows_and_stops_at_n(model_folder, tmp_path, capsys):
    rows = [{"instruction": f"q{i}", "chosen": "yes yes", "rejected": "no"} for i in range(5)]
    file = write(tmp_path, "a.jsonl", rows)
    words = ["stage=dpo", f"dataset=[{{path: {file}, ranking: true}}]", "--format", "jsonl", "--rows", "2"]
    assert preview(model_folder, tmp_path, *words) == 0
    out, _ = capsys.readouterr()
    shown = [json.loads(line) for line in out.splitlines()]
    assert [row["row"] for row in shown] == [0, 1]
    assert [[branch["name"] for branch in row["branches"]] for row in shown] == [["chosen", "rejected"]] * 2
    chosen_scores = [[branch["score"] for branch in row["branches"]] for row in shown]
    assert all(better > worse for better, worse in chosen_scores)


# What people see


def rounds(tmp_path) -> tuple[str, list[int]]:
    """A data set of one request with two rounds, and the ids of their context."""
    known, said = "Hello", " one two three"
    text = f"USER: {known}\nASSISTANT:{said}"
    write(tmp_path, "context.jsonl", [{"req_id": "8", "user_text": known, "assistant_text": said}])
    common = {"req_id": "8", "context_len": len(text)}
    one = {"spd_round_draft_ids": [30, 31, 32], "spd_round_verifier_ids": [30, 41, 32]}
    two = {"spd_round_draft_ids": [50, 51], "spd_round_verifier_ids": [60, 51]}
    file = write(tmp_path, "train.jsonl", [
        common | one | {"mismatch_index": [1], "mismatch_score": ["4"]},
        common | two | {"mismatch_index": [0], "mismatch_score": [10]},
    ])  # fmt: skip
    return file, ids(text)


def test_jsonl_of_rows_with_a_value_per_token(model_folder, tmp_path, capsys):
    """Labels are the numbers that the head learns, each at its token, and null elsewhere."""
    file, context = rounds(tmp_path)
    words = ["stage=accept_head", "accept_layout=judge", f"dataset=[{{path: {file}, format: accept_head}}]"]
    assert preview(model_folder, tmp_path, *words, "--format", "jsonl") == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row == {"row": 0, "branches": [
        {"name": "round 1", "input_ids": [*context, 30, 31], "labels": [None] * (len(context) + 1) + [0.4],
         "score": None},
        {"name": "round 2", "input_ids": [*context, 50], "labels": [None] * len(context) + [1.0], "score": None},
    ]}  # fmt: skip


def test_stages_that_train_no_token_do_not_say_they_do(model_folder, tmp_path, capsys):
    file, context = rounds(tmp_path)
    words = ["stage=accept_head", "accept_layout=judge", f"dataset=[{{path: {file}, format: accept_head}}]"]
    assert preview(model_folder, tmp_path, *words) == 0
    out = capsys.readouterr().out
    whole = 2 * len(context) + 3
    assert f"Of {whole} tokens 2 carry a label ({2 / whole:.1%}), which the head learns: no token is trained" in out
    assert f"round 1: {len(context) + 2} tokens, 1 labelled" in out and " trained " not in out
    pairs = write(tmp_path, "pairs.jsonl", [{"instruction": "q", "chosen": "one", "rejected": "two three"}])
    words = ["stage=rm", f"dataset=[{{path: {pairs}, ranking: true}}]"]
    assert preview(model_folder, tmp_path, *words) == 0
    out = capsys.readouterr().out
    assert "judged as a whole: a score is learnt for each answer, and no token" in out
    judged = len(ids("one<|im_end|>\n")), len(ids("two three<|im_end|>\n"))
    assert f", {judged[0]} judged" in out and f", {judged[1]} judged" in out and " trained" not in out
    assert "[[judged]]" in out.splitlines()[0]


def test_one_answer():
    text = drawn(Encoded((path("Paris.<|im_end|>"),), truncated=3))
    given, said = len(ids(PROMPT)), len(ids("Paris.<|im_end|>"))
    assert text.splitlines() == [
        f"row 7  file.jsonl:8  {given + said} tokens, 3 cut away",
        f"response: {given + said} tokens, {said} trained",
        "<|im_start|>user\u21b5",
        "What is the capital of France?<|im_end|>\u21b5",
        "<|im_start|>assistant\u21b5",
        "[[Paris.<|im_end|>]]",
    ]


def test_weights_other_than_one_are_numbers():
    assert "[[0.5:Paris.<|im_end|>]]" in drawn(Encoded((path("Paris.<|im_end|>", weight=0.5),)))
    mixed = path("Paris is.<|im_end|>")
    mixed.weights[-1] = 2.0
    assert "[[Paris is.]][[2:<|im_end|>]]" in drawn(Encoded((mixed,)))


def test_the_first_token_is_never_trained():
    text = drawn(Encoded((path("Paris is", prompt=""),)))
    first = TOKENIZER.decode(ids("Paris is")[:1])
    assert f"{first}[[" in text and f"[[{first}" not in text


def test_two_answers_share_their_beginning_once():
    pair = (
        path("The capital is Paris.<|im_end|>", "chosen", score=1.0),
        path("hello<|im_end|>", "rejected", score=0.0),
    )
    lines = drawn(Encoded(pair)).splitlines()
    given, better, worse = (len(ids(text)) for text in (PROMPT, "The capital is Paris.<|im_end|>", "hello<|im_end|>"))
    assert lines[0].endswith(
        f"{given + better + worse} tokens for {2 * given + better + worse}: 2 answers share {given}"
    )
    assert lines[1] == f"shared by chosen, rejected: {given} tokens"
    assert lines[5:] == [
        f"chosen: {given + better} tokens, {better} trained, score 1",
        "[[The capital is Paris.<|im_end|>]]",
        f"rejected: {given + worse} tokens, {worse} trained, score 0",
        "[[hello<|im_end|>]]",
    ]


def test_more_answers_are_a_tree():
    texts = ["Paris.", "Paris is it.", "hello"]
    answers = tuple(path(f"{text}<|im_end|>", f"candidate-{i}", score=3.0 - i) for i, text in enumerate(texts))
    lines = drawn(Encoded(answers)).splitlines()
    assert sum("capital of France" in line for line in lines) == 1
    assert sum("Paris" in line for line in lines) == 1
    depth = {match[1]: match.start(1) for line in lines if (match := re.search(r"(candidate-.): \d+ tokens, ", line))}
    assert depth["candidate-0"] == depth["candidate-1"] > depth["candidate-2"] > 4
    assert any(line.endswith(f"shared by candidate-0, candidate-1: {len(ids('Paris'))} tokens") for line in lines)


def conversation(turns: int) -> Encoded:
    """Each turn's end is learnt by a branch of one token; the conversation goes on without it."""
    so_far, weights, ends = ids(PROMPT), [0.0] * len(ids(PROMPT)), []
    for nth in range(1, turns + 1):
        said, asked = ids("A violin"), ids("<|im_start|>user\nAnd?<|im_end|>\n")
        so_far, weights = so_far + said, weights + [1.0] * len(said)
        ends.append(Path([*so_far, 6], [0.0] * len(so_far) + [1.0], f"end-of-turn-{nth}"))
        so_far, weights = so_far + asked, weights + [0.0] * len(asked)
    last = ids("Paris<|im_end|>")
    return Encoded((Path(so_far + last, weights + [1.0] * len(last)), *ends))


def test_learnt_ends_of_turns_stand_in_their_place():
    lines = drawn(conversation(3)).splitlines()
    assert lines[1].startswith("response: ")
    text = "\n".join(lines[2:])
    marks = [f"[[A violin]] \u2190 [[<|endoftext|>]] end-of-turn-{nth} <|im_start|>user" for nth in (1, 2, 3)]
    places = [text.index(mark) for mark in marks]
    assert places == sorted(places) and text.endswith("[[Paris<|im_end|>]]") and " of " not in text[places[0] :]


def test_a_long_trunk_with_many_branches_does_not_walk_off_to_the_right():
    """Rounds of speculation leave one context at their own points, some of them in the middle of another round."""
    trunk = ids("one two three four five six seven eight nine ten eleven twelve hello world") * 3
    paths = []
    for nth, stop in enumerate(range(4, len(trunk), 4)):
        tail = ids("Paris is")
        paths.append(Path(trunk[:stop] + tail, [0.0] * stop + [1.0] * len(tail), f"round {nth}"))
    paths.append(Path(trunk[:6], [0.0] * 5 + [1.0], "round short"))
    lines = drawn(Encoded(tuple(paths))).splitlines()
    named = [int(match[1]) for line in lines if (match := re.search(r"round (\d+): \d+ tokens, ", line))]
    assert sorted(named) == list(range(len(paths) - 1)) and max(len(line) for line in lines) < 120
    assert any("\u2190 round short: 6 tokens, 1 trained" in line for line in lines)


def test_values_of_a_column_are_shown_at_their_tokens():
    said = path(
        "Paris is",
        columns={"score": [float("nan")] * len(ids(PROMPT)) + [0.25, float("nan"), 0.75][: len(ids("Paris is"))]},
    )
    text = drawn(Encoded((said,)), column="score")
    assert "=0.25" in text and text.count("=") == sum(value == value for value in said.columns["score"])


def test_nothing_a_terminal_would_act_upon():
    text = drawn(Encoded((path("a\x1b[31mred\x07\u202eback\tend\u200d"),)))
    assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    assert "\\x1b[31mred\\x07\\u202eback\u2192" in text and "\u200d" in text


def test_a_terminal_that_knows_ascii_only():
    text = drawn(Encoded((path("d\u00e9j\u00e0 vu"),)), ascii=True)
    assert text.isascii() and "\\xe9" in text and "assistant\\n" in text


@given(st.text(max_size=40))
def test_every_character_is_shown_or_named(answer):
    """With marks and names undone, what is drawn is what the tokens say."""
    encoded = Encoded((path(answer + "<|im_end|>", prompt="x"),))
    (root,) = pieces(encoded)
    look = preview_view.Look(TOKENIZER, plain=True, full=True)
    shown = "".join(text for stretch in root.stretches for text, _ in preview_view._words(look, stretch.ids))
    undone = shown.replace("\u21b5\n", "\n").replace("\u2192\t", "\t")
    named = re.sub(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[nrt])",
                   lambda m: m[0].encode().decode("unicode_escape"), undone)  # fmt: skip
    expected = "".join(TOKENIZER.decode(stretch.ids) for stretch in root.stretches)
    if "\\" not in answer and "\u21b5" not in answer and "\u2192" not in answer:
        assert named == expected


def test_long_texts_that_are_only_read_are_shortened_and_say_so():
    prompt = "hello world " * 400
    encoded = Encoded((path("Paris", prompt=prompt),))
    hidden = len(prompt) - preview_view.LONGEST_READ
    assert f"[... {hidden:,} characters that are only read; --full shows them ...]" in drawn(encoded)
    assert drawn(encoded, full=True).count("hello") == 400
    assert drawn(Encoded((path("hello world " * 400, prompt="x"),))).count("hello") == 400, "what is trained is whole"


def test_repeated_special_tokens_are_counted():
    encoded = Encoded((path("Paris", prompt="<pad>" * 300 + "x"),))
    assert "<pad> x300 x" in drawn(encoded) and drawn(encoded).count("<pad>") == 1
    assert drawn(encoded, full=True).count("<pad>") == 300


def test_colours():
    look = preview_view.Look(TOKENIZER)
    (root,) = pieces(Encoded((path("Paris<|im_end|>"),)))
    text = preview_view._text(look, root.stretches)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["Paris"] == "green" and styles["user\u21b5\nWhat is the capital of France?"] == "dim"
    assert styles["<|im_end|>"] == "magenta bold"
    assert "[[" not in text.plain


# Counters and lengths


def test_counters_say_what_became_of_every_row():
    tally = Tally(rows=10, items=7, truncated_rows=2, truncated_tokens=50, tokens=300, path_tokens=450, supervised=90)
    tally.bad = {"empty output": Bad(2, ["a:1", "a:4"]), "unknown role": Bad(1, ["a:7 (x)"])}
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(preview_counts.counters(DataReport({"mine": tally}, 7), 10))
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ["mine", "first", "10", "7", "3", "2", "7", "300", "90"]
    assert lines[2:] == [
        "mine: 2 rows dropped: empty output: a:1; a:4",
        "mine: 1 rows dropped: unknown role: a:7 (x)",
        "mine: 2 rows were cut to cutoff_len and lost 50 tokens (10.0%).",
        "Only the first 10 rows of each data set were read; --count 0 reads all.",
        "Of 450 tokens 90 are trained (20.0%); sharing beginnings saves 150 (33.3%).",
    ]


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=50))
def test_bins_hold_every_length(lengths):
    edges = preview_counts.bins(np.array(lengths))
    width = edges[1] - edges[0]
    assert 1 <= len(edges) - 1 <= preview_counts.BINS and edges == list(range(edges[0], edges[-1] + 1, width))
    assert edges[0] <= min(lengths) < edges[0] + width and edges[-2] <= max(lengths) < edges[-1]
    assert re.fullmatch("[125]0*", str(width))


def test_histogram():
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(preview_counts.histogram(np.array([3, 3, 5, 64]), 64, ascii_only=True))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "tokens of each of 4 examples (cutoff_len 64)"
    assert lines[1].split() == ["0-4", "2", "#" * 50] and lines[2].split() == ["5-9", "1", "#" * 25]
    assert lines[-2].split()[:2] == ["60-64", "1"]
    assert lines[-1] == "median 5, 90 % 64, 99 % 64, longest 64; 1 at cutoff_len."


def test_examples_of_each_set_in_turn():
    assert chosen(np.array([0, 0, 0, 1, 1]), 4) == [0, 3, 1, 4]
    assert chosen(np.array([0, 0, 0, 1]), 10) == [0, 3, 1, 2]
    assert chosen(np.array([], int), 3) == []


def test_the_command(model_folder, tmp_path, capsys):
    good = [{"instruction": f"q{i}", "output": "one two" * (i + 1)} for i in range(4)]
    first = write(tmp_path, "a.jsonl", [*good, {"instruction": "q", "output": 3}])
    second = write(tmp_path, "b.jsonl", [{"instruction": "other", "output": "yes"}])
    picture = tmp_path / "new" / "lengths.png"
    words = [f"dataset={first},{second}", "max_bad_rows=0.5", "--rows", "2", f"--plot={picture}"]
    assert preview(model_folder, tmp_path, *words) == 0
    out = capsys.readouterr().out
    shown = re.findall(r"^row (\d+)  (.*?):(\d+)", out, re.MULTILINE)
    assert shown == [("0", first, "1"), ("0", second, "1")]
    assert f"{first}: 1 rows dropped: " in out and "a.jsonl:5" in out and "tokens of each of 5 examples" in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and f"Drawn: {picture}" in out


def test_plot_goes_to_output_dir_and_wants_matplotlib(model_folder, tmp_path, capsys, monkeypatch):
    file = write(tmp_path, "a.jsonl", [{"instruction": "q", "output": "a"}])
    words = [f"dataset={file}", f"output_dir={tmp_path / 'out'}", "--plot"]
    assert preview(model_folder, tmp_path, *words) == 0
    assert (tmp_path / "out" / "lengths.png").stat().st_size > 1000
    monkeypatch.setattr(preview_counts.importlib.util, "find_spec", lambda name: None)
    with monkeypatch.context() as patch:
        patch.setattr("luthier.preview.rows_of", lambda *_: pytest.fail("encoded before it was asked"))
        assert preview(model_folder, tmp_path, *words) == 2
    assert "pip install luthier[plots]" in capsys.readouterr().err


def test_a_negative_number_of_rows(model_folder, tmp_path, capsys):
    assert preview(model_folder, tmp_path, "dataset=x", "--rows=-1") == 2
    assert "--rows -1" in capsys.readouterr().err


def test_the_legend_names_what_is_drawn():
    look = preview_view.Look(TOKENIZER, plain=True, column="score")
    text = preview_view.legend(look)
    assert isinstance(text, Text) and all(word in text.plain for word in ("[[trained]]", "0.5", "read only", "score"))


def test_a_streamed_set_is_shown_from_its_beginning(model_folder, tmp_path, capsys):
    file = write(tmp_path, "a.jsonl", [{"instruction": f"q{i}", "output": "a"} for i in range(5)])
    words = [f"dataset={file}", "streaming=true", "max_steps=3", "buffer_size=7", "--format", "jsonl", "--rows", "2"]
    assert preview(model_folder, tmp_path, *words) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["row"] for line in captured.out.splitlines()] == [0, 1]
    assert "buffer_size" not in captured.err
