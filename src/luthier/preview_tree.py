"""An encoded example as pieces for people: a trunk shown once, where branches leave it, and what each token is for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from luthier.core.tree import Tree, grow_paths
from luthier.core.types import ASIDE, Encoded, Path

END_OF_TURN = "end-of-turn"
"""Paths named so are the learnt end of an earlier turn: one token beside the conversation, which goes on."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens that mean the same to training."""

    ids: list[int]
    weight: float
    """0: read only. Where the paths through a token differ, the largest weight."""
    shares: tuple[int, int] = (1, 1)
    """In how many of the paths through these tokens they are trained, and how many paths those are."""
    value: float | None = None
    """What a per-token column says of this one token."""


@dataclass
class Piece:
    """Tokens without a fork, what ends with them, and what follows."""

    stretches: list[Stretch]
    names: list[str]
    """Names of the answers that run through here."""
    ends: list[Path]
    """The paths whose last token is here."""
    tokens: int
    """Tokens of this piece alone."""
    children: list[Piece] = field(default_factory=list)

    @property
    def is_twig(self) -> bool:
        """Whether this is no answer of its own, but the learnt end of an earlier turn."""
        return not self.children and all(map(is_end_of_turn, self.ends))

    @property
    def leaves(self) -> int:
        """Answers that end below, in branches of their own."""
        if not self.children:
            return 0 if self.is_twig else 1
        return sum(child.leaves for child in self.children)

    @property
    def branches(self) -> list[Piece]:
        """What follows, without twigs."""
        return [child for child in self.children if not child.is_twig]


def run_of(piece: Piece) -> list[Piece]:
    """A piece and those after it up to the next fork into answers; twigs on the way are no fork."""
    run = [piece]
    while len(run[-1].branches) == 1:
        run.append(run[-1].branches[0])
    return run


def is_end_of_turn(path: Path) -> bool:
    """Whether a path is the learnt end of an earlier turn, beside a conversation that goes on."""
    return path.name.startswith(END_OF_TURN)


def is_aside(path: Path) -> bool:
    """Whether a path is only surveyed, before a step."""
    return path.name.startswith(ASIDE)


def pieces(encoded: Encoded, column: str | None = None) -> list[Piece]:
    """The roots of an example; one, unless its paths begin differently. column: per-token values to carry along."""
    tree, nodes = grow_paths(encoded.paths)
    told = _Told(tree, nodes, encoded.paths, column)
    starts = _starts(tree, [int(at[-1]) for at in nodes])
    stops = [*starts[1:], len(tree)]
    made: dict[int, Piece] = {}
    roots: list[Piece] = []
    for start, stop in zip(starts, stops):
        piece = Piece(
            list(told.stretches(start, stop)),
            [encoded.paths[p].name for p in told.through[start] if not is_end_of_turn(encoded.paths[p])],
            [path for path, at in zip(encoded.paths, nodes) if at[-1] == stop - 1],
            stop - start,
        )
        made[stop - 1] = piece
        above = int(tree.parent[start])
        (roots if above < 0 else made[above].children).append(piece)
    return roots


class _Told:
    """What is known of each token of the tree over the paths that run through it."""

    def __init__(self, tree: Tree, nodes: Sequence[np.ndarray], paths: Sequence[Path], column: str | None):
        self.tree = tree
        self.answers = {p for p, path in enumerate(paths) if not is_end_of_turn(path) and not is_aside(path)}
        self.through: list[list[int]] = [[] for _ in range(len(tree))]
        self.weights: list[list[float]] = [[] for _ in range(len(tree))]
        self.values: list[float | None] = [None] * len(tree)
        for p, (path, at) in enumerate(zip(paths, nodes)):
            values = path.columns.get(column, []) if column else []
            for i, node in enumerate(at.tolist()):
                self.through[node].append(p)
                # The first token of a path is predicted from nothing: its weight never counts.
                self.weights[node].append(path.weights[i] if i else 0.0)
                if i < len(values) and not math.isnan(values[i]):
                    self.values[node] = values[i]

    def stretches(self, start: int, stop: int) -> Iterator[Stretch]:
        """Tokens start .. stop - 1 of the tree, those of one kind together; one with a value stands alone."""
        while start < stop:
            kind, last = self._kind(start), start + 1
            while last < stop and self.values[start] is None and self._kind(last) == kind:
                last += 1
            weight, shares, value = kind
            yield Stretch(self.tree.ids[start:last].tolist(), weight, shares, value)
            start = last

    def _kind(self, node: int) -> tuple[float, tuple[int, int], float | None]:
        weights = self.weights[node]
        # Learnt ends of turns and what is only surveyed run through here, and that is no choice.
        answers = [weight for weight, p in zip(weights, self.through[node]) if p in self.answers]
        trained = sum(1 for weight in answers if weight)
        shares = (trained, len(answers)) if 0 < trained < len(answers) else (1, 1)
        return max(weights), shares, self.values[node]


def _starts(tree: Tree, last: Sequence[int]) -> list[int]:
    """Where pieces begin: at roots, after forks, and after tokens that end a path."""
    index = np.arange(len(tree))
    children = np.bincount(tree.parent[tree.parent >= 0], minlength=len(tree))
    begins = tree.parent != index - 1
    begins[1:] |= children[:-1] != 1
    begins[1:] |= np.isin(index[:-1], np.asarray(last))
    begins[:1] = True
    return np.flatnonzero(begins).tolist()
