"""What became of the rows, and how long they are: figures and a histogram for a terminal, and as a picture."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from luthier.data.report import DataReport, Tally

BINS = 20
WIDTH = 50
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}


def counters(report: DataReport, limit: int | None) -> RenderableType:
    """Rows used and not used with the reasons, what was cut, what is trained, what sharing saves.

    limit: how many rows of each data set were read at most.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("data set", overflow="fold")
    for heading in ("rows read", "used", "dropped", "cut", "examples", "tokens", report.word):
        table.add_column(heading, justify="right")
    for name, tally in report.sets.items():
        used = tally.rows - tally.bad_rows - tally.idle_rows
        dropped = Text(f"{tally.bad_rows:,}", "bold red" if tally.bad_rows else "")
        cut = Text(f"{tally.truncated_rows:,}", "yellow" if tally.truncated_rows else "")
        rows = f"{'first ' if tally.rows == limit else ''}{tally.rows:,}"
        figures = [f"{count:,}" for count in (tally.items, tally.tokens, tally.supervised)]
        table.add_row(Text(name), rows, f"{used:,}", dropped, cut, *figures)
    return Group(table, *(Text(line, style) for line, style in _remarks(report, limit)))


def _remarks(report: DataReport, limit: int | None) -> list[tuple[str, str]]:
    lines = []
    for name, tally in report.sets.items():
        for reason, bad in tally.bad.items():
            more = f" and {bad.count - len(bad.first):,} more" if bad.count > len(bad.first) else ""
            lines.append((f"{name}: {bad.count:,} rows dropped: {reason}: {'; '.join(bad.first)}{more}", "red"))
        lines += [(f"{name}: {remark}.", "yellow") for remark in tally.remarks]
        if tally.truncated_rows:
            share = tally.truncated_tokens / max(tally.path_tokens + tally.truncated_tokens, 1)
            words = f"{tally.truncated_rows:,} rows were cut to cutoff_len and lost {tally.truncated_tokens:,} tokens"
            lines.append((f"{name}: {words} ({share:.1%}).", "yellow"))
    if any(tally.rows == limit for tally in report.sets.values()):
        lines.append((f"Only the first {limit:,} rows of each data set were read; --count 0 reads all.", "dim"))
    return [*lines, (_sharing(report.total, report.word), "")]


LEARNT = {
    "trained": "are trained {share}",
    "judged": "belong to answers {share}, which are judged as a whole: a score is learnt for each answer, and no token",
    "labelled": "carry a label {share}, which the head learns: no token is trained",
}
"""What a stage does to tokens that carry a weight."""


def _sharing(total: Tally, word: str) -> str:
    everything = max(total.path_tokens, 1)
    share = f"({total.supervised / everything:.1%})"
    said = f"Of {total.path_tokens:,} tokens {total.supervised:,} {LEARNT[word].format(share=share)}"
    saved = total.path_tokens - total.tokens
    return f"{said}; sharing beginnings saves {saved:,} ({saved / everything:.1%})." if saved else f"{said}."


def histogram(lengths: np.ndarray, cutoff_len: int, *, ascii_only: bool = False) -> RenderableType:
    """How many examples are how long. lengths: int [N] tokens of the longest answer of each with its prompt."""
    if not len(lengths):
        return Text("no examples")
    edges = bins(lengths)
    counts = np.histogram(lengths, edges)[0].tolist()
    labels = [f"{low:,}" if high == low + 1 else f"{low:,}-{high - 1:,}" for low, high in itertools.pairwise(edges)]
    wide = max(map(len, labels)), len(f"{max(counts):,}")
    lines = [Text(f"tokens of each of {len(lengths):,} examples (cutoff_len {cutoff_len:,})", "bold")]
    for label, count in zip(labels, counts):
        line = Text(f"{label:>{wide[0]}}  {count:>{wide[1]},}", "dim" if not count else "")
        lines.append(line.append(f"  {_bar(count, max(counts), ascii_only)}" if count else "", "green"))
    return Group(*lines, Text(_quantiles(lengths, cutoff_len)))


def bins(lengths: np.ndarray) -> list[int]:
    """Edges of at most twenty bins of one round width (1, 2, 5, 10, 20 ...) that hold all lengths."""
    low, high = int(lengths.min()), int(lengths.max())
    widths = (step * 10**power for power in itertools.count() for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < BINS)
    return list(range(low // width * width, high + width + 1, width))


def _bar(count: int, most: int, ascii_only: bool) -> str:
    full, rest = divmod(round(8 * WIDTH * count / most), 8)
    if ascii_only:
        return "#" * max(full, 1)
    return "\u2588" * full + ("", *"\u258f\u258e\u258d\u258c\u258b\u258a\u2589")[rest] or "\u258f"


def _quantiles(lengths: np.ndarray, cutoff_len: int) -> str:
    said = [f"{name} {int(np.quantile(lengths, q, method='higher')):,}" for name, q in QUANTILES.items()]
    at_limit = int((lengths >= cutoff_len).sum())
    limit = f"; {at_limit:,} at cutoff_len" if at_limit else ""
    return f"{', '.join(said)}{limit}."


def check_drawing() -> None:
    """To be called before anything is encoded; raises ConfigError if nothing could draw."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed. Run `pip install luthier[plots]`, or leave --plot out: "
            "the histogram on the terminal needs nothing."
        )


def draw(lengths: np.ndarray, cutoff_len: int, file: Path) -> Path:
    """The histogram as a picture."""
    from luthier.evaluate.plots import BLUE, GREY, figure_of, save

    edges = bins(lengths)
    figure, axes = figure_of("Lengths", "tokens of the longest answer with its prompt", "examples")
    axes.hist(lengths, bins=edges, color=BLUE, label=f"{len(lengths):,} examples")
    if edges[-1] >= cutoff_len / 2:
        axes.axvline(cutoff_len, color=GREY, linewidth=1, linestyle="--", label=f"cutoff_len {cutoff_len:,}")
    file.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, axes, file)
