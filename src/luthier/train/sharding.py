"""The part of the Trainer that splits weights over processes: FSDP2 and DeepSpeed, as accelerate runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor

from luthier.core.errors import ConfigError, TrainingError
from luthier.core.kinds import is_true
from luthier.core.log import get_logger

log = get_logger("train")

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"


class _Proof(transformers.TrainerCallback):
    """Says what sharding came to, and stops a run that asked for it and did not get it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        whole, here = sizes(model)
        if whole == here:
            raise TrainingError(
                "FSDP was asked for, but every process holds the whole model. Expected: transformers and accelerate "
                "as in pyproject.toml, and a model whose layers accelerate finds "
                "(fsdp_config: transformer_layer_cls_to_wrap)."
            )
        log.info("FSDP2: of %s parameters each of %d processes holds about %s.", f"{whole:,}", args.world_size,
                 f"{here:,}")  # fmt: skip


class Sharding(transformers.Trainer):
    """transformers.Trainer that shards on a CPU too, and checks that what was asked for happens."""

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers' own; then FSDP is switched on where accelerate passes it over, or refused with a reason."""
        super().create_accelerator_and_postprocess()
        if not self._wants_fsdp:
            return
        state = self.accelerator.state
        if self.args.world_size == 1:
            raise ConfigError(
                "fsdp: there is one process, and so nothing to share. Start several (NPROC_PER_NODE=2), or leave the "
                "key out."
            )
        if state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate takes this branch for accelerators only and would run plain data parallelism without a word;
            # FSDP2 itself shards over gloo just as well.
            plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True
        if int(state.fsdp_plugin.fsdp_version) != 2:
            raise ConfigError(
                "fsdp_config: version 1 is not supported. Write fsdp_config: {version: 2}, or fsdp_version: 2 in "
                "accelerate's configuration."
            )

    @property
    def _wants_fsdp(self) -> bool:
        return bool(self.args.fsdp) or is_true(os.environ.get("ACCELERATE_USE_FSDP", ""))

    @property
    def sharded(self) -> bool:
        """Whether all ranks must take part in writing the weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def prove_sharding(self) -> None:
        """Check at the first step that FSDP holds parts of the model, not copies of it."""
        if self.is_fsdp_enabled:
            self.add_callback(_Proof())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; what a run ends with is whole also where its checkpoints are sharded."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type(FULL)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(before)

    @property
    def in_parts(self) -> bool:
        """Whether checkpoints hold the weights as FSDP's parts (torch.distributed.checkpoint), which `export` joins."""
        return self.is_fsdp_enabled and SHARDED in str(self.accelerator.state.fsdp_plugin.state_dict_type)

    def describe_parts(self, folder: Path) -> None:
        """Put beside weights in parts the settings that whole weights would bring along."""
        if isinstance(self.model, PeftModel):
            self.model.active_peft_config.save_pretrained(str(folder))
            return
        model: Any = self.model
        model.config.save_pretrained(str(folder))
        if model.can_generate():
            model.generation_config.save_pretrained(str(folder))


def sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model, and how many of them this process holds."""
    whole = here = 0
    for parameter in model.parameters():
        whole += parameter.numel()
        here += (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
    return whole, here
