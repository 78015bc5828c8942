"""What an evaluation of a reward model leaves behind: numbers, a table, pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core.log import get_logger
from luthier.core.objective import Objective
from luthier.evaluate import plots
from luthier.evaluate.abstain import RiskCoverage, by_variance, risk_coverage
from luthier.evaluate.calibration import calibrate
from luthier.evaluate.pairs import Link, Pairs, Record, numbers, pairs_of, scores, sigmoid_link
from luthier.objectives.disco_rm import DiscoRmConfig, log_preference

log = get_logger("evaluate")

TABLE = "preference_report.json"
CURVE_POINTS = 100
"""Points of a curve that the table holds; the picture has them all."""


def link_of(objective: Objective | None) -> Link:
    """How a stage turns a gap and its variance into a probability: its own way for disco_rm, else Bradley-Terry."""
    keys = None if objective is None else objective.config
    if not isinstance(keys, DiscoRmConfig):
        return sigmoid_link

    def log_p(gap: np.ndarray, variance: np.ndarray) -> np.ndarray:
        import torch

        return log_preference(torch.from_numpy(gap), torch.from_numpy(variance), keys).numpy()

    return log_p


def report(records: Iterable[Record], folder: Path, objective: Objective) -> dict[str, float]:
    """`preference_report` of records that were read from a predictions file."""
    return preference_report(((origin, numbers(answers)) for origin, answers in records), folder, objective)


def preference_report(
    records: Iterable[Record], output_dir: str | Path, objective: Objective | None = None
) -> dict[str, float]:
    """Measure a reward model on recorded answers; write preference_report.json and preference_*.png.

    records: what `Trainer.records` yields. objective: whose rewards they are (see `link_of`). Returns the measures:
    pairs, prompts, accuracy, margin, nll, brier, ece, mce, aurc (pairs left out by how close P is to 1/2), and with
    variances variance_better, variance_worse and aurc_variance. Raises DataError if there is nothing to compare.
    """
    pairs = pairs_of(records)
    link = link_of(objective)
    probability = np.exp(link(pairs.gap, pairs.variance))
    calibration = calibrate(probability, pairs.weight)
    right = pairs.gap > 0
    curves = _curves(pairs, probability, right)
    deciles = by_variance(pairs.variance, right, pairs.weight) if pairs.distributed else None
    metrics = {"pairs": float(len(pairs)), "prompts": float(pairs.prompts)} | scores(pairs, link)
    metrics |= {"ece": calibration.ece, "mce": calibration.mce}
    metrics |= {key: curve.aurc for key, (_, curve) in curves.items()}

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table: dict[str, Any] = {"metrics": metrics, "calibration": _lists(calibration)}
    table |= {key.replace("aurc", "risk_coverage"): _lists(_thinned(curve)) for key, (_, curve) in curves.items()}
    if deciles is not None:
        table["variance_deciles"] = _lists(deciles)
    (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("WARNING: matplotlib is not installed, so only %s was written. pip install luthier[plots]", TABLE)
        return metrics
    plots.draw_calibration(folder / "preference_calibration.png", calibration)
    plots.draw_risk_coverage(folder / "preference_risk_coverage.png", dict(curves.values()))
    if deciles is not None:
        plots.draw_deciles(folder / "preference_variance.png", deciles)
    return metrics


def _curves(pairs: Pairs, probability: np.ndarray, right: np.ndarray) -> dict[str, tuple[str, RiskCoverage]]:
    """Name of the area -> (words for the picture, curve), for each way of being unsure."""
    found = {"aurc": ("by probability", -np.abs(probability - 0.5))}
    if pairs.distributed:
        found["aurc_variance"] = ("by variance", pairs.variance)
    return {key: (words, risk_coverage(unsure, ~right, pairs.weight)) for key, (words, unsure) in found.items()}


def _thinned(curve: RiskCoverage) -> RiskCoverage:
    count = len(curve.coverage)
    kept = np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(np.int64))
    return RiskCoverage(curve.coverage[kept], curve.risk[kept])


def _lists(arrays: Any) -> dict[str, list[float]]:
    return {field.name: getattr(arrays, field.name).tolist() for field in dataclasses.fields(arrays)}
