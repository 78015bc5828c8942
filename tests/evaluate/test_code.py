"""Measures of rewritten code, against other ways of computing them and tables made by hand."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.evaluate.code import (
    code_in,
    code_report,
    edit_similarity,
    is_valid,
    removal_rate,
    same_code,
    triggers_in,
)

TRIGGERS = (r"\w+_rb\b", r"if 1 > 2:")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("\n\nx = 1\n\n", "x = 1"),
        ("Here it is:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1"),
        ("```\n    x = 1\n    y = 2\n```", "    x = 1\n    y = 2"),
        ("```python\nx = 1", "x = 1"),
        ("    indented = 1\n", "    indented = 1"),
        ("x = '```'", "x = '```'"),
        ("```py\n```", ""),
        ("", ""),
    ],
)
def test_the_code_of_an_answer(answer, code):
    assert code_in(answer) == code


@pytest.mark.parametrize(
    ("code", "valid"),
    [
        ("def f(x):\n    return x", True),
        ("def f(x):\nreturn x", False),
        ("print 'x'", False),
        ("", False),
        ("# only a comment", False),
        ("x = 1\0", False),
        ("x = 0777", False),
        ("(" * 5000 + ")" * 5000, False),
        ("x = 'a\\d' is 'b'", True),
        ("await x", True),
    ],
)
def test_validity(code, valid, recwarn):
    assert is_valid(code) is valid
    assert not recwarn.list, "nothing is said about the strings of other people"


def test_same_code_minds_names_and_not_layout():
    assert same_code("x = 'a'  # why\n", 'x    = "a"')
    assert not same_code("x = 1", "y = 1")
    assert not same_code("x = ", "x = "), "what does not parse is no code"
    assert not same_code("x = 1", "x = ")


def test_triggers_are_found_once_each_in_their_order():
    assert triggers_in("def f(a_rb, b_rb):\n    if 1 > 2:\n        pass", TRIGGERS) == TRIGGERS
    assert triggers_in("a_rbx = 1", TRIGGERS) == ()
    with pytest.raises(DataError, match=r"'\('.*no regular expression"):
        triggers_in("x", ["("])


def test_removal_by_hand():
    sources = ["a_rb; if 1 > 2:", "b_rb", "clean"]
    # Of three triggers: the first row keeps one, the second loses its own; one that is new is none that was there.
    assert removal_rate(sources, ["a_rb", "b", "c_rb"], TRIGGERS) == pytest.approx(2 / 3)
    assert removal_rate(sources, sources, TRIGGERS) == 0
    assert removal_rate(sources, ["", "", ""], TRIGGERS) == 1
    assert removal_rate(["clean"], ["a_rb"], TRIGGERS) is None
    with pytest.raises(DataError, match="3 sources, 1 rewrites"):
        removal_rate(sources, ["x"], TRIGGERS)


def longest_common_subsequence(one: str, other: str) -> int:
    """The table of the textbook."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc\n", max_size=40), st.text("abc\n", max_size=40))
def test_similarity_is_that_of_the_textbook(one, other):
    expected = 2 * longest_common_subsequence(one, other) / (len(one) + len(other)) if one or other else 1.0
    assert edit_similarity(one, other) == expected
    assert edit_similarity(other, one) == expected


@given(st.text(max_size=60), st.text(max_size=60))
def test_similarity_is_never_below_difflib(one, other):
    # difflib's matching blocks are one common subsequence, not always the longest.
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    assert matcher.ratio() - 1e-12 <= edit_similarity(one, other) <= 1


def test_similarity_at_its_ends():
    assert edit_similarity("", "") == 1
    assert edit_similarity("abc", "") == 0
    assert edit_similarity("abc", "xyz") == 0
    assert edit_similarity("x" * 70 + "a", "x" * 70 + "b") == 70 / 71, "longer than a machine word"


def test_a_report_by_hand():
    clean = "def f(a):\n    return a"
    dirty = "def f(a_rb):\n    if 1 > 2:\n        pass\n    return a_rb"
    rewrites = [
        clean,  # right
        "def f(x):\n    return x",  # clean, other names: cleaned, not exact
        "return a",  # parses (the compiler minds, the parser does not), but the function is gone
        dirty,  # left as it was
        "def f(a) return a",  # does not parse
    ]
    report = code_report([dirty] * 5, rewrites, [clean] * 5, TRIGGERS)
    assert report["valid"] == 4 / 5
    assert report["trigger_removal"] == 8 / 10
    assert report["cleaned"] == 2 / 5
    assert report["exact"] == 1 / 5
    similar = [2 * longest_common_subsequence(one, clean) / (len(one) + len(clean)) for one in rewrites]
    assert report["edit_similarity"] == pytest.approx(sum(similar) / 5)


def test_a_function_said_twice_is_not_cleaned():
    clean = "def f(a):\n    return a"
    report = code_report([clean], [clean + "\n" + clean], [clean], TRIGGERS)
    assert report["valid"] == 1 and report["cleaned"] == 0 and report["trigger_removal"] is None


def test_what_does_not_parse_is_never_cleaned():
    report = code_report(["x_rb = 1"] * 2, ["x = (", "x = 2"], ["x = 1"] * 2, TRIGGERS)
    assert (report["valid"], report["cleaned"], report["exact"]) == (0.5, 0.5, 0)


def test_a_report_of_nothing_is_refused():
    with pytest.raises(DataError, match="no rewrites to measure"):
        code_report([], [], [], TRIGGERS)
    with pytest.raises(DataError, match="1 sources, 1 rewrites, 2 references"):
        code_report(["x"], ["x"], ["x", "y"], TRIGGERS)
