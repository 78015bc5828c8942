"""From a Run to something that answers or judges: tokenizer, template, model with its adapters, engine or head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger, quiet_libraries

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.core.objective import Renderer
    from luthier.engines._trees import Trees
    from luthier.engines.hf import Engine
    from luthier.engines.scoring import Judge, ScoreConfig
    from luthier.run import Run

log = get_logger("serving")

SEED = 42
"""Hugging Face's default."""
RESOLVED = "resolved_config.yaml"
"""What `luthier train` leaves beside the weights: every key with its value."""


@dataclass(frozen=True)
class Speaker:
    """A model that is ready to answer: messages become ids by `renderer`, ids become answers by `engine`."""

    engine: Engine
    renderer: Renderer
    seed: int


def load_engine(run: Run) -> Speaker:
    """Load what the configuration names, adapters merged, on the accelerator if there is one."""
    from luthier.engines.hf import Engine

    _point_out_adapter(run)
    model, tokenizer, renderer = _load(run)
    return Speaker(Engine(model, tokenizer), renderer, int(run.training.get("seed", SEED)))


def trees_of(speaker: Speaker) -> Trees:
    """The speaker's own model, to be asked how probable answers are."""
    from luthier.engines._trees import Trees
    from luthier.model.policy import PolicySetup

    engine = speaker.engine
    return Trees(PolicySetup(engine.model), pad_id=engine.tokenizer.pad_token_id)


def load_judge(run: Run, config: ScoreConfig | None = None) -> Judge:
    """Load a reward model: what the configuration names, adapters merged, with the head that was saved beside them.

    A training configuration stands for what it trained: `output_dir` is taken where nothing else has a head. config:
    keys of another run that win over this one's. Raises ModelError if there is no head.
    """
    from luthier.engines._trees import Trees
    from luthier.engines.scoring import Judge
    from luthier.model import heads
    from luthier.model.policy import PolicySetup

    run, folder = _with_head(run)
    name = heads.saved_in(folder)
    assert name is not None
    model, tokenizer, renderer = _load(run)
    head = heads.attach(model, name)  # without keys: it is what its file says
    heads.load(head, name, folder)
    setup = PolicySetup(model.requires_grad_(False).eval(), head=head)
    trees = Trees(setup, pad_id=tokenizer.pad_token_id, layout=run.layout.layout)
    log.info("The %s head is that of %s.", name, folder)
    return Judge(trees, renderer, head=name, cutoff_len=run.layout.cutoff_len, config=config or run.score)


def find_run(config: str | Path, overrides: Sequence[str] = (), *, verb: str) -> Run:
    """A run from its YAML file, or from the folder that `luthier train` left behind. Raises ConfigError."""
    from luthier.run import resolve

    folder = Path(config).expanduser()
    if not folder.is_dir():
        return resolve(config, overrides, verb=verb)
    return as_trained(resolve(left_in(folder), overrides, verb=verb), folder)


def left_in(folder: Path) -> Path:
    """The configuration that `luthier train` left behind in a folder. Raises ConfigError if there is none."""
    if not (folder / RESOLVED).is_file():
        raise ConfigError(
            f"{folder} was not left behind by `luthier train`: there is no {RESOLVED}. Give the YAML file instead."
        )
    return folder / RESOLVED


def as_trained(run: Run, folder: Path) -> Run:
    """The run that loads what `run` trained and saved in `folder`: an adapter on top of the others, or a model."""
    from luthier.model.modules import as_names

    if _head_alone(folder):
        return replace(run, training={**run.training, "output_dir": str(folder)})
    if not (folder / "adapter_config.json").is_file():
        return replace(run, model=replace(run.model, model_name_or_path=str(folder), train_from_scratch=False))
    earlier = as_names(run.adapter.adapter_name_or_path)
    # Training went on with the last of the earlier adapters, unless it was merged and a new one made.
    merged = earlier if run.adapter.create_new_adapter else earlier[:-1]
    return replace(run, adapter=replace(run.adapter, adapter_name_or_path=[*merged, str(folder)]))


def _head_alone(folder: Path) -> bool:
    """Whether a head was trained on a frozen model, so that the model is still the one it started from."""
    from luthier.model.heads import saved_in

    return saved_in(folder) is not None and not any(
        (folder / name).is_file() for name in ("adapter_config.json", "config.json")
    )


def head_folder(run: Run) -> Path | None:
    """Where the head of a run's model lies: beside its last adapter that has one, or in the model's folder."""
    from luthier.model.adapt import adapter_folders
    from luthier.model.heads import saved_in

    folders = [*reversed(adapter_folders(run.adapter, run.model)), Path(run.model.model_name_or_path).expanduser()]
    return next((folder for folder in folders if saved_in(folder)), None)


def _with_head(run: Run) -> tuple[Run, Path]:
    from luthier.model.heads import saved_in

    folder = head_folder(run)
    if folder is not None:
        return run, folder
    trained = run.training.get("output_dir")
    if trained and saved_in(trained):
        log.info("What was trained into %s is used.", trained)
        return as_trained(run, Path(trained)), Path(trained)
    looked = ", ".join(
        str(place)
        for place in (run.model.model_name_or_path, run.adapter.adapter_name_or_path, trained)
        if place is not None
    )
    raise ModelError(
        f"There is no reward model: none of {looked} holds a head (such as value_head.safetensors). Train one with "
        "stage: rm, and name its folder in adapter_name_or_path."
    )


def _load(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Renderer]:
    from luthier.assemble import load_base, renderer_of
    from luthier.model.adapt import adapt
    from luthier.model.tokenizer import load_tokenizer

    quiet_libraries()
    tokenizer = load_tokenizer(run.model)
    renderer = renderer_of(run, tokenizer)
    device = _device(run)
    model = load_base(run, tokenizer, dtype=_dtype(run, device), device=device)
    return adapt(model, run.adapter, run.adapter_keys, model_config=run.model, trainable=False), tokenizer, renderer


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
