"""A small head beside the output head: what it is built from, where it sits, how it is saved and found again.

The head reads the hidden states that the output head would read (see `HiddenTap`), at the asked positions only, and
computes in float32. It is a submodule of the model, so that device placement, DDP and optimisers see it; on disk it is
`NAME_head.safetensors` with a json beside it, and the base model's own files are as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.core.log import get_logger
from luthier.core.registry import find, names

log = get_logger("model")

SLOT = "luthier_head"
"""Name of the submodule."""
PREFIX = "v_head."
"""Prefix of the head's tensors on disk, as in TRL's and LLaMA-Factory's value_head.safetensors."""


def base_of(model: nn.Module) -> nn.Module:
    """The PreTrainedModel inside a PeftModel, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def attach(model: nn.Module, name: str, keys: Any = None, *, seed: int = 0) -> nn.Module:
    """Put the head `heads/NAME.py` builds onto the model, float32 and trainable, and return it.

    keys: the objective's Config, for heads that have settings. The output head, which nothing reads any more, is
    frozen unless it is tied to the embeddings.
    """
    base = base_of(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = find("heads", name).build(base.config.get_text_config().hidden_size, keys)
    weight = base.get_input_embeddings().weight
    base.add_module(SLOT, head.to(weight.device, torch.float64 if weight.dtype == torch.float64 else torch.float32))
    output = base.get_output_embeddings()
    if output is not None and output.weight is not weight:
        output.requires_grad_(False)
    return head


def head_of(model: nn.Module) -> nn.Module | None:
    """The head on a model, if there is one."""
    return dict(base_of(model).named_children()).get(SLOT)


def without_head(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The model's state as its own files should have it."""
    return without_head_keys(model.state_dict() if state is None else state)


def without_head_keys(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without the head's tensors."""
    return {key: value for key, value in state.items() if f"{SLOT}." not in key}


def part_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's own tensors in a model's state; empty if the model has none."""
    return {key.partition(f"{SLOT}.")[2]: value for key, value in state.items() if f"{SLOT}." in key}


def save(
    head: nn.Module, name: str, folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write NAME_head.safetensors and NAME_head.json into a folder.

    tensors: the head's state, where the module itself holds only this process's part of it.
    """
    save_tensors(tensors or head.state_dict(), name, folder, facts)


def save_tensors(state: Mapping[str, Tensor], name: str, folder: Path, facts: Mapping[str, Any]) -> None:
    """As `save`, of a head's state."""
    from safetensors.torch import save_file

    tensors = {PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, str(folder / f"{name}_head.safetensors"), metadata={"format": "pt"})
    describe(name, folder, facts)


def describe(name: str, folder: Path, facts: Mapping[str, Any]) -> None:
    """Write NAME_head.json: which kind of head it is, and its settings."""
    text = json.dumps({"head": name, **facts}, indent=2) + "\n"
    (folder / f"{name}_head.json").write_text(text, encoding="utf-8")


def drop_others(folder: Path, keep: str | None) -> None:
    """Remove the heads that an earlier run of another stage left in a folder."""
    for other in set(names("heads")) - {keep}:
        for suffix in ("safetensors", "json"):
            (folder / f"{other}_head.{suffix}").unlink(missing_ok=True)


def saved_in(folder: str | Path) -> str | None:
    """The name of the head that was saved in a folder, if any."""
    found = [name for name in names("heads") if (Path(folder) / f"{name}_head.safetensors").is_file()]
    return found[0] if found else None


def digest(folder: str | Path) -> str:
    """SHA-256 of the head saved in a folder, its first 16 digits."""
    with (Path(folder) / f"{saved_in(folder)}_head.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def facts(folder: str | Path) -> dict[str, Any]:
    """What the json beside a saved head says: its name under "head", its stage, its settings. Raises ModelError."""
    name = saved_in(folder)
    if name is None:
        raise ModelError(f"{folder} holds no head (no *_head.safetensors).")
    file = Path(folder) / f"{name}_head.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"head": name}


def load(head: nn.Module, name: str, folder: str | Path) -> None:
    """Fill `head` (a NAME head) from the head saved in a folder.

    A head may take over what it shares with another kind (`heads/NAME.py: adopts`), which is said in one line; the rest
    stays fresh. Raises ModelError for a head of a kind it cannot take, and for shapes that do not fit.
    """
    from safetensors.torch import load_file

    found = saved_in(folder)
    if found is None:
        raise ModelError(f"{folder} holds no head (no *_head.safetensors).")
    stored = {
        key.removeprefix(PREFIX): value for key, value in load_file(Path(folder) / f"{found}_head.safetensors").items()
    }
    if found != name:
        adopts = find("heads", name).ADOPTS
        if found not in adopts:
            raise ModelError(
                f"{folder} holds a {found} head, and this run needs a {name} head; one cannot be made from the other. "
                f"Choose the stage that trains a {found} head, or another adapter_name_or_path."
            )
        log.info("The %s head of %s becomes a %s head; what it does not have starts fresh.", found, folder, name)
    own = head.state_dict()
    wrong = [
        f"{key} has shape {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in stored.items()
        if key in own and value.shape != own[key].shape
    ]
    wrong += [f"{key} is unknown" for key in stored if key not in own]
    wrong += [f"{key} is missing" for key in own if key not in stored and found == name]
    if wrong:
        raise ModelError(f"The {found} head of {folder} does not fit this model: {'; '.join(wrong)}.")
    head.load_state_dict(stored, strict=False)
