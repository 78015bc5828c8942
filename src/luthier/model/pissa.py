"""PiSSA adapters: what they started from must not be lost.

PiSSA takes the model apart, W = rest + s B0 A0, and trains B A beside the rest. An adapter saved alone would be of no
use with W. So a copy of A0 and B0 lies in `pissa_init/` beside every adapter that is saved, from which the rest is
computed exactly as it was, and at the end `pissa_converted/` may hold [B, -B0] [A; A0]: an ordinary adapter for W.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.log import get_logger

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

log = get_logger("model")

STARTS = "pissa_init"
CONVERTED = "pissa_converted"
WEIGHTS = "adapter_model.safetensors"


class Start:
    """A PiSSA adapter as it was before the first step; called with a folder, it writes itself there."""

    def __init__(self, model: PeftModel, source: Path | None = None):
        """source: the folder of the adapter that training goes on with; None for a fresh one."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import load_file

        self.settings = _plain(model.active_peft_config)
        if source is not None:
            if not (source / STARTS / WEIGHTS).is_file():
                raise ModelError(
                    f"adapter_name_or_path: {source} is a PiSSA adapter that does not say what it started from (no "
                    f"{STARTS}/), so what is trained on top of it could not be used. Give its converted form."
                )
            self.tensors = load_file(source / STARTS / WEIGHTS)
            return
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        self.tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_" in name}

    def __call__(self, folder: Path) -> None:
        """Write `pissa_init/` into a folder that is being saved."""
        from safetensors.torch import save_file

        inner = folder / STARTS
        inner.mkdir(exist_ok=True)
        save_file(self.tensors, inner / WEIGHTS, metadata={"format": "pt"})
        self.settings.save_pretrained(str(inner))


def is_pissa(settings: PeftConfig) -> bool:
    """Whether an adapter began as PiSSA begins."""
    from peft import LoraConfig

    return isinstance(settings, LoraConfig) and str(settings.init_lora_weights).startswith("pissa")


def take_apart(model: PreTrainedModel, folder: Path, settings: LoraConfig) -> bool:
    """Leave in `model` the rest that the adapter of `folder` was trained beside; False where its start was not kept.

    Raises ModelError where the weights of the model are not whole.
    """
    from safetensors.torch import load_file

    if not (folder / STARTS / WEIGHTS).is_file():
        log.warning(
            "WARNING: %s is a PiSSA adapter and holds no %s/. What it was trained beside is computed anew, and with "
            "the fast decomposition never quite the same. Convert such adapters where they were trained.",
            folder,
            STARTS,
        )
        return False
    scale = settings.lora_alpha / (settings.r**0.5 if settings.use_rslora else settings.r)
    start = load_file(folder / STARTS / WEIGHTS)
    for key, a in start.items():
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            _subtract(model.get_submodule(name), a, start[key.replace(".lora_A.", ".lora_B.")], scale, name)
    return True


def convert(folder: Path) -> None:
    """Write `pissa_converted/` into the folder that holds a trained adapter and its `pissa_init/`.

    [B, -B0] [A; A0] = B A - B0 A0 at the same scale, so rank doubles, and alpha with it (by sqrt 2 with rsLoRA). What
    was trained whole goes along. peft's own conversion (`path_initial_model_for_weight_conversion`) leaves that out,
    and needs the live model on one device.
    """
    import torch
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    trained, start = load_file(folder / WEIGHTS), load_file(folder / STARTS / WEIGHTS)
    both = dict(trained)
    for name, began in start.items():
        side = ".lora_A." in name
        both[name] = torch.cat([trained[name], began if side else -began], 0 if side else 1)
    settings = _plain(PeftConfig.from_pretrained(str(folder)))
    settings.lora_alpha *= 2**0.5 if settings.use_rslora else 2
    settings.r *= 2
    target = folder / CONVERTED
    target.mkdir(exist_ok=True)
    save_file(both, target / WEIGHTS, metadata={"format": "pt"})
    settings.save_pretrained(str(target))
    log.info("%s: the adapter for the model as it was before training.", target)


def _plain(settings: LoraConfig) -> LoraConfig:
    plain = copy.deepcopy(settings)
    plain.init_lora_weights = True
    if isinstance(plain.target_modules, set):  # of an order that differs from process to process
        plain.target_modules = sorted(plain.target_modules)
    return plain


def _subtract(module: nn.Module, a, b, scale: float, name: str) -> None:
    """In float32 and in the order in which peft subtracts, so that the rest is the same to the last bit."""
    import torch
    from transformers.pytorch_utils import Conv1D

    weight = module.weight
    if not weight.is_floating_point() or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ModelError(f"A PiSSA adapter needs whole weights, and {name} is quantised. Leave quantization_bit out.")
    turned = isinstance(module, Conv1D)
    whole = weight.data.float().T if turned else weight.data.float()
    rest = whole - scale * b.to(whole) @ a.to(whole)
    weight.data = (rest.T if turned else rest).to(weight.dtype)
