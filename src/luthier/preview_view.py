"""Examples on a terminal: what is trained and how much it weighs, special tokens, line breaks, a trunk shown once.

With colours, what is trained is green and what is only read is dim. Without (in a pipe, or with NO_COLOR), what is
trained stands in [[ ]]. A weight other than 1 is a number in both.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text
from rich.tree import Tree

from luthier.core.types import Encoded, Path
from luthier.preview_tree import Piece, Stretch, is_aside, pieces, run_of

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

READ, TRAINED, WEIGHED, SPECIAL, FRAME = "dim", "green", "yellow", "magenta", "cyan"
LONGEST_READ = 2000
"""Characters of a text that is only read; longer ones are shortened in their middle."""
REPEATED = 4
"""So many equal special tokens in a row, such as the places of an image, are shown as one and counted."""
DEEP = 3
"""So many forks are shown one inside the other."""
NAMED = 4
"""So many answers are named where they part; more are counted."""
JOINERS = ("\u200c", "\u200d")
"""Invisible characters that make words of some scripts, and emoji."""
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that a terminal might act upon, or not show."""


@dataclass(frozen=True)
class Look:
    """How examples are drawn."""

    tokenizer: Any
    plain: bool = False
    """No colours: marks say what is trained."""
    ascii: bool = False
    """The terminal knows no other characters."""
    full: bool = False
    """Nothing is shortened."""
    images: tuple[int, ...] = ()
    """Tokens that stand for images; those of an image that follow each other are shown as one and counted."""
    column: str | None = None
    """The per-token value that the stage learns, if it does."""
    word: str = "trained"
    """What the stage does to tokens that carry a weight."""

    @classmethod
    def of(cls, console: Console, tokenizer: Any, **facts: Any) -> Look:
        """What a console can show."""
        return cls(tokenizer, plain=console.color_system is None, ascii=console.options.ascii_only, **facts)

    @cached_property
    def specials(self) -> frozenset[int]:
        """Tokens that are marks and no text."""
        return frozenset((*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder))


def example(look: Look, row: int, encoded: Encoded, origin: str) -> RenderableType:
    """One example: its figures, then its text. Two branches stand below each other, more of them as a tree."""
    look = replace(look, images=tuple(encoded.extra.get("media", {}).get("ids", ())))
    roots = pieces(encoded, look.column)
    head = _head(row, encoded, origin, roots)
    if sum(root.leaves for root in roots) <= 2:
        return Group(head, *(text for root in roots for text in _lines(look, root)))
    tree = Tree(head, guide_style=FRAME)
    for root in roots:
        _grow(look, tree, root, depth=0)
    return tree


def legend(look: Look) -> Text:
    """What colours and marks mean."""
    text = Text()
    mark = ("[[", "]]") if look.plain else ("", "")
    parts = [
        (f"{mark[0]}{look.word}{mark[1]}", TRAINED),
        (f"{mark[0]}0.5:another weight than 1{mark[1]}", WEIGHED),
        ("read only", READ),
        ("<special token>", SPECIAL),
        (f"{_break(look)} line break", READ),
    ]
    if look.column:
        parts.insert(1, (f"token=0.5 its {look.column}", WEIGHED))
    for words, style in parts:
        text.append(words, style=style)
        text.append("   ")
    return text


def _head(row: int, encoded: Encoded, origin: str, roots: Sequence[Piece]) -> Text:
    total, alone = sum(len(path.ids) for path in encoded.paths), _tokens(roots)
    text = Text(f"row {row}  ", style="bold")
    text.append(f"{origin}  ", style="bold blue")
    text.append(f"{alone:,} tokens")
    if total > alone:
        text.append(f" for {total:,}: {len(encoded.paths)} answers share {total - alone:,}", style="cyan")
    if encoded.truncated:
        text.append(f", {encoded.truncated:,} cut away", style="red")
    return text


def _tokens(roots: Sequence[Piece]) -> int:
    return sum(piece.tokens + _tokens(piece.children) for piece in roots)


def _lines(look: Look, piece: Piece) -> Iterator[Text]:
    """A piece and what follows, top to bottom."""
    run = run_of(piece)
    yield _title(look, run)
    yield _written(look, run)
    for branch in run[-1].branches:
        yield from _lines(look, branch)


def _grow(look: Look, tree: Tree, piece: Piece, *, depth: int) -> None:
    """Add a piece, and below it what follows; far to the right, a trunk past its branches goes straight on."""
    run = run_of(piece)
    node = tree.add(Group(_title(look, run), _written(look, run)))
    going = [branch for branch in run[-1].branches if branch.branches]
    trunk = going[0] if len(going) == 1 and depth >= DEEP else None
    for branch in run[-1].branches:
        if branch is not trunk:
            _grow(look, node, branch, depth=depth + 1)
    if trunk is not None:
        _grow(look, tree, trunk, depth=depth)


def _title(look: Look, run: Sequence[Piece]) -> Text:
    """The answers that end in a run; or how many share it."""
    if run[-1].branches:
        names = list(dict.fromkeys(run[0].names))
        who = ", ".join(names) if len(names) <= NAMED else f"{len(run[0].names)} answers"
        return Text(f"shared by {who}: {sum(piece.tokens for piece in run):,} tokens", style=FRAME)
    return Text("; ".join(_about(look, path) for path in run[-1].ends), style=FRAME)


def _written(look: Look, run: Sequence[Piece]) -> Text:
    """The text of a run, with twigs and shorter answers noted where they end."""
    text = Text()
    for piece in run:
        text.append_text(_text(look, piece.stretches))
        for path in piece.ends if piece.branches else ():
            text.append(f" {_arrow(look)} {_about(look, path)} ", style=FRAME)
        for twig in (child for child in piece.children if child.is_twig):
            text.append(f" {_arrow(look)} ", style=FRAME)
            text.append_text(_text(look, twig.stretches))
            text.append(f" {twig.ends[0].name} ", style=FRAME)
    if text.plain.endswith("\n"):
        text.right_crop()
    return text


def _arrow(look: Look) -> str:
    return "<-" if look.ascii else "\u2190"


def _about(look: Look, path: Path) -> str:
    """A path in words."""
    weighed = sum(1 for weight in path.weights[1:] if weight)
    words = f"{path.name}: {len(path.ids):,} tokens, {weighed:,} {look.word}"
    if path.score == path.score:
        words += f", score {path.score:g}"
    if path.block is not None:
        words += f", the last {len(path.ids) - path.block:,} see one another"
    return words + (", asked about only" if is_aside(path) else "")


def _text(look: Look, stretches: Sequence[Stretch]) -> Text:
    text = Text()
    for stretch in stretches:
        style = READ if not stretch.weight else TRAINED if stretch.weight == 1 else WEIGHED
        if look.plain and stretch.weight:
            text.append("[[")
        if stretch.weight not in (0, 1):
            text.append(f"{stretch.weight:g}:", style=f"bold {style}")
        if stretch.shares != (1, 1):
            text.append(f"{stretch.shares[0]} of {stretch.shares[1]}:", style=f"bold {style}")
        for piece, special in _words(look, stretch.ids):
            shown = piece if special else _shorten(look, piece, stretch.weight)
            text.append(shown, style=f"{SPECIAL} {'bold' if stretch.weight else 'dim'}" if special else style)
        if stretch.value is not None:
            text.append(f"={stretch.value:g}", style=f"bold {WEIGHED}")
        if look.plain and stretch.weight:
            text.append("]]")
    return text


def _words(look: Look, ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a special token): ordinary tokens decoded together, special ones each on its own."""
    for special, group in itertools.groupby(ids, look.specials.__contains__):
        if not special:
            yield _visible(look, look.tokenizer.decode(list(group), skip_special_tokens=False)), False
            continue
        for token, repeated in itertools.groupby(group):
            count = len(list(repeated))
            if token in look.images and not look.full:
                yield f"[image: {count:,} tokens]", True
                continue
            name = _visible(look, str(look.tokenizer.convert_ids_to_tokens(token)))
            shown = 1 if count >= REPEATED and not look.full else count
            yield from [(name, True)] * shown
            if shown < count:
                yield f" x{count:,} ", True


def _visible(look: Look, text: str) -> str:
    """Line breaks with a mark, and nothing that a terminal would act upon."""
    return "".join(_character(look, character) for character in text)


def _character(look: Look, character: str) -> str:
    if character == "\n":
        return f"{_break(look)}\n"
    if character == "\t":
        return "\\t" if look.ascii else "\u2192\t"
    if unicodedata.category(character) in INVISIBLE and character not in JOINERS:
        return character.encode("unicode_escape").decode("ascii")
    return character.encode("ascii", "backslashreplace").decode("ascii") if look.ascii else character


def _break(look: Look) -> str:
    return "\\n" if look.ascii else "\u21b5"


def _shorten(look: Look, text: str, weight: float) -> str:
    if look.full or weight or len(text) <= LONGEST_READ:
        return text
    half = LONGEST_READ // 2
    hidden = f"[... {len(text) - 2 * half:,} characters that are only read; --full shows them ...]"
    return f"{text[:half]}\n{hidden}\n{text[-half:]}"
