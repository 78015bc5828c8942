"""Rewritten Python code: does it parse, are the triggers gone, how near is it to the clean code?

Nothing here runs the code.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Sequence

from luthier.core.errors import DataError

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def code_in(answer: str) -> str:
    """The code of an answer: what its first fence (```) holds, or all of it; without blank lines around."""
    fenced = _FENCE.search(answer)
    return (fenced[1] if fenced else answer).strip("\n").rstrip()


def is_valid(code: str) -> bool:
    """Whether Python can parse it and it holds a statement; nothing is run."""
    tree = _parsed(code)
    return tree is not None and bool(tree.body)


def same_code(one: str, other: str) -> bool:
    """Whether both parse to the same syntax tree: layout, comments and quotes do not count, names do."""
    trees = _parsed(one), _parsed(other)
    return None not in trees and ast.dump(trees[0]) == ast.dump(trees[1])


def triggers_in(text: str, triggers: Sequence[str]) -> tuple[str, ...]:
    """Those of the regular expressions that match somewhere in the text. Raises DataError for a broken one."""
    return tuple(trigger for trigger in triggers if _search(trigger, text))


def removal_rate(sources: Sequence[str], rewrites: Sequence[str], triggers: Sequence[str]) -> float | None:
    """Share of the triggers found in the sources that their rewrites do not have; None if there were none.

    Each trigger counts once per text. An empty rewrite has no triggers: read this beside validity and similarity.
    """
    _same_length(sources=sources, rewrites=rewrites)
    left = [
        trigger in triggers_in(rewrite, triggers)
        for source, rewrite in zip(sources, rewrites)
        for trigger in triggers_in(source, triggers)
    ]
    return 1 - sum(left) / len(left) if left else None


def edit_similarity(one: str, other: str) -> float:
    """2 LCS / (length + length), in 0..1: 1 for equal texts, 0 for texts that share no character.

    LCS is the longest common subsequence of characters. This is the "edit similarity" (`fuzz.ratio`) of CodeXGLUE's
    and RepoBench's completion tasks: 1 - (insertions + deletions) / (length + length).
    """
    if not one and not other:
        return 1.0
    return 2 * _common(one, other) / (len(one) + len(other))


def code_report(
    sources: Sequence[str], rewrites: Sequence[str], references: Sequence[str], triggers: Sequence[str]
) -> dict[str, float | None]:
    """How well code was cleaned; one rewrite and one clean reference per source. Means over all rows.

    valid: rewrites that parse; trigger_removal: see `removal_rate`; cleaned: rewrites that parse, have no trigger, and
    define exactly the functions and classes of the reference; edit_similarity: to the reference; exact: rewrites whose
    syntax tree is the reference's. Raises DataError if there are no rows, or not as many of each.
    """
    _same_length(sources=sources, rewrites=rewrites, references=references)
    if not sources:
        raise DataError("there are no rewrites to measure; give at least one row.")
    count = len(sources)
    pairs = list(zip(rewrites, references))
    return {
        "valid": sum(is_valid(rewrite) for rewrite in rewrites) / count,
        "trigger_removal": removal_rate(sources, rewrites, triggers),
        "cleaned": sum(_is_cleaned(rewrite, reference, triggers) for rewrite, reference in pairs) / count,
        "edit_similarity": sum(edit_similarity(rewrite, reference) for rewrite, reference in pairs) / count,
        "exact": sum(same_code(rewrite, reference) for rewrite, reference in pairs) / count,
    }


def _is_cleaned(rewrite: str, reference: str, triggers: Sequence[str]) -> bool:
    if not is_valid(rewrite) or triggers_in(rewrite, triggers):
        return False
    return _defined(rewrite) == _defined(reference)


def _defined(code: str) -> Counter[str]:
    """Names of the functions and classes that stand at the top."""
    tree = _parsed(code)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return Counter(node.name for node in tree.body if isinstance(node, kinds)) if tree else Counter()


def _parsed(code: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Python thinks of the strings in there is no news to the user
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # Besides bad syntax: null bytes, and nesting deeper than the parser goes.
            return None


def _search(trigger: str, text: str) -> bool:
    try:
        return re.search(trigger, text) is not None
    except re.error as error:
        raise DataError(
            f"the trigger {trigger!r} is no regular expression: {error}. Put a backslash before special characters."
        ) from None


def _common(one: str, other: str) -> int:
    """Length of the longest common subsequence, a row of the table at a time as bits of one integer (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, char in enumerate(one):
        places[char] = places.get(char, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every
    for char in other:
        hit = row & places.get(char, 0)
        row = ((row + hit) | (row - hit)) & every
    return len(one) - row.bit_count()


def _same_length(**lists: Sequence[str]) -> None:
    if len({len(texts) for texts in lists.values()}) > 1:
        counts = ", ".join(f"{len(texts)} {name}" for name, texts in lists.items())
        raise DataError(f"there are {counts}; one of each belongs to a row.")
