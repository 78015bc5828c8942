"""The final answer in a text, and whether two texts come to the same one."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"(?:(?<![\w)])-)?\d+(?:,\d{3})*(?:\.\d+)?")
BOXED = r"\boxed{"


def final_answer(text: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """What a text comes to, in a form that can be compared; None if it comes to nothing.

    pattern: its last match is the answer, or its first group where it has groups. Without one: the contents of the
    last \\boxed{...}, else the last number.
    """
    if pattern is not None:
        found = list(pattern.finditer(text))
        return _plain(found[-1][1 if pattern.groups else 0] or "") if found else None
    boxed = _boxed(text)
    if boxed is not None:
        return _plain(boxed)
    numbers = NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def meets(reference: str, pattern: re.Pattern[str] | None = None) -> Callable[[str], bool]:
    """Whether a text comes to what a reference answer comes to.

    A reference that is bare words is looked for: `Paris` is met by any text that has it as a word.
    """
    final = final_answer(reference, pattern) or final_answer(reference)
    if final is None and pattern is None:
        words = re.compile(rf"(?<!\w){re.escape(_folded(reference))}(?!\w)")
        return lambda text: words.search(_folded(text)) is not None
    wanted = _plain(reference) if final is None else final
    return lambda text: final_answer(text, pattern) == wanted


def stays_right(
    reference: str | None, own: str, pattern: re.Pattern[str] | None = None
) -> Callable[[str], bool] | None:
    """Whether an answer is as right as `own`, the target's; None where nothing says what right is.

    Where the target itself misses the reference, its own final answer counts as well: nothing was lost by saying it.
    """
    met = None if reference is None else meets(reference, pattern)
    if met is not None and met(own):
        return met
    final = final_answer(own, pattern)
    if final is None:
        return met
    return lambda text: final_answer(text, pattern) == final or (met is not None and met(text))


def _boxed(text: str) -> str | None:
    start = text.rfind(BOXED)
    if start < 0:
        return None
    start += len(BOXED)
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def _plain(answer: str) -> str:
    """7, 7.0 and $7.00 alike; other answers without case and outer punctuation."""
    text = _folded(answer).strip(" .$")
    try:
        number = Decimal(text.replace(",", "").replace("$", "").removesuffix("%").strip())
    except InvalidOperation:
        return text
    return f"{number.normalize():f}" if number.is_finite() else text


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
