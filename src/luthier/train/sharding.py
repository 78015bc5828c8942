"""The part of the Trainer that splits weights over processes: FSDP2 and DeepSpeed, as accelerate runs them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from luthier.core.errors import ConfigError, LuthierError, TrainingError
from luthier.core.kinds import is_true
from luthier.core.log import get_logger
from luthier.model import heads
from luthier.model.reference import FrozenModel
from luthier.train import processes

log = get_logger("train")

SHARDED, FULL = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
GATHERS = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def splits(args: transformers.TrainingArguments) -> bool:
    """Whether an engine spreads weights, gradients or the optimiser's state of a run over its processes."""
    return bool(args.deepspeed) or wants_fsdp(args)


def wants_fsdp(args: transformers.TrainingArguments) -> bool:
    """Asked for by a key, or by the configuration of `accelerate launch`."""
    return bool(args.fsdp) or is_true(os.environ.get("ACCELERATE_USE_FSDP", ""))


def join(args: transformers.TrainingArguments, *, trains_backbone: bool = True) -> torch.device:
    """To be called before a model is loaded; returns the device it is loaded on. Raises ConfigError.

    What an engine will spread is put together whole in main memory, where adapters, heads and references are made of
    it like of any other model; the engine takes it from there part by part. DeepSpeed would else cut weights while they
    are read (zero.Init), and nothing that looks at them before training would find any.
    """
    if not splits(args):
        return args.device
    name = "deepspeed" if args.deepspeed else "fsdp"
    if not args.do_train:
        raise ConfigError(f"{name} is for training, and do_train is false. Leave the key out to evaluate.")
    if not trains_backbone:
        raise ConfigError(f"{name}: a head on a frozen backbone is too small to be shared. Leave the key out.")
    if args.deepspeed:
        unset_hf_deepspeed_config()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if args.device.type == "cpu":
            _open_channels()
    return torch.device("cpu")


def _open_channels() -> None:
    """On a CPU transformers leaves DeepSpeed's channels closed."""
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)


def settle(reference: Any, args: transformers.TrainingArguments) -> None:
    """Bring a reference model of its own to where batches are."""
    if isinstance(reference, FrozenModel):
        reference.own.model.to(args.device)
        log.warning("The reference model is not sharded: every process holds all of it. With LoRA there is none.")


class _Proof(transformers.TrainerCallback):
    """Says what sharding came to, and stops a run that asked for it and did not get it."""

    def __init__(self, *, zero3: bool):
        self._zero3 = zero3

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        whole, here = sizes(model, zero3=self._zero3)
        if whole == here:
            raise TrainingError(
                "The model was to be sharded, but every process holds all of it. Expected: transformers and accelerate "
                "as in pyproject.toml, and a model whose layers accelerate finds "
                "(fsdp_config: transformer_layer_cls_to_wrap)."
            )
        text = "Sharded: each of %d processes holds about %s of %s parameters."
        log.info(text, args.world_size, f"{here:,}", f"{whole:,}")


class Late(transformers.TrainerCallback):
    """Runs a check of the model when the engine has it, since before that it is not where batches are."""

    def __init__(self, check: Callable[[], None]):
        self._check = check

    def on_train_begin(self, args, state, control, **kwargs):
        self._check()


class Sharding(transformers.Trainer):
    """transformers.Trainer that shards on a CPU too, and checks that what was asked for happens."""

    def create_accelerator_and_postprocess(self) -> None:
        """As transformers' own; then FSDP is switched on where accelerate passes it over, or refused with a reason."""
        super().create_accelerator_and_postprocess()
        if self.args.deepspeed:
            set_hf_deepspeed_config(self.args.hf_deepspeed_config)
        if not wants_fsdp(self.args):
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
            if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
                raise ConfigError(
                    "fsdp_config: cpu_offload keeps in main memory what a device does not need at the moment, and this "
                    "run has no other device. Leave it out."
                )
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True
        if int(state.fsdp_plugin.fsdp_version) != 2:
            raise ConfigError(
                "fsdp_config: version 1 is not supported. Write fsdp_config: {version: 2}, or fsdp_version: 2 in "
                "accelerate's configuration."
            )

    @property
    def sharded(self) -> bool:
        """Whether all ranks must take part in writing the weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    @property
    def zero3(self) -> bool:
        """Whether DeepSpeed cuts the weights themselves."""
        return self.is_deepspeed_enabled and self._zero_file.is_zero3()

    @property
    def _zero_file(self) -> Any:
        """DeepSpeed's file, whichever way it came."""
        return self.accelerator.state.deepspeed_plugin.hf_ds_config

    def prove_sharding(self) -> None:
        """Check at the first step that processes hold parts of the model, not copies of it."""
        if self.in_parts and isinstance(self.model, PeftModel) and heads.head_of(self.model) is not None:
            raise ConfigError(
                "fsdp_config: SHARDED_STATE_DICT keeps an adapter's weights alone, and this stage trains a head too. "
                "Write state_dict_type: FULL_STATE_DICT."
            )
        if self.is_fsdp_enabled or self.zero3:
            self.add_callback(_Proof(zero3=self.zero3))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """As transformers' own, from checkpoints of the same engine."""
        if resume_from_checkpoint is not None:
            processes.same_engine(Path(resume_from_checkpoint), self._engine)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @property
    def _engine(self) -> str:
        if self.is_fsdp_enabled:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            return processes.FSDP_PARTS if SHARDED in kind else processes.FSDP_WHOLE
        return processes.DEEPSPEED if self.is_deepspeed_enabled else processes.PLAIN

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.zero3:
            import deepspeed

            # Weight by weight, so that no device ever holds the whole.
            deepspeed.zero.Init(module=self.model, config_dict_or_path=self._zero_file.config)
        if self.is_fsdp_enabled:
            self._name_layers(self.accelerator.state.fsdp_plugin)
        try:
            return super()._prepare_for_training(*args, **kwargs)
        except ValueError as error:
            if not self.is_deepspeed_enabled or isinstance(error, LuthierError):
                raise
            # transformers compares DeepSpeed's file with the keys and says which values differ.
            raise ConfigError(f"deepspeed: {error}") from error

    def _name_layers(self, plugin: FullyShardedDataParallelPlugin) -> None:
        """Say which layers to cut where the user did not: those that the model names, less those it does not have, such
        as the layers of CLIP that read text, in a model that takes its eye alone."""
        if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
            there = {type(module).__name__ for module in self.model.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(there.intersection(self.model._no_split_modules or ()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' own; what a run ends with is whole also where its checkpoints are sharded."""
        if self.is_deepspeed_enabled:
            state = {} if _internal_call and self.in_parts else self._zero_state()
            if state and self.args.should_save:
                self._save(output_dir, state)
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            return
        if not self.is_fsdp_enabled or (_internal_call and not self.args.save_only_model):
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        before = plugin.state_dict_type
        plugin.set_state_dict_type(FULL)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.set_state_dict_type(before)

    def _zero_state(self) -> dict[str, torch.Tensor]:
        """Whole weights to be saved, on rank 0; all ranks must call it."""
        if not self.zero3:
            return self.accelerator.get_state_dict(self.deepspeed)
        if isinstance(self.model, PeftModel):
            return self._collect(self._beside_the_base())
        return self.deepspeed._zero3_consolidated_16bit_state_dict() or {}

    def whole_head(self) -> dict[str, torch.Tensor]:
        """The head's own weights on rank 0, where ZeRO-3 has cut them; all ranks must call it."""
        if not self.zero3:
            return {}
        return heads.part_of(self._collect([name for name, _ in self.model.named_parameters() if _of_head(name)]))

    def _beside_the_base(self) -> list[str]:
        """Parameters that an adapter is saved with: all that is trained, the whole head, and embeddings.

        transformers takes those that are trained and loses the frozen part of a head, and new rows of an embedding.
        """
        embeddings = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        kept = {id(p) for module in embeddings if module is not None for p in module.parameters()}
        found = self.model.named_parameters(remove_duplicate=False)
        return [name for name, p in found if p.requires_grad or id(p) in kept or _of_head(name)]

    def _collect(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """These of the parameters that ZeRO-3 has cut, whole, on rank 0."""
        import deepspeed

        parameters, state = dict(self.model.named_parameters(remove_duplicate=False)), {}
        for name in names:
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                if self.args.should_save:
                    state[name] = parameters[name].detach().cpu().clone()
        return state

    @property
    def in_parts(self) -> bool:
        """Whether checkpoints hold the weights in parts: FSDP's (torch.distributed.checkpoint), or ZeRO-3's."""
        if self.zero3:
            gathers = self._zero_file.get_value(GATHERS, False) or self.args.save_only_model
            return not (isinstance(self.model, PeftModel) or gathers)
        # Parts are written together with the optimiser's: a checkpoint without an optimiser holds whole weights.
        parts = SHARDED in str(self.accelerator.state.fsdp_plugin.state_dict_type) if self.is_fsdp_enabled else False
        return parts and not self.args.save_only_model

    def describe_parts(self, folder: Path) -> None:
        """Put beside weights in parts the settings that whole weights would bring along."""
        if isinstance(self.model, PeftModel):
            self.model.active_peft_config.save_pretrained(str(folder))
            return
        model: Any = self.model
        model.config.save_pretrained(str(folder))
        if model.can_generate():
            model.generation_config.save_pretrained(str(folder))


def _of_head(name: str) -> bool:
    return f"{heads.SLOT}." in name


def sizes(model: nn.Module, *, zero3: bool = False) -> tuple[int, int]:
    """Parameters of a model, and how many of them this process holds, as FSDP2 or ZeRO-3 has cut them."""
    whole = here = 0
    for parameter in model.parameters():
        whole += parameter.ds_numel if zero3 else parameter.numel()
        held = parameter.ds_tensor if zero3 else parameter
        here += (held.to_local() if isinstance(held, DTensor) else held).numel()
    return whole, here
