"""The frozen reference: what the policy was before this training, asked without gradient and without dropout."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from luthier.core.batch import Batch
    from luthier.model.policy import PolicySetup
    from luthier.model.source import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """What the policy is compared with, for stages that need a reference model."""

    ref_model: str | None = None
    """Folder or hub id of the reference model. Unset: the model as it was before training, which with an adapter is
    the same weights with the adapter switched off."""
    ref_model_adapters: str | list[str] | None = None
    """Adapters of ref_model, merged into it."""
    ref_model_quantization_bit: Literal[4, 8] | None = None
    """Keep ref_model in 4 or 8 bits (bitsandbytes). Its adapter, one at most, is then left unmerged."""
    precompute_reference: bool = False
    """Compute the reference's log-probs once, before training, and keep them beside the encoded data."""


def make_reference(config: ReferenceConfig, setup: PolicySetup, model_config: ModelConfig, *, dtype) -> Reference:
    """The reference of a policy that has not taken a step yet.

    dtype: number format of a reference model of its own. Raises ConfigError for adapters without a model.
    """
    from peft import PeftModel

    from luthier.model.adapt import AdapterConfig, adapt, adapter_folders, attach
    from luthier.model.load import load_model
    from luthier.model.pissa import is_pissa
    from luthier.model.quantise import QuantConfig

    bits = config.ref_model_quantization_bit
    if config.ref_model is None:
        for key in ("ref_model_adapters", "ref_model_quantization_bit"):
            if vars(config)[key]:
                raise ConfigError(f"{key} needs ref_model, the model it is about.")
        if isinstance(setup.model, PeftModel):
            if is_pissa(setup.model.active_peft_config):
                raise ConfigError(
                    "ref_model: a PiSSA adapter takes the model apart, so that switching it off does not give back the "
                    "model before training. Name that model in ref_model."
                )
            return AdapterOff(setup)
        # Hooks and the head belong to the policy alone.
        with setup.detached():
            return FrozenModel(copy.deepcopy(setup.model), setup)
    wanted = replace(model_config, model_name_or_path=config.ref_model)
    device = next(setup.model.parameters()).device
    model = load_model(wanted, dtype=dtype, device=device, quant=QuantConfig(quantization_bit=bits))
    adapters = AdapterConfig(adapter_name_or_path=config.ref_model_adapters)
    if bits is not None:
        folders = adapter_folders(adapters, wanted)
        if len(folders) > 1:
            raise ConfigError(
                f"ref_model_adapters: {len(folders)} adapters, and a ref_model in {bits} bits takes one, since merging "
                "would round it away. Merge them with `luthier export` first, or leave out ref_model_quantization_bit."
            )
        return FrozenModel(attach(model, folders[0]) if folders else model, setup)
    model = adapt(model, adapters, None, model_config=wanted, trainable=False)
    return FrozenModel(model, setup)


def without_dropout(model: nn.Module) -> int:
    """Switch off every dropout of a model, those inside attention too; returns how many there were."""
    from torch import nn as layers

    silenced = 0
    for module in model.modules():
        if isinstance(module, layers.Dropout) and module.p:
            module.p, silenced = 0.0, silenced + 1
        # transformers' attention modules keep their rate as a number.
        if isinstance(vars(module).get("attention_dropout"), float) and module.attention_dropout:
            module.attention_dropout, silenced = 0.0, silenced + 1
    return silenced


class Reference(Protocol):
    """Answers with log-probs of the supervised tokens."""

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""


class AdapterOff:
    """The policy's own model with its adapter switched off: no second copy in memory."""

    def __init__(self, setup: PolicySetup):
        self.setup = setup

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""
        import torch

        with torch.no_grad(), _evaluating(self.setup.model), self.setup.model.disable_adapter():
            return self.setup.bind().logps(batch)


class FrozenModel:
    """A model of its own: `ref_model`, or a copy of the policy made before the first step."""

    def __init__(self, model: nn.Module, setup: PolicySetup):
        from luthier.model.policy import PolicySetup

        self.own = PolicySetup(model.requires_grad_(False).eval(), backend=setup.backend)
        self.policy = setup

    def logps(self, batch: Batch) -> Tensor:
        """float [E], without gradient."""
        import torch

        self.own.autocast = self.policy.autocast
        with torch.no_grad():
            return self.own.bind().logps(batch)


@contextlib.contextmanager
def _evaluating(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
