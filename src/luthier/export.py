"""`luthier export CONFIG`: the base model with its adapters merged in, as a folder any program can load.

The merged model is saved aside, loaded again and held against the model with the adapter attached; only if the two
agree does the folder get its name. An export that changed nothing is refused too: both are ways in which a trained
model has been lost without a word.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from luthier.commands import parse_command
from luthier.core.errors import ConfigError, ModelError
from luthier.core.log import get_logger, quiet_libraries
from luthier.model.adapt import AdapterConfig, adapter_folders, attach, merge
from luthier.model.load import load_model
from luthier.model.processor import KeepProcessor
from luthier.model.quantise import QuantConfig, loading
from luthier.model.source import ModelConfig, read_settings, refuse_scratch, sees
from luthier.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = get_logger("export")

PROBES = (4, 24)
"""Token sequences, and tokens in each, on which models are compared."""
EXACT = 1e-4
"""Largest difference of float32 logits, as a share of the largest logit, that sums in another order explain."""
ROUNDED = 8
"""The same for 16-bit weights, in units of the format's own precision: weights are rounded, then layers add up."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Where the merged model goes."""

    export_dir: str | None = None
    """Folder to write; it must not exist yet or be empty."""
    export_size: int = 5
    """Largest size of one weights file, in GB."""
    export_device: Literal["cpu", "auto"] = "cpu"
    """Where merging is computed; auto: on the accelerator, if there is one."""
    export_reward_as: Literal["head", "sequence_classification"] = "head"
    """What a reward model becomes. head: a causal language model with the head's file beside it, which Luthier reads;
    sequence_classification: transformers' AutoModelForSequenceClassification with one label, the reward."""

    def __post_init__(self) -> None:
        if self.export_size < 1:
            raise ConfigError(f"export_size: {self.export_size} must be 1 (GB) or more.")


@dataclass(frozen=True)
class Exported:
    """What an export did, and how it was checked."""

    folder: Path
    dtype: str
    changed: int
    """Weights that differ from the base model's."""
    difference: float
    """Largest difference between logits of the saved model and of the model with the adapter attached; of a classifier,
    between its scores and the head's."""
    moved: float
    """Largest difference between logits of the base model and of the model with the adapter attached."""
    also: str = ""
    """What else there is to say."""

    def __str__(self) -> str:
        return (
            f"Saved {self.folder} ({self.dtype}). {self.changed} weights differ from the base model's. The adapter "
            f"moved the logits by up to {self.moved:.3g}; what the saved model says agrees to {self.difference:.2g}."
            + (f" {self.also}" if self.also else "")
        )


class Form(Protocol):
    """What a merged model is saved as, where that is more than a causal language model."""

    causal: bool
    """What is saved is a causal language model, to be compared by its logits."""

    def take(self, merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model to save, made of the merged one, which is in float32. Both may be changed."""

    def write(self, folder: Path) -> None:
        """Save what belongs beside the model."""

    def check(self, folder: Path, saved: dict[str, bytes], device: torch.device) -> tuple[float, str]:
        """Load what was saved and compare: (largest difference, what there is to say). Raises ModelError where it
        differs. saved: a fingerprint of every weight, as `digests` gives."""


def main(argv: Sequence[str]) -> int:
    """`luthier export CONFIG [key=value ...]`."""
    from luthier.export_reward import reward_form
    from luthier.run import resolve

    quiet_libraries()
    command = parse_command(argv, "export")
    run = resolve(command.config, command.overrides, verb="export")
    run.announce(log)
    length = run.layout.cutoff_len
    from luthier.model.parts import joined

    with joined(run.model, run.adapter, target_folder(run.export)) as (model, adapter):
        run = replace(run, model=model, adapter=adapter)
        log.info("%s", export(model, adapter, run.export, reward_form(run), length=length))
    return 0


def export(
    model_config: ModelConfig,
    adapter_config: AdapterConfig,
    config: ExportConfig,
    form: Form | None = None,
    *,
    length: int | None = None,
) -> Exported:
    """Merge, save, load again, compare; raises ModelError and leaves nothing behind if the models differ.

    length: the longest row that the adapter was trained on, for `rope_scaling`.
    """
    import torch

    target = target_folder(config)
    refuse_scratch(model_config)
    _refuse_quantised(model_config)
    folders = adapter_folders(adapter_config, model_config)
    dtype = _dtype(model_config)
    device = _device(config)
    tokenizer = load_tokenizer(model_config)
    exact = replace(model_config, torch_dtype="auto")  # merging in 16 bits would round the small changes away
    model = load_model(exact, tokenizer=tokenizer, dtype=torch.float32, device=device, length=length)
    probes = probe_tokens(len(tokenizer))
    before = logits = logits_of(model, probes)
    base, changed = digests(model, dtype), 0
    for folder in folders:
        model, logits = _merge(model, folder, probes)
        now = digests(model, dtype)
        changed = sum(now[name] != digest for name, digest in base.items())
        if not changed:
            raise ModelError(_unchanged(folder, dtype))
    tokenizer.padding_side = "left"  # what programs that generate in batches expect
    model = model if form is None else form.take(model, tokenizer)
    model.to(dtype)
    also, difference = "", 0.0
    with aside(target) as folder:
        save_whole(model, tokenizer, folder, config)
        if sees(model.config):
            KeepProcessor(model_config)(folder)
        saved = digests(model, dtype)
        del model
        moved, _ = _compare(logits, before)
        if form is None or form.causal:
            difference = _check(folder, model_config, saved, probes, logits, device)
            if changed and difference > moved / 2:
                raise ModelError(_unchanged(folders[-1], dtype))
        if form is not None:
            form.write(folder)
            apart, also = form.check(folder, saved, device)
            difference = max(difference, apart)
    return Exported(target, str(dtype).removeprefix("torch."), changed, difference, moved, also)


def _refuse_quantised(config: ModelConfig) -> None:
    """Raise ModelError for a model that is stored in few bits and is not unpacked while it is loaded."""
    _, method = loading(QuantConfig(), read_settings(config), None, sharded=False)
    if method is not None:
        raise ModelError(
            f"model_name_or_path: {config.model_name_or_path} is stored quantised ({method}), and an adapter merged "
            "into quantised weights would be rounded away. Name the full model that it was made from: the adapter fits "
            "it, and what it says will differ only by what quantising had cost."
        )


def target_folder(config: ExportConfig) -> Path:
    """`export_dir`, checked to be new or empty. Raises ConfigError."""
    if not config.export_dir:
        raise ConfigError("export_dir is missing: the folder to write the merged model to.")
    target = Path(config.export_dir).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"export_dir: {target} is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"export_dir: {target} is not empty. Remove it or choose another folder.")
    return target


def _dtype(config: ModelConfig) -> torch.dtype:
    """What the weights are saved in: as the user said, else as the base model is."""
    import torch

    own = read_settings(config).dtype or torch.float32
    names = (config.infer_dtype, config.torch_dtype, str(own).removeprefix("torch."))
    return getattr(torch, next(name for name in names if name != "auto"))


def _device(config: ExportConfig) -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator() if config.export_device == "auto" else None
    return accelerator or torch.device("cpu")


def probe_tokens(vocabulary: int) -> torch.Tensor:
    """int64 [4, 24]: token sequences on which models are compared."""
    import torch

    return torch.randint(vocabulary, PROBES, generator=torch.Generator().manual_seed(0))


def logits_of(model: nn.Module, probes: torch.Tensor) -> torch.Tensor:
    """float32 [4, 24, vocabulary], on the CPU."""
    import torch

    with torch.no_grad():
        return model(input_ids=probes.to(model.device), use_cache=False).logits.float().cpu()


def digests(model: nn.Module, dtype: torch.dtype) -> dict[str, bytes]:
    """A fingerprint of every weight in the format it is saved in, so that no second copy of the model is needed."""
    import torch

    return {
        name: hashlib.blake2b(
            parameter.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy()
        ).digest()
        for name, parameter in model.named_parameters()
    }


def _merge(model: PreTrainedModel, folder: Path, probes: torch.Tensor) -> tuple[PreTrainedModel, torch.Tensor]:
    """The merged model and the logits of the model with the adapter attached, found equal."""
    adapted = attach(model, folder).eval()
    wanted = logits_of(adapted, probes)
    merged = merge(adapted)
    difference, largest = _compare(logits_of(merged, probes), wanted)
    if not difference <= EXACT * max(1.0, largest):
        raise ModelError(
            f"Merging {folder} changes what the model says: logits up to {largest:.3g} differ by {difference:.2g} "
            "between the merged model and the model with the adapter attached. Nothing was saved."
        )
    return merged, wanted


def _compare(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    return float((found - wanted).abs().max()), float(wanted.abs().max())


def _unchanged(folder: Path, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    hint = "" if name == "float32" else f", or its changes vanish in {name}; then export with infer_dtype: float32"
    return (
        f"Merging {folder} changes nothing: the merged model would be the base model. The adapter was never "
        f"trained{hint}. Nothing was saved."
    )


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when all went well and is gone when not."""
    from safetensors import SafetensorError

    folder = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True)
        yield folder
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"export_dir: {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_whole(model: PreTrainedModel, tokenizer: Any, folder: Path, config: ExportConfig) -> None:
    """A model and its tokenizer as a folder that any program can load."""
    model.save_pretrained(folder, max_shard_size=f"{config.export_size}GB")
    tokenizer.save_pretrained(folder)
    # safetensors files are born readable by their owner alone; give them the rights the other files have.
    rights = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(rights)


def _check(
    folder: Path,
    model_config: ModelConfig,
    saved: dict[str, bytes],
    probes: torch.Tensor,
    wanted: torch.Tensor,
    device: torch.device,
) -> float:
    """Load what was saved: the same weights bit for bit, and logits as near as its number format allows."""
    import torch

    again = ModelConfig(model_name_or_path=str(folder), trust_remote_code=model_config.trust_remote_code)
    model = load_model(again, tokenizer=load_tokenizer(again), device=device)
    dtype = model.dtype
    found = digests(model, dtype)
    if wrong := [name for name in {**saved, **found} if saved.get(name) != found.get(name)]:
        raise ModelError(f"The saved weights {', '.join(wrong[:5])} are not those of the merged model.")
    difference, largest = _compare(logits_of(model.float(), probes), wanted)
    allowed = (EXACT if dtype == torch.float32 else ROUNDED * torch.finfo(dtype).eps) * max(1.0, largest)
    if not difference <= allowed:
        raise ModelError(
            f"The saved model does not say what the adapter says: logits up to {largest:.3g} differ by "
            f"{difference:.2g}, more than the {allowed:.2g} that rounding explains. Nothing was saved."
        )
    return difference
