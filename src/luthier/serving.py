"""From a Run to something that answers: tokenizer, template, model with its adapters, engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.log import get_logger, quiet_libraries

if TYPE_CHECKING:
    import torch

    from luthier.core.objective import Renderer
    from luthier.engines.hf import Engine
    from luthier.run import Run

log = get_logger("serving")

SEED = 42
"""Hugging Face's default."""


@dataclass(frozen=True)
class Speaker:
    """A model that is ready to answer: messages become ids by `renderer`, ids become answers by `engine`."""

    engine: Engine
    renderer: Renderer
    seed: int


def load_engine(run: Run) -> Speaker:
    """Load what the configuration names, adapters merged, on the accelerator if there is one."""
    from luthier.data.template import make_renderer
    from luthier.engines.hf import Engine
    from luthier.model.adapt import adapt
    from luthier.model.load import load_model
    from luthier.model.tokenizer import load_tokenizer

    quiet_libraries()
    _point_out_adapter(run)
    tokenizer = load_tokenizer(run.model)
    renderer = make_renderer(run.template, tokenizer)
    device = _device(run)
    model = load_model(run.model, tokenizer=tokenizer, dtype=_dtype(run, device), device=device)
    model = adapt(model, run.adapter, run.adapter_keys, model_config=run.model, trainable=False)
    return Speaker(Engine(model, tokenizer), renderer, int(run.training.get("seed", SEED)))


def _device(run: Run) -> torch.device:
    import torch

    if run.training.get("use_cpu") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator()


def _dtype(run: Run, device: torch.device) -> torch.dtype | None:
    """None follows the configuration and then the checkpoint; 16-bit numbers crawl on most CPUs."""
    import torch

    unsaid = run.model.infer_dtype == run.model.torch_dtype == "auto"
    return torch.float32 if unsaid and device.type == "cpu" else None


def _point_out_adapter(run: Run) -> None:
    """Say so where a training configuration is used as it is: it names the model before training."""
    trained = run.training.get("output_dir")
    if run.adapter.adapter_name_or_path or not trained or not (Path(trained) / "adapter_config.json").is_file():
        return
    log.warning(
        "This is the model before training. For the adapter in %s add adapter_name_or_path=%s.", trained, trained
    )
