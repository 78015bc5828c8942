"""The shape of the code: what a file is called, how long it may be, and what never stands in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
LINES = 400
"""A file that grows longer wants to be two."""

TEXT = {"", ".py", ".md", ".yaml", ".json", ".jsonl", ".txt", ".toml", ".sh"}
VAGUE = {"utils", "util", "common", "helpers", "helper", "misc", "shared", "stuff"}
FORBIDDEN_IN_SOURCE = {
    "pickle": re.compile(r"\b(import|from) pickle\b|\bpickle\.(load|dump)s?\("),
    "torch.load": re.compile(r"\btorch\.load\("),
    "hasattr": re.compile(r"\bhasattr\("),
}
UNPICKLES = {"11: pickle"}
"""model/parts.py reads the table of contents of FSDP's own format, by an unpickler that knows its classes alone."""
FORBIDDEN_EVERYWHERE = {
    "a path of somebody's machine": re.compile(r"(?<![\w./])/(?:home|root|Users|work)/\w"),
    "a package index": re.compile(r"https?://[\w.-]*(?:pypi|pythonhosted)\.|index-url[= ]\S*//"),
}


def tracked() -> list[Path]:
    """Text files under version control; all files where there is no git."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listing.stdout.split("\0") if listing.returncode == 0 else []
    files = [ROOT / n for n in names if n] or SOURCES
    return [f for f in files if f.is_file() and f.suffix in TEXT]


def hits(patterns: dict[str, re.Pattern[str]], text: str) -> list[str]:
    """What a text holds that it must not, with line numbers."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{line}: {what}" for line, held in lines for what, pattern in patterns.items() if pattern.search(held)]


def test_there_are_sources():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT / "src")))
def test_a_source_file(file):
    text = file.read_text()
    spoken = file.parent.name in {"templates", "tool_formats", "data"}
    assert text.isascii() or spoken, "ASCII only, but for the words of a template"
    assert len(text.splitlines()) <= LINES
    assert not VAGUE & set(re.split(r"[_.]", file.stem)), "a module is named for what it holds"
    allowed = UNPICKLES if file.relative_to(ROOT) == Path("src/luthier/model/parts.py") else set()
    assert [hit for hit in hits(FORBIDDEN_IN_SOURCE, text) if hit not in allowed] == []


def test_no_tracked_file_names_a_machine():
    files = [file for file in tracked() if file != Path(__file__).resolve()]
    found = {str(file.relative_to(ROOT)): hits(FORBIDDEN_EVERYWHERE, file.read_text()) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (FORBIDDEN_IN_SOURCE, "from pickle import load"),
        (FORBIDDEN_IN_SOURCE, "state = torch.load(file)"),
        (FORBIDDEN_IN_SOURCE, "if hasattr(model, 'x'):"),
        (FORBIDDEN_EVERYWHERE, "see /" + "home/ann/notes"),
        (FORBIDDEN_EVERYWHERE, "pip install --index-url=" + "https://somewhere/simple"),
    ],
)
def test_the_patterns_see_what_they_look_for(patterns, text):
    assert len(hits(patterns, text)) == 1
