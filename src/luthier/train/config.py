"""Training keys that are Luthier's and LLaMA-Factory's own, and the way from all of them to TrainingArguments."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.kinds import is_true
from luthier.train import fsdp_keys
from luthier.train.keys import DELIVERED, training_keys

if TYPE_CHECKING:
    from transformers import TrainingArguments


SWITCH = {"true": True, "false": False}
TRACKERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "flyte": ("flytekit", "flytekit"),
    "tensorboard": ("tensorboard tensorboardX", "luthier[tensorboard]"),
    **{name: (name, name) for name in ("clearml", "codecarbon", "dagshub", "dvclive", "mlflow", "neptune", "swanlab",
                                       "trackio", "wandb")},
}  # fmt: skip
"""What a tracker of `report_to` needs: import names, one of which will do, and what to ask pip for."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run is trained, beyond Hugging Face's TrainingArguments."""

    overwrite_output_dir: bool = False
    """Start afresh in an output folder that holds checkpoints. Without it the run goes on from the last of them."""
    plot_loss: bool = False
    """Draw `training_loss.png` when the run is done."""
    compute_accuracy: bool = False
    """Log the share of supervised tokens that the model finds most probable, in training and evaluation."""
    include_effective_tokens_per_second: bool = False
    """Also report supervised tokens per second, beside all tokens per second."""
    early_stopping_steps: int | None = None
    """Stop when so many evaluations in a row have not improved on the best. Needs eval_strategy."""
    disable_shuffling: bool = False
    """Train rows in the order of the data set."""
    pure_bf16: bool = False
    """Keep trained weights and AdamW's moments in bfloat16 too: half the memory. Updates are rounded at random, so that
    small ones are not lost on average."""
    disable_gradient_checkpointing: bool | None = None
    """Whether to keep all activations instead of computing them twice. Unset: true on a CPU, where recomputing
    costs 1.4 times the time, and false on accelerators."""
    use_reentrant_gc: bool = False
    """Use PyTorch's older, reentrant form of gradient checkpointing."""
    activation_offload: bool = False
    """Keep what gradient checkpointing saves in the host's memory until the backward pass needs it: less memory on the
    accelerator, slower steps. Switches gradient checkpointing on."""
    verify_layout: bool = True
    """Compare the first batch with the plain computation, one sequence at a time, and fall back to padded rows if
    the model's architecture does not honour the layout."""
    logging_dir: str | None = None
    """Folder for TensorBoard's files; unset: `runs/` in output_dir."""


def derive(training: Mapping[str, Any], train: TrainConfig) -> tuple[dict[str, Any], TrainConfig, list[str]]:
    """Fill in what depends on the machine; returns the keys, the config and one note per derived value.

    Half precision on a CPU that cannot compute it becomes float32; `use_cpu` says what will be used; gradient
    checkpointing is decided.
    """
    keys, notes = dict(training), []
    for name in ("resume_from_checkpoint", "fsdp"):
        value = keys.get(name)
        if isinstance(value, str) and value.lower() in SWITCH:
            keys[name] = SWITCH[value.lower()]
    if is_true(os.environ.get("ACCELERATE_USE_CPU", "")) or not has_accelerator():
        keys["use_cpu"] = True
    # Every parameter that is trained takes part in every step, also on a rank without data.
    if keys.get("ddp_find_unused_parameters") is None:
        keys["ddp_find_unused_parameters"] = False
    if keys.get("use_cpu"):
        train = _cpu_precision(keys, train, notes)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            keys.setdefault("ddp_backend", "gloo")
        if train.activation_offload:
            train = replace(train, activation_offload=False)
            notes.append("activation_offload: on a CPU everything is in the host's memory already.")
    _checkpointing(keys, train, notes)
    _purpose(keys, notes)
    if train.early_stopping_steps is not None and keys.get("metric_for_best_model") is None:
        keys["metric_for_best_model"] = "loss"
        notes.append("early_stopping_steps watches eval_loss; metric_for_best_model names another metric.")
    keys["remove_unused_columns"] = False
    return keys, train, notes


def training_arguments(training: Mapping[str, Any], train: TrainConfig, **changes: Any) -> TrainingArguments:
    """Hugging Face's object for a run's keys; `changes` win over them.

    training, train: `Run.training` and `Run.train`, as `resolve` derived them. Raises ConfigError where
    transformers finds that keys do not go together.
    """
    from transformers import TrainingArguments

    if not training.get("output_dir"):
        raise ConfigError("output_dir: say where the run is written, such as output_dir: saves/my-first-run.")
    if training.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("deepspeed: the package is not installed. pip install deepspeed, or leave the key out.")
    if train.logging_dir is not None:
        # TensorBoard's callback in transformers 5 takes its folder from nowhere else.
        os.environ["TENSORBOARD_LOGGING_DIR"] = train.logging_dir
    _check_trackers(training.get("report_to"))
    keys = {name: value for name, value in training.items() if name not in DELIVERED}
    if keys.get("report_to") is None:  # which transformers says it takes, and does not
        keys["report_to"] = "none"
    if keys.get("use_liger_kernel"):
        keys["liger_kernel_config"] = liger_settings(keys.get("liger_kernel_config"))
    if keys.get("resume_from_checkpoint") in (True, False):
        del keys["resume_from_checkpoint"]
    keys = {**keys, "disable_tqdm": True, "remove_unused_columns": False, **changes}
    try:
        return TrainingArguments(**keys)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"transformers refuses these training keys: {error}") from error


def _check_trackers(report_to: str | list[str] | None) -> None:
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        modules, package = TRACKERS.get(name, ("", ""))
        if modules and not any(map(importlib.util.find_spec, modules.split())):
            raise ConfigError(f"report_to: {name} needs a package that is not installed: pip install {package}")


def liger_settings(given: Mapping[str, bool] | None) -> dict[str, bool]:
    """What Liger is told: every kernel but those of the loss, which Luthier computes itself, in chunks.

    Raises ConfigError where Liger cannot run.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel: the package is not installed: pip install liger-kernel")
    if not has_accelerator():
        raise ConfigError("use_liger_kernel: Liger's kernels run on GPUs, and there is none. Leave the key out.")
    own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if wrong := [name for name in own if (given or {}).get(name)]:
        raise ConfigError(
            f"liger_kernel_config: {wrong[0]} would never be used: log-probs come from hidden states at supervised "
            "tokens alone, in chunks, without logits of the whole row. Leave it out."
        )
    return own | dict(given or {})


def _cpu_precision(keys: dict[str, Any], train: TrainConfig, notes: list[str]) -> TrainConfig:
    half = [name for name in ("bf16", "fp16") if keys.get(name)]
    if _native_bf16():
        half = [name for name in half if name == "fp16"]
    elif train.pure_bf16:
        half.append("pure_bf16")
        train = replace(train, pure_bf16=False)
    for name in half:
        if name != "pure_bf16":
            keys[name] = False
    if half:
        kind = "float16" if half == ["fp16"] else "bfloat16"
        notes.append(f"{', '.join(half)}: this CPU has no native {kind}, so the run computes in float32.")
    return train


def _checkpointing(keys: dict[str, Any], train: TrainConfig, notes: list[str]) -> None:
    """Decide gradient checkpointing once, under the name that the installed transformers reads."""
    name = "activation_checkpointing" if "activation_checkpointing" in training_keys() else "gradient_checkpointing"
    asked = [keys.pop(key, None) for key in ("activation_checkpointing", "gradient_checkpointing")]
    wish = next((value for value in asked if value is not None), None)
    if wish is None and train.disable_gradient_checkpointing is not None:
        wish = not train.disable_gradient_checkpointing
    if wish is None and fsdp_keys.recomputes(keys.get("fsdp_config")):
        wish = False  # FSDP does it
    if wish is None:
        wish = not keys.get("use_cpu") or train.activation_offload
        if wish and not train.activation_offload:
            notes.append("gradient checkpointing is on; where memory allows, disable_gradient_checkpointing is faster.")
    keys[name] = wish
    options = [keys.pop(f"{key}_kwargs", None) for key in ("activation_checkpointing", "gradient_checkpointing")]
    if wish:
        given = next((value for value in options if value is not None), None)
        own = {"use_reentrant": train.use_reentrant_gc} | ({"offload": True} if train.activation_offload else {})
        keys[f"{name}_kwargs"] = own if given is None else own | given
    elif any(options) or train.use_reentrant_gc:
        named = "use_reentrant_gc" if train.use_reentrant_gc else f"{name}_kwargs"
        notes.append(f"{named}: gradient checkpointing is off, so that it has no effect.")


def _purpose(keys: dict[str, Any], notes: list[str]) -> None:
    """A run trains unless told otherwise, or told to evaluate and nothing else."""
    asked = keys.get("do_train") is not None
    keys["do_train"] = trains(keys)
    if not asked and not keys["do_train"]:
        notes.append("do_eval is true and do_train is not set: this run evaluates and does not train.")


def trains(keys: Mapping[str, Any]) -> bool:
    """Whether a run trains: as do_train says; unset, unless it is told to evaluate and nothing else."""
    if keys.get("do_train") is not None:
        return bool(keys["do_train"])
    return not (keys.get("do_eval") and keys.get("eval_strategy", "no") == "no")


def has_accelerator() -> bool:
    """Whether there is a GPU or the like to train on."""
    import torch

    return torch.accelerator.is_available()


def _native_bf16() -> bool:
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
