"""What a run leaves for people: pictures of its losses, perplexity, and a model card beside the weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.run import Run

Logs = Sequence[Mapping[str, Any]]

_NOT_PLOTTED = ("step", "epoch", "learning_rate", "grad_norm", "total_flos", "tokens", "_runtime", "_per_second")
_NOT_A_RESULT = ("_per_second", "_runtime", "total_flos", "epoch")
_NOT_IN_CARD = ("output_dir", "logging_dir", "cache_dir", "token", "api_key", "dataset_dir", "run_name", "report_to")
_PACKAGES = ("luthier", "transformers", "torch", "peft", "datasets", "tokenizers")

_CARD = """\
---
{front}
---

# {title}

{base} fine-tuned with Luthier (stage `{stage}`, `{method}`) on {data}.

To train it again: `{command}` with the hyper-parameters below; the configuration as it was written, and
with all that the command line and defaults added (`resolved_config.yaml`), lies beside the weights.

## Results

{results}

## Hyper-parameters

{keys}

## Versions

{versions}

Finished on {date}.
"""


def check_plotting() -> None:
    """To be called before a run that ends with a plot; raises ConfigError if nothing could draw it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "plot_loss: true needs matplotlib, which is not installed. "
            "Run `pip install luthier[plots]`, or set plot_loss: false."
        )


def plot_loss(output_dir: str | Path, log_history: Logs) -> list[Path]:
    """Draw every measure that was logged at least twice; returns the pictures.

    The training loss becomes training_loss.png, any other measure training_NAME.png with `/` written as `_`.
    """
    curves = {name: points for name, points in _curves(log_history).items() if len(points) > 1}
    folder = Path(output_dir)
    return [_draw(folder / f"training_{name.replace('/', '_')}.png", name, points) for name, points in curves.items()]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average, the stronger the more values there are (LLaMA-Factory's rule).

    Taken forwards and backwards and averaged, so that it does not lag behind a falling curve.
    """
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    forwards, backwards = _average(values, weight), _average(values[::-1], weight)[::-1]
    return [(a + b) / 2 for a, b in zip(forwards, backwards)]


def with_perplexity(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same metrics with e^loss beside every evaluation loss; infinite where that is too large to hold."""
    found = {
        name.removesuffix("loss") + "perplexity": _exp(value)
        for name, value in metrics.items()
        if name.startswith("eval_") and name.endswith("loss")
    }
    return {**metrics, **found}


def write_card(
    output_dir: str | Path, run: Run, metrics: Mapping[str, float], *, finished: datetime, command: str
) -> Path:
    """README.md beside the weights: where the model comes from, how it was trained, how it did."""
    base = run.model.model_name_or_path
    folder = Path(output_dir)
    card = _CARD.format(
        front=_front(run, base),
        title=folder.resolve().name,
        base=_name(base),
        stage=run.stage,
        method=run.adapter.finetuning_type,
        data=", ".join(f"`{name}`" for name in _datasets(run.data.dataset)) or "data the configuration names",
        command=" ".join(_name(word) for word in command.split()),
        results=_table(("Measure", "Value"), _results(metrics)),
        keys=_table(("Key", "Value"), _shown(run.keys)),
        versions="\n".join(f"- {name} {number}" for name, number in _versions().items()),
        date=f"{finished:%Y-%m-%d}",
    )
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def _curves(log_history: Logs) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for logs in log_history:
        if "train_runtime" in logs:  # The summary of the whole run is no point of a curve.
            continue
        for name, value in logs.items():
            if isinstance(value, int | float) and math.isfinite(value) and not name.endswith(_NOT_PLOTTED):
                curves.setdefault(name, []).append((int(logs["step"]), float(value)))
    return curves


def _average(values: Sequence[float], weight: float) -> list[float]:
    smoothed: list[float] = []
    for value in values:
        smoothed.append(weight * (smoothed[-1] if smoothed else value) + (1 - weight) * value)
    return smoothed


def _draw(path: Path, name: str, points: Sequence[tuple[int, float]]) -> Path:
    # Not pyplot, which would need a display or change the backend of whoever called us.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = [step for step, _ in points], [value for _, value in points]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    if name.startswith("eval_"):
        axes.plot(steps, values, color="#1f77b4", linewidth=2, marker="o", markersize=4, label="evaluation")
    else:
        axes.plot(steps, values, color="#1f77b4", alpha=0.35, linewidth=1.2, label="logged")
        axes.plot(steps, smooth(values), color="#1f77b4", linewidth=2.2, label="smoothed")
    axes.set_title("Training loss" if name == "loss" else name)
    axes.set_xlabel("step")
    axes.set_ylabel("loss" if name.endswith("loss") else name)
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
    return path


def _front(run: Run, base: str) -> str:
    # A folder on somebody's disk means nothing to readers of the card, and hubs refuse it.
    origin = [] if Path(base).expanduser().exists() else [f"base_model: {base}"]
    library = "transformers" if run.adapter.finetuning_type in ("full", "freeze") else "peft"
    # A model with a head in place of its words generates nothing, and hubs have no name for what it does.
    task = ["pipeline_tag: text-generation"] if run.objective.head is None else []
    tags = ["luthier", run.stage, run.adapter.finetuning_type]
    return "\n".join([*origin, f"library_name: {library}", *task, "tags:", *(f"- {t}" for t in tags)])


def _datasets(value: Any) -> list[str]:
    """Names of data sets, however they were written: commas, a list, or a list of {path: ...}."""
    if isinstance(value, str):
        return [_name(part.strip()) for part in value.split(",") if part.strip()]
    if isinstance(value, Mapping):
        return [_name(str(value.get("path", value.get("name", "data"))))]
    return [name for item in value or () for name in _datasets(item)]


def _name(place: str) -> str:
    """A hub id as it is, a path on this machine by its last part."""
    path = Path(place).expanduser()
    return path.name if path.exists() or path.is_absolute() or place.startswith(".") else place


def _shown(keys: Mapping[str, Any]) -> dict[str, str]:
    told = {name: value for name, value in keys.items() if not name.endswith(_NOT_IN_CARD) and "dataset" not in name}
    return {f"`{name}`": _name(value) if isinstance(value, str) else str(value) for name, value in told.items()}


def _table(heads: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join([f"| {heads[0]} | {heads[1]} |", "| --- | --- |", *lines])


def _results(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: _number(value) for name, value in metrics.items() if not name.endswith(_NOT_A_RESULT)}


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.001 <= abs(value) < 1e6 and value != int(value) else f"{value:g}"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # Run from a source tree that was never installed.
            continue
    return found


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
