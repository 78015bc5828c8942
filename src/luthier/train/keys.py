"""Hugging Face's TrainingArguments as keys of a run: which are passed on, and which values cannot work here.

Every field is accepted. What is not in `RULES` goes to the Trainer as it is; a rule names the values that do, and
says for the others what to do instead.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, Literal, Union

from luthier.core.compat import Refused
from luthier.core.config import Key, default_of

_PREDICTIONS = "evaluation takes the objective's own loss and metrics, nothing is gathered; leave the key out"
_LOADER = "rows are loaded by Luthier's own loader, which decides this; leave the key out"
_FULL_EVAL = "evaluation runs in the precision of training; leave the key out"
_UPLOAD = "pushing to the hub is not supported yet; when the run is done, upload its folder with `hf upload`"
_COMPILE = "torch.compile is not supported yet; leave the key out"
_LENGTHS = "rows of like length are put together by the planner itself; leave the key out"

RULES: dict[str, Refused] = {
    "average_tokens_across_devices": Refused((True,), "a mean is always taken over all processes; leave the key out"),
    "torch_compile": Refused((False,), _COMPILE),
    "torch_compile_backend": Refused((None,), _COMPILE),
    "torch_compile_mode": Refused((None,), _COMPILE),
    "use_cache": Refused((False,), "a key-value cache has no use in training; leave the key out"),
    "eval_do_concat_batches": Refused((True,), _PREDICTIONS),
    "eval_use_gather_object": Refused((False,), _PREDICTIONS),
    "eval_accumulation_steps": Refused((None,), _PREDICTIONS),
    "include_for_metrics": Refused(([],), _PREDICTIONS),
    "batch_eval_metrics": Refused((False,), _PREDICTIONS),
    "enable_jit_checkpoint": Refused((False,), "SIGTERM and SIGINT always save and stop; leave the key out"),
    "push_to_hub": Refused((False,), _UPLOAD),
    "hub_token": Refused((None,), _UPLOAD),
    "hub_private_repo": Refused((None,), _UPLOAD),
    "hub_model_id": Refused((None,), _UPLOAD),
    "hub_strategy": Refused(("every_save",), _UPLOAD),
    "hub_always_push": Refused((False,), _UPLOAD),
    "hub_revision": Refused((None,), _UPLOAD),
    "restore_callback_states_from_checkpoint": Refused((True, False), "callbacks go on where they were; leave it out"),
    "accelerator_config": Refused((None,), "every process reads its own rows; leave the key out"),
    "parallelism_config": Refused((None,), "tensor and context parallelism are not supported yet; leave the key out"),
    "remove_unused_columns": Refused((False,), "a batch has no columns to remove; leave the key out"),
    "label_names": Refused((None, ["labels"]), "the objective says what is learnt; leave the key out"),
    "train_sampling_strategy": Refused(
        ("random",), f"{_LENGTHS}. For the rows' own order write disable_shuffling: true"
    ),
    "length_column_name": Refused(("length",), _LENGTHS),
    "dataloader_drop_last": Refused((False,), "every row is trained once per epoch; leave the key out"),
    "dataloader_pin_memory": Refused((True, False), _LOADER),
    "dataloader_multiprocessing_context": Refused((None,), _LOADER),
    "dataloader_in_order": Refused((True,), _LOADER),
    "prediction_loss_only": Refused((False, True), _PREDICTIONS),
    "bf16_full_eval": Refused((False,), _FULL_EVAL),
    "fp16_full_eval": Refused((False,), _FULL_EVAL),
}

DIFFERS: dict[str, str] = {
    "auto_find_batch_size": "rows that do not fit are computed in parts; the optimiser step stays the same",
    "bf16, fp16": "on a CPU without native half precision the run computes in float32 and says so",
    "disable_gradient_checkpointing": "unset, checkpointing is on on accelerators and off on a CPU",
    "use_reentrant_gc": "false by default: with frozen embeddings the reentrant form can lose gradients",
    "enable_liger_kernel": "Liger's kernels but those of the loss, which Luthier computes in chunks anyway",
    "flash_attn": "training attends by Luthier's own masks, except with `disabled`; the rest as it says",
    "init_special_tokens": "desc_init without new_special_tokens_config is an error instead of noise_init",
    "pissa_convert": "without it, pissa_init/ beside the adapter keeps it exact for every command of Luthier",
    "pure_bf16": "AdamW rounds at random; optimisers that round to the nearest get a warning",
    "quantization_bit": "a model that is stored quantised refuses it instead of ignoring it",
    "rope_scaling": "the factor is ceil(cutoff_len / the model's length) in inference too; LLaMA-Factory takes 2 there",
    "use_unsloth_gc": "the same as activation_offload, by PyTorch's own hooks",
    "do_train": "`luthier train` trains unless do_train is false; LLaMA-Factory wants it said",
    "packing, neat_packing": "the same thing: packed examples never see each other, and cutoff_len stays as written",
    "remove_unused_columns": "false; a batch has no columns",
    "resume_from_checkpoint": "true takes the last checkpoint of output_dir, as no key at all does",
    "save_safetensors": "always true",
    "warmup_ratio": "becomes a warmup_steps below 1, which transformers 5 reads as a share of all steps",
}
"""What is accepted and not quite what LLaMA-Factory or older transformers do, for docs/compatibility.md."""

DELIVERED = (
    "include_num_input_tokens_seen",
    "disable_tqdm",
    "remove_unused_columns",
    "label_names",
    "auto_find_batch_size",
    "restore_callback_states_from_checkpoint",
)
"""Keys that Luthier fulfils itself, so the Trainer is not asked: tokens are always counted, the bar is ours."""

Level = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]

IN_USE: dict[str, Any] = {
    "fsdp": bool | str | None,
    "resume_from_checkpoint": bool | str | None,
    "lr_scheduler_kwargs": dict[str, Any] | str | None,
    "log_level": Level,
    "log_level_replica": Level,
}
"""Types that are wider or narrower in use than transformers declares them."""

FREE = ("parallelism_config",)
"""Typed by classes that no YAML value can be; their rule decides alone."""


@cache
def training_keys() -> dict[str, Key]:
    """One key for each field of TrainingArguments, with transformers' own help text."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {
        item.name: Key(
            item.name,
            _hint(item.name, hints[item.name]),
            _plain(default_of(item)),
            item.metadata["help"],
            RULES.get(item.name),
        )
        for item in dataclasses.fields(TrainingArguments)
        if item.init
    }


def _hint(name: str, hint: Any) -> Any:
    """transformers declares `SomeEnum | str`; what works are the enum's values."""
    if name in FREE:
        return Any
    members = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    enums = [part for part in members if isinstance(part, type) and issubclass(part, Enum)]
    if enums and str in members:
        return Literal[tuple(member.value for member in enums[0])]
    return IN_USE.get(name, hint)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value
