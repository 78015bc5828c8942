"""Bars pass on what they count, whether anybody is watching or not."""

from __future__ import annotations

import sys

import pytest

from luthier.data.bar import bar, batch_bar


class Terminal:
    """A stderr that somebody watches."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass


@pytest.mark.parametrize(("rank", "shows"), [("0", True), ("1", False)])
def test_one_process_shows_a_bar_on_a_terminal(monkeypatch, rank, shows):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TERM", "xterm")
    assert list(bar("abc", "Counting letters", 3, lambda letter: 1)) == ["a", "b", "c"]
    assert list(batch_bar(range(0, 10, 4), "Counting batches")) == [0, 4, 8]
    assert ("Counting letters" in terminal.text) == shows
    assert ("10/10" in terminal.text) == shows, "the last batch is smaller"


def test_nothing_is_shown_where_nobody_watches(capsys):
    assert list(bar("abc", "Counting letters", 3, lambda letter: 1)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""
