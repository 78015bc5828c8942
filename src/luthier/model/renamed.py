"""Whole models whose weights have other names on the disk than in memory: checkpoints are read as models are.

transformers 5 keeps the experts of a mixture in one tensor, and what older classes called otherwise under new names;
`save_pretrained` writes the published names. `load_state_dict` finds no place for those and skips them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def load(model: nn.Module, folder: Path) -> bool:
    """Put the weights of a checkpoint into the model; False, and nothing done, where its names are the model's own.

    Raises CheckpointError where a weight of the model is not in the checkpoint.
    """
    import torch
    from transformers import PreTrainedModel

    own = model.state_dict()
    if not isinstance(model, PreTrainedModel) or stored_names(folder) <= set(own):
        return False
    # Wide enough for every weight, whatever format each is kept in.
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in own.values()) else torch.float32
    with torch.random.fork_rng(devices=[]):  # what the checkpoint lacks is drawn at random, and thrown away
        stored, info = type(model).from_pretrained(
            folder, config=model.config, dtype=wide, output_loading_info=True, ignore_mismatched_sizes=True
        )
    unread = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    whole = {name: tensor for name, tensor in stored.state_dict().items() if name in own and name not in unread}
    # A head of our own in the place of lm_head comes from a file of its own.
    trunk = {name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")}
    if lost := sorted(trunk - set(whole)):
        raise CheckpointError(f"{folder} lacks weights of the model: {', '.join(lost[:5])}.")
    model.load_state_dict(whole, strict=False)
    return True


def stored_names(folder: Path) -> set[str]:
    """Names of the weights of a whole model in a folder; empty where there is none."""
    import json

    from safetensors import safe_open

    if (folder / INDEX).is_file():
        return set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"])
    if not (folder / WEIGHTS).is_file():
        return set()
    with safe_open(str(folder / WEIGHTS), "pt") as file:
        return set(file.keys())
