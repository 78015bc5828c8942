"""From encoded examples to the rows a run trains on: packed or not, in a layout that was checked on the first batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch

from luthier.core.batch import Batch
from luthier.core.errors import ModelError, TrainingError
from luthier.core.log import get_logger
from luthier.core.types import Encoded
from luthier.data.layout import collate
from luthier.data.plan import Choice, choose_layout, pack
from luthier.data.processor_template import MEDIA
from luthier.model.policy import PolicySetup
from luthier.model.verify import MOST_TOKENS, Verdict, verify
from luthier.train.sampler import Bundles, Collator, Complete

log = get_logger("train")


class Examples(Protocol):
    """What `data.encode.EncodedSet` offers here."""

    tree_tokens: np.ndarray
    path_tokens: np.ndarray
    longest: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Encoded, str]: ...


@dataclass(frozen=True)
class Rows:
    """Training rows and how to lay them out."""

    train: Bundles
    collator: Collator
    layout: str


def bundle(examples: Examples, *, packing: bool, cutoff_len: int, complete: Complete | None = None) -> Bundles:
    """One example a row, or with packing as many as fit `cutoff_len` tokens."""
    bundles = pack(examples.tree_tokens.tolist(), cutoff_len) if packing else None
    return Bundles(examples, bundles, complete, examples.tree_tokens)


def choose(train: Bundles, wish: str, batch_size: int, *, noisy: bool = False) -> Choice:
    """The layout for these rows. noisy: NEFTune scales its noise by a row's length, so rows hold one sequence each."""
    examples: Examples = train.examples  # type: ignore[assignment]
    return choose_layout(
        "padded" if noisy and wish == "auto" else wish,
        tree_tokens=examples.tree_tokens,
        path_tokens=examples.path_tokens,
        longest=examples.longest,
        answers=examples.answers,
        bundles=train.bundles if train.bundles is not None else [[i] for i in range(len(examples))],
        batch_size=batch_size,
    )


def lay_out(
    train: Bundles,
    setup: PolicySetup,
    *,
    wish: str,
    batch_size: int,
    pad_id: int,
    columns: Sequence[str] = (),
    noisy: bool = False,
    check: bool = True,
    lay: Callable[..., Batch] = collate,
) -> Rows:
    """Choose the layout and let the first batch verify it against the plain computation.

    lay: what lays examples out as a Batch.

    noisy: see `choose`. check: the first-batch check; a layout that fails it gives way to `padded`, loudly; `padded`
    failing it is an error.
    """
    choice = choose(train, wish, batch_size, noisy=noisy)
    log.info(choice.reason())
    layout = choice.layout
    first = [item for bundle in _telling(train, batch_size) for item in bundle]
    if lay is not collate and not any(MEDIA in encoded.extra for encoded, _ in first):
        every = (item for index in range(len(train)) for item in train[index])
        first += [item for item in every if MEDIA in item[0].extra][:1]
    while lay is not collate and len(first) > 1 and sum(len(p.ids) for e, _ in first for p in e.paths) > MOST_TOKENS:
        first.pop()  # rows with images are compared all together
    for attempt in dict.fromkeys((layout, "padded")) if check else ():
        device = next(setup.model.parameters()).device
        batch = lay(first, layout=attempt, pad_id=pad_id, columns=columns).to(device)
        shows = lay is not collate and attempt != "padded"
        padded = lay(first, layout="padded", pad_id=pad_id, columns=columns).to(device) if shows else None
        verdict = _verdict(setup, batch, padded)
        for row in _extremes(train) if verdict.holds and lay is collate and attempt != "padded" else ():
            batch = lay(row, layout=attempt, pad_id=pad_id, columns=columns).to(device)
            verdict = max(verdict, _verdict(setup, batch), key=lambda found: found.difference)
        if verdict.holds:
            log.info(
                "first batch checked: %s rows agree with one plain forward pass per answer to %.1e nats",
                attempt,
                verdict.difference,
            )
            layout = attempt
            break
        model = type(setup.model).__name__
        if attempt == "padded":
            raise TrainingError(
                f"{model} gives other log-probs through Luthier's rows than through its own forward pass (difference "
                f"{verdict.difference:.3g} nats per token, tolerance {verdict.tolerance:g}). It may change its logits "
                "after the output head in a way Luthier does not know. Set verify_layout: false only if you know why."
            )
        log.warning(
            "WARNING: %s does not honour the attention mask of %s rows (%s). Falling back to padded rows: exact, but "
            "slower.",
            model,
            attempt,
            verdict,
        )
    collator = Collator(lay, layout=layout, pad_id=pad_id, columns=tuple(columns))
    return Rows(train, collator, layout)


def confirm(rows: Rows, setup: PolicySetup, batch_size: int, device: torch.device) -> None:
    """The first-batch check for a model that an engine has spread; raises TrainingError where a layout fails it.

    All processes take the same batch, since they compute together.
    """
    first = list(_telling(rows.train, batch_size))
    checked = [first, *([row] for row in _extremes(rows.train) if rows.layout != "padded")]
    found = [_verdict(setup, rows.collator(batch)["batch"].to(device)) for batch in checked]
    verdict = max(found, key=lambda one: one.difference)
    if not verdict.holds:
        raise TrainingError(
            f"{type(setup.model).__name__} does not honour the attention mask of {rows.layout} rows ({verdict}). Write "
            "layout: padded, or verify_layout: false only if you know why."
        )
    log.info("first batch checked: %s rows agree to %.1e nats", rows.layout, verdict.difference)


def _telling(train: Bundles, count: int) -> Iterator[list[tuple[Encoded, str]]]:
    """The first rows in which there is something to compare."""
    return islice((row for row in map(train.__getitem__, range(len(train))) if any(e.paths for e, _ in row)), count)


def _extremes(train: Bundles) -> Iterator[list[tuple[Encoded, str]]]:
    """The row with the longest answer and the one with the most answers.

    The first may be too short to leave a window that a model counts in its own way (GPT-Neo), or may hold one sequence
    alone, as a piece of a long document does.
    """
    examples: Examples = train.examples  # type: ignore[assignment]
    longest, answers = examples.longest.tolist(), examples.answers.tolist()
    bundles = train.bundles if train.bundles is not None else [[i] for i in range(len(longest))]
    sizes = (
        lambda row: max((longest[i] for i in bundles[row]), default=0),
        lambda row: sum(answers[i] for i in bundles[row]),
    )
    chosen = [max(range(len(bundles)), key=size) for size in sizes] if bundles else []
    return map(train.__getitem__, dict.fromkeys(chosen))


def _verdict(setup: PolicySetup, batch: Batch, padded: Batch | None = None) -> Verdict:
    """What the check finds; a model that cannot even take the mask fails it, with its reason."""
    try:
        return verify(setup, batch, padded)
    except (ModelError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        if batch.layout == "padded":
            raise
        return Verdict(float("inf"), 0.0, 0, f"{type(error).__name__}: {error}")
