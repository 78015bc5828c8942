"""What an evaluation of an acceptance head leaves behind: numbers, curves, pictures, a table on the terminal."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.log import get_logger
from luthier.core.objective import Objective
from luthier.evaluate import plots_acceptance as plots
from luthier.evaluate.judgement import calibrated, measures
from luthier.evaluate.ranking import Ranking, auc_spread
from luthier.evaluate.rounds import SIGNS, Record, Rounds, rounds_of
from luthier.evaluate.simulation import Curve, simulate
from luthier.objectives.accept_head import AcceptHeadConfig

if TYPE_CHECKING:
    from rich.table import Table

log = get_logger("evaluate")

TABLE = "accept_report.json"
CURVE_POINTS = 200
"""Thresholds of a curve that the table holds; the measures are taken from all of them."""
HARMS = (1, 5, 10)
"""Percent of rounds that may be harmed, for which the kept tokens are told."""
TOP = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
MACRO = ("roc_auc", "pr_auc", "spearman", "mae", "excess_bce")
"""Measures that are told by request too; the table has them all."""
DRAWS, FEWEST = 300, 5
"""Draws of requests for a 95 % interval, and the fewest requests that make one worth telling."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """All that is known about a head, before it is written down."""

    metrics: dict[str, float]
    macro: dict[str, dict[str, float]]
    """Measure -> its mean over requests, and over how many."""
    rankings: dict[str, Ranking]
    """Head, and what the target itself says, by name: how they tell accept from reject."""
    curves: dict[str, Curve]
    """The same and the oracle: what they keep and harm."""
    notes: list[str]


def report(records: Iterable[Record], folder: Path, objective: Objective) -> dict[str, float]:
    """Measure an acceptance head on recorded rounds; write accept_report.json and accept_*.png.

    records: what `Trainer.records` yields, or what its JSON says. Returns the measures of `judgement.measures`, means
    over requests (macro_), AUCs of what the target says itself (kl_, prob_, rank_), and from the simulation accepted_*:
    mean draft tokens kept in a round. Raises DataError if no mismatch was judged.
    """
    rounds = rounds_of(records)
    keys = objective.config
    allowed = keys.accept_harm if isinstance(keys, AcceptHeadConfig) else AcceptHeadConfig.accept_harm
    found = measure(rounds, allowed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(json.dumps(_table(rounds, found), indent=1) + "\n", encoding="utf-8")
    _draw(folder, rounds, found)
    _tell(found)
    log.info("The whole report is in %s.", folder / TABLE)
    return found.metrics


def measure(rounds: Rounds, allowed: float) -> Findings:
    """Everything there is to know. allowed: share of rounds that the suggested threshold may harm."""
    notes = [
        f"{name} is missing at {count:,} of {len(rounds.target):,} mismatches, so it is no baseline here. Rounds that "
        f"`luthier collect` writes have it (mismatch_{name})."
        for name, count in rounds.lacking.items()
    ]
    cut = rounds.open.mean()
    if cut:
        notes.append(f"{cut:.1%} of the rounds end at a mismatch that nobody scored: what is kept is a lower bound.")
    scores = {"head": rounds.probability, **rounds.rivals}
    rankings = {name: Ranking(score, rounds.accept) for name, score in scores.items()}
    curves = {name: simulate(rounds, score) for name, score in {**scores, "oracle": rounds.target}.items()}
    macro = _by_request(rounds)
    metrics = {
        "positions": float(len(rounds.target)),
        "rounds": float(len(rounds.length)),
        "requests": float(rounds.requests),
        **measures(rounds.target, rounds.probability),
        **{f"macro_{name}": macro[name]["mean"] for name in MACRO if name in macro},
        **_rivals(rankings, rounds, notes),
        **_simulated(curves),
        **_suggestion(curves["head"], allowed, notes),
    }
    return Findings(metrics, macro, rankings, curves, notes)


def _by_request(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Each measure as the mean over the requests in which it is defined."""
    mine = rounds.request[rounds.owner]
    order = np.argsort(mine, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(mine[order])) + 1)
    each = [measures(rounds.target[part], rounds.probability[part]) for part in parts]
    names = dict.fromkeys(name for found in each for name in found)
    values = {name: [found[name] for found in each if name in found] for name in names}
    return {name: {"mean": float(np.mean(known)), "requests": len(known)} for name, known in values.items()}


def _rivals(rankings: Mapping[str, Ranking], rounds: Rounds, notes: list[str]) -> dict[str, float]:
    """AUCs of the baselines, and how sure it is that the head is better."""
    if not rankings["head"].defined:
        kind = "acceptable" if rounds.accept.all() else "to be rejected"
        notes.append(f"All mismatches are {kind}: there is nothing to tell apart, so no ROC-AUC and no reject recall.")
        return {}
    found = {f"{name}_roc_auc": rankings[name].roc().auc for name in rounds.rivals}
    cluster = rounds.request[rounds.owner]
    judged, cluster = np.unique(cluster, return_inverse=True)
    if len(judged) < FEWEST:
        notes.append(f"{len(judged)} requests are too few for intervals; {FEWEST} would do.")
        return found
    spread = auc_spread(dict(rankings), cluster.reshape(-1), len(judged), draws=DRAWS, seed=0)
    spread |= {f"over_{name}": spread["head"] - spread[name] for name in rounds.rivals}
    for name in ("head", *(f"over_{name}" for name in rounds.rivals)):
        prefix = "roc_auc" if name == "head" else f"roc_auc_{name}"
        low, high = np.quantile(spread[name], (0.025, 0.975))
        found |= {f"{prefix}_low": float(low), f"{prefix}_high": float(high)}
    return found


def _simulated(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Mean kept tokens of the rules at the shares of harm that are told."""
    head = curves["head"]
    found = {"accepted_exact": float(head.accepted[0]), "accepted_everything": float(head.accepted[-1])}
    half = head.at(0.5)
    found |= {"accepted_at_half": float(head.accepted[half]), "harm_at_half": float(head.harm[half])}
    for name, curve in curves.items():
        prefix = "" if name == "head" else f"{name}_"
        for share in HARMS:
            found[f"{prefix}accepted_at_harm_{share}"] = float(curve.accepted[curve.within(share / 100)])
    return found


def _suggestion(curve: Curve, allowed: float, notes: list[str]) -> dict[str, float]:
    """The threshold that keeps most within the harm that is allowed."""
    chosen = curve.within(allowed)
    threshold = float(curve.threshold[chosen])
    if math.isinf(threshold):
        notes.append(f"No threshold harms at most {allowed:.1%} of the rounds, except to accept nothing but matches.")
        return {}
    return {
        "threshold": threshold,
        "threshold_accepted": float(curve.accepted[chosen]),
        "threshold_harm": float(curve.harm[chosen]),
    }


def _table(rounds: Rounds, found: Findings) -> dict[str, Any]:
    """The report as JSON can hold it."""
    accept = calibrated(rounds.probability, rounds.accept)
    score = calibrated(rounds.probability, rounds.target)
    table: dict[str, Any] = {
        "metrics": found.metrics,
        "macro": found.macro,
        "notes": found.notes,
        "calibration": {
            "predicted": accept.predicted.tolist(),
            "accepted": accept.observed.tolist(),
            "score": score.observed.tolist(),
            "weight": accept.weight.tolist(),
        },
        "curves": {name: _curve(curve, SIGNS.get(name, 1.0)) for name, curve in found.curves.items()},
    }
    if "rank" in found.curves:
        table["top_k"] = _top_k(found.curves["rank"])
    if found.rankings["head"].defined:
        table["roc"] = {
            name: {"fpr": roc.fpr[kept].tolist(), "tpr": roc.tpr[kept].tolist()}
            for name, ranking in found.rankings.items()
            for roc in (ranking.roc(),)
            for kept in (_kept(len(roc.fpr)),)
        }
    return table


def _curve(curve: Curve, sign: float) -> dict[str, list[float | None]]:
    thin = curve.thinned(CURVE_POINTS)
    return {
        # The first accepts no mismatch at all, which no threshold says; JSON has no infinity.
        "threshold": [None, *(sign * thin.threshold[1:]).tolist()],
        "accepted": thin.accepted.tolist(),
        "tokens_per_pass": (thin.accepted + 1).tolist(),
        "harm": thin.harm.tolist(),
        "harmful_share": [None, *(thin.harmful[1:] / thin.mismatches[1:]).tolist()],
    }


def _top_k(curve: Curve) -> list[dict[str, float]]:
    """The rule that keeps what is among the target's k most probable tokens."""
    most = -curve.threshold[-1]
    beyond = next((k for k in TOP if k >= most), TOP[-1])
    rows = []
    for k in (k for k in TOP if k <= beyond):
        point = curve.at(-k)
        rows.append({"k": k, "accepted": float(curve.accepted[point]), "harm": float(curve.harm[point])})
    return rows


def _kept(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(np.int64))


def _draw(folder: Path, rounds: Rounds, found: Findings) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("WARNING: matplotlib is not installed, so only %s was written. pip install luthier[plots]", TABLE)
        return
    if found.rankings["head"].defined:
        rocs = {name: ranking.roc() for name, ranking in found.rankings.items()}
        plots.draw_roc(folder / "accept_roc.png", rocs)
    accept = calibrated(rounds.probability, rounds.accept)
    plots.draw_calibration(folder / "accept_calibration.png", accept, calibrated(rounds.probability, rounds.target))
    top = _top_k(found.curves["rank"]) if "rank" in found.curves else []
    plots.draw_simulation(folder / "accept_simulation.png", found.curves, top, found.metrics.get("threshold"))


def _tell(found: Findings) -> None:
    from rich.console import Console

    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(_judged(found), _told_apart(found), _decoded(found), sep="\n")
    log.info("%s", "\n".join(line.rstrip() for line in capture.get().splitlines()))
    for note in found.notes:
        log.info("%s", note)
    if "threshold" in found.metrics:
        log.info(
            "Suggested threshold %.4f: keeps %.3f draft tokens a round instead of %.3f, harms %.1f %% of the rounds.",
            *(found.metrics[name] for name in ("threshold", "threshold_accepted", "accepted_exact")),
            100 * found.metrics["threshold_harm"],
        )


def _judged(found: Findings) -> Table:
    """Measures of the judgements, pooled and by request."""
    table = _columns("judgements", "pooled", "by request")
    for name, value in found.metrics.items():
        if name in found.macro:
            table.add_row(name, f"{value:.4f}", f"{found.macro[name]['mean']:.4f}")
    return table


def _told_apart(found: Findings) -> Table:
    """ROC-AUC of the head and of what the target says itself, with the interval of the difference."""
    metrics = found.metrics
    table = _columns("accept or reject", "ROC-AUC", "head better by (95 %)")
    for name in found.rankings if found.rankings["head"].defined else ():
        auc, over = ("roc_auc", "") if name == "head" else (f"{name}_roc_auc", f"roc_auc_over_{name}")
        low, high = (metrics.get(f"{over}_{end}") for end in ("low", "high"))
        table.add_row(name, f"{metrics[auc]:.4f}", "" if low is None or high is None else f"{low:.4f} to {high:.4f}")
    return table


def _decoded(found: Findings) -> Table:
    """Kept draft tokens by rule and allowed harm."""
    table = _columns("draft tokens kept a round", *(f"harm <= {share} %" for share in HARMS))
    exact = f"{found.metrics['accepted_exact']:.3f}"
    table.add_row("exact match (lossless)", *(exact for _ in HARMS))
    for name in found.curves:
        prefix = "" if name == "head" else f"{name}_"
        table.add_row(name, *(f"{found.metrics[f'{prefix}accepted_at_harm_{share}']:.3f}" for share in HARMS))
    return table


def _columns(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
