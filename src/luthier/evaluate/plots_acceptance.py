"""Pictures of how an acceptance head does: ROC, calibration, kept tokens against harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.evaluate.calibration import Calibration
from luthier.evaluate.plots import BLUE, GREY, figure_of, save
from luthier.evaluate.ranking import Roc
from luthier.evaluate.simulation import Curve

STYLES: dict[str, dict[str, Any]] = {
    "head": {"color": BLUE, "linewidth": 2.2, "label": "head"},
    "kl": {"color": "#d95f02", "linewidth": 1.5, "label": "KL threshold"},
    "prob": {"color": "#1b9e77", "linewidth": 1.5, "label": "probability threshold"},
    "rank": {"color": "#7570b3", "linewidth": 1.5, "label": "top-k"},
    "oracle": {"color": GREY, "linewidth": 1.5, "linestyle": "--", "label": "oracle (true score)"},
}


def draw_roc(path: Path, rocs: Mapping[str, Roc]) -> Path:
    """Acceptable mismatches accepted, against others accepted by mistake."""
    figure, axes = figure_of("Telling good mismatches from bad", "bad ones accepted", "good ones accepted")
    for name, roc in rocs.items():
        style = STYLES[name]
        axes.plot(roc.fpr, roc.tpr, **style | {"label": f"{style['label']} (AUC {roc.auc:.3f})"})
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return save(figure, axes, path)


def draw_calibration(path: Path, accept: Calibration, score: Calibration) -> Path:
    """Predicted against the share that is good enough, and against the mean score."""
    figure, axes = figure_of("Calibration", "probability, predicted", "share that is good enough, mean score")
    axes.bar(accept.predicted, accept.weight, width=0.03, color=BLUE, alpha=0.25, label="share of mismatches")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfect")
    line = {"linewidth": 2, "marker": "o", "markersize": 4}
    axes.plot(accept.predicted, accept.observed, color=BLUE, label=f"good enough (ECE {accept.ece:.3f})", **line)
    axes.plot(score.predicted, score.observed, color="#d95f02", label=f"mean score (ECE {score.ece:.3f})", **line)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    return save(figure, axes, path)


def draw_simulation(
    path: Path, curves: Mapping[str, Curve], top_k: Sequence[Mapping[str, float]], threshold: float | None
) -> Path:
    """Kept draft tokens against harmed rounds: one line per rule, exact match where they all begin.

    top_k: rows {"k", "accepted", "harm"}, drawn as points. threshold: that of the head which is suggested.
    """
    figure, axes = figure_of("Draft tokens kept against harm", "share of rounds harmed", "draft tokens kept a round")
    for name, curve in curves.items():
        if name != "rank":
            axes.plot(curve.harm, curve.accepted, drawstyle="steps-post", **STYLES[name])
    if top_k:
        style = {"color": STYLES["rank"]["color"], "linestyle": "", "marker": "x"}
        axes.plot([row["harm"] for row in top_k], [row["accepted"] for row in top_k], label="top-k", **style)
        for row in top_k:
            place = (row["harm"], row["accepted"])
            axes.annotate(f"{row['k']:g}", place, fontsize=7, xytext=(4, -8), textcoords="offset points")
    head = curves["head"]
    axes.plot(head.harm[:1], head.accepted[:1], "ko", label="exact match (lossless)")
    if threshold is not None:
        chosen = head.at(threshold)
        point = (head.harm[chosen], head.accepted[chosen])
        axes.plot(*point, marker="*", markersize=12, linestyle="", color=BLUE, label=f"threshold {threshold:.3f}")
    return save(figure, axes, path)
