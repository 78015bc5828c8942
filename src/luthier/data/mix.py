"""Which rows of which sets a run sees, and in what order. Only indices: nothing is read or copied here.

Orders agree with `datasets` (`interleave_datasets`, `train_test_split`) for the same seed, as LLaMA-Factory uses them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from luthier.core.errors import ConfigError, DataError

Pairs = np.ndarray
"""int64 [N, 2]: (which set, which of its rows)."""


def select(rows: int, *, max_samples: int | None, num_samples: int | None, seed: int) -> np.ndarray:
    """The rows of one set that are used, int64: `num_samples` drawn at random, then the first `max_samples` of them.

    Asking for more rows than there are brings every row once and draws the rest again.
    """
    chosen = np.arange(rows)
    if num_samples is not None:
        rng = np.random.default_rng(seed)
        chosen = rng.permutation(rows)[:num_samples]
        chosen = np.concatenate([chosen, rng.choice(rows, max(num_samples - rows, 0))])
    return chosen[:max_samples]


def mix(
    lengths: Sequence[int],
    strategy: str,
    *,
    probabilities: Sequence[float] | None = None,
    weights: Sequence[float | None] = (),
    seed: int,
) -> Pairs:
    """Order of all rows. Weights (None: 1) say how often each row comes when concatenating; when interleaving, how
    often each set is drawn, unless `probabilities` say so."""
    weighted = any(weight is not None for weight in weights)
    plain = [1.0 if weight is None else weight for weight in weights] or [1.0] * len(lengths)
    if strategy == "concat":
        parts = [_repeat(length, weight, seed + nth) for nth, (length, weight) in enumerate(zip(lengths, plain))]
        return _pairs(np.repeat(np.arange(len(parts)), [len(part) for part in parts]), np.concatenate(parts))
    if probabilities is not None and weighted:
        raise ConfigError("interleave_probs and a weight in dataset say the same thing twice; keep one of them.")
    if weighted:
        probabilities = [weight / sum(plain) for weight in plain]
    if probabilities is None:
        return CYCLES[strategy](np.asarray(lengths))
    if len(probabilities) != len(lengths):
        raise ConfigError(
            f"interleave_probs: {len(probabilities)} numbers for {len(lengths)} data sets; give one for each."
        )
    return _draw(np.asarray(lengths), np.asarray(probabilities, np.float64), strategy, seed)


def split(pairs: Pairs, val_size: float, seed: int) -> tuple[Pairs, Pairs]:
    """(train, validation), both shuffled. `val_size`: a share below 1, or a number of rows."""
    held = math.ceil(val_size * len(pairs)) if val_size < 1 else int(val_size)
    if held >= len(pairs):
        raise DataError(
            f"val_size: {val_size:g} would hold out {held} of {len(pairs)} rows and leave nothing to train on. "
            "Give a smaller number, or a share such as 0.1."
        )
    order = np.random.default_rng(seed).permutation(len(pairs))
    return pairs[order[held:]], pairs[order[:held]]


def _pairs(which: np.ndarray, row: np.ndarray) -> Pairs:
    return np.stack([which, row], axis=1).astype(np.int64)


def _repeat(length: int, weight: float, seed: int) -> np.ndarray:
    """Each row floor(weight) times, and a random share of the rows once more."""
    whole = int(weight)
    extra = round(length * (weight - whole))
    drawn = np.sort(np.random.default_rng(seed).permutation(length)[:extra])
    return np.concatenate([np.tile(np.arange(length), whole), drawn])


def _cycle_under(lengths: np.ndarray) -> Pairs:
    rounds = int(lengths.min())
    return _pairs(np.tile(np.arange(len(lengths)), rounds), np.repeat(np.arange(rounds), len(lengths)))


def _cycle_over(lengths: np.ndarray) -> Pairs:
    rounds = int(lengths.max())
    rows = np.arange(rounds)[:, None] % lengths[None, :]
    return _pairs(np.tile(np.arange(len(lengths)), rounds), rows.reshape(-1))


def _cycle_once(lengths: np.ndarray) -> Pairs:
    pairs = _cycle_under(np.full(len(lengths), lengths.max()))
    return pairs[pairs[:, 1] < lengths[pairs[:, 0]]]


CYCLES: dict[str, Callable[[np.ndarray], Pairs]] = {
    "interleave_under": _cycle_under,
    "interleave_over": _cycle_over,
    "interleave_once": _cycle_once,
}


def _draw(lengths: np.ndarray, probabilities: np.ndarray, strategy: str, seed: int) -> Pairs:
    """Sets drawn at random until any (under) or every one (over, once) is exhausted."""
    drawable = probabilities > 0
    if strategy != "interleave_under" and not drawable.all():
        raise ConfigError(
            f"interleave_probs: a set with probability 0 is never exhausted, as {strategy} wants it to be."
        )
    # Numbers such as 0.3333333 add up to 1 well enough for a user, and not for numpy.
    probabilities = probabilities / probabilities.sum()
    rng = np.random.default_rng(seed)
    blocks, counts = [], np.zeros(len(lengths), np.int64)
    done = np.any if strategy == "interleave_under" else np.all
    while not done(counts[drawable] >= lengths[drawable]):
        # Blocks of 1000, as `datasets` draws them, so that the same seed gives the same order.
        blocks.append(rng.choice(len(lengths), size=1000, p=probabilities))
        counts += np.bincount(blocks[-1], minlength=len(lengths))
    draws = np.concatenate([np.zeros(0, np.int64), *blocks])
    nth = np.empty(len(draws), np.int64)
    last = np.full(len(lengths), len(draws))
    for which, length in enumerate(lengths):
        places = np.flatnonzero(draws == which)
        nth[places] = np.arange(len(places))
        if len(places) >= length:
            last[which] = places[length - 1]
    stop = (last.min() if strategy == "interleave_under" else last.max()) + 1
    pairs = _pairs(draws, nth)[:stop]
    if strategy == "interleave_once":
        return pairs[pairs[:, 1] < lengths[pairs[:, 0]]]
    pairs[:, 1] %= lengths[pairs[:, 0]]
    return pairs
