"""Pictures of how a reward model does: calibration, accuracy by variance, errors against coverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from luthier.evaluate.abstain import Deciles, RiskCoverage
from luthier.evaluate.calibration import Calibration

BLUE, GREY = "#1f77b4", "#888888"


def draw_calibration(path: Path, calibration: Calibration) -> Path:
    """Predicted against observed, the diagonal, and how many pairs lie where."""
    figure, axes = figure_of("Calibration", "P(better answer wins), predicted", "share of pairs won")
    axes.bar(calibration.predicted, calibration.weight, width=0.03, color=BLUE, alpha=0.25, label="share of pairs")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    axes.plot(
        calibration.predicted,
        calibration.observed,
        color=BLUE,
        linewidth=2,
        marker="o",
        markersize=4,
        label=f"model (ECE {calibration.ece:.3f})",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return save(figure, axes, path)


def draw_risk_coverage(path: Path, curves: Mapping[str, RiskCoverage]) -> Path:
    """Error rate among the pairs kept, one line for each way of being unsure."""
    figure, axes = figure_of("Errors when unsure pairs are left out", "share of pairs kept", "error rate among them")
    for name, curve in curves.items():
        axes.step(curve.coverage, curve.risk, where="pre", linewidth=2, label=f"{name} (area {curve.aurc:.3f})")
    axes.axhline(next(iter(curves.values())).risk[-1], color=GREY, linewidth=1, linestyle="--", label="all pairs")
    axes.set(xlim=(0, 1), ylim=(0, None))
    return save(figure, axes, path)


def draw_deciles(path: Path, deciles: Deciles) -> Path:
    """Accuracy of each tenth of the pairs, from the smallest variance to the largest."""
    figure, axes = figure_of("Accuracy by variance", "mean variance of each tenth of the pairs", "accuracy")
    place = np.arange(1, len(deciles.accuracy) + 1)
    axes.bar(place, deciles.accuracy, color=BLUE, label="accuracy")
    axes.set_xticks(place, [f"{value:.2g}" for value in deciles.variance])
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle="--", label="chance")
    axes.set(ylim=(0, 1.15))
    return save(figure, axes, path)


def figure_of(title: str, x: str, y: str) -> tuple[Any, Any]:
    """An empty picture in the house's style: (figure, axes)."""
    # Not pyplot, which would need a display or change the backend of whoever called us.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, axes: Any, path: Path) -> Path:
    """Write the picture with its legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
    return path
