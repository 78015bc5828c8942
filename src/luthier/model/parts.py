"""Weights that FSDP saved in parts (torch.distributed.checkpoint): found, joined, written as safetensors.

Nothing is executed from a file: the one pickle of the format, its table of contents, is read by an unpickler that knows
the table's own classes and no others; the parts are read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import get_logger
from luthier.model import heads
from luthier.model.modules import as_names

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint import FileSystemReader

    from luthier.model.adapt import AdapterConfig
    from luthier.model.source import ModelConfig

log = get_logger("model")

FOLDER = "pytorch_model_fsdp_0"
"""Where accelerate puts the parts of a model, inside a checkpoint."""
_TOP = "model."
_TABLE = "torch.distributed.checkpoint"
_KNOWN = {
    (f"{_TABLE}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("collections", "OrderedDict"),
}


def in_parts(folder: str | Path) -> bool:
    """Whether a checkpoint's weights are FSDP's parts and nothing else."""
    place = Path(folder).expanduser()
    return (place / FOLDER / ".metadata").is_file() and not any(place.glob("*.safetensors"))


def hint(folder: Path) -> str:
    """For a message that weights are missing: where they are instead, and what joins them."""
    if in_parts(folder):
        return ": they are in FSDP's parts, which `luthier export` joins"
    if any(folder.glob("global_step*")):
        command = "python zero_to_fp32.py . . --safe_serialization"
        return f": they are in DeepSpeed's parts, which DeepSpeed's own `{command}` joins, called in that folder"
    return ""


@contextlib.contextmanager
def joined(model: ModelConfig, adapter: AdapterConfig, beside: Path) -> Iterator[tuple[ModelConfig, AdapterConfig]]:
    """The same configurations, naming whole weights where they named parts.

    beside: whole weights are written to a folder next to this one and removed in the end. Raises ModelError.
    """
    with contextlib.ExitStack() as stack:

        def whole(name: str) -> str:
            if not in_parts(name):
                return name
            beside.parent.mkdir(parents=True, exist_ok=True)
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{beside.name}-", dir=beside.parent))
            join(Path(name).expanduser(), Path(made))
            return made

        names = [whole(name) for name in as_names(adapter.adapter_name_or_path)]
        yield (
            replace(model, model_name_or_path=whole(model.model_name_or_path)),
            replace(adapter, adapter_name_or_path=names or None),
        )


def join(folder: Path, target: Path) -> None:
    """Write the weights of a checkpoint in parts, and the files beside them, to `target` as they would be whole."""
    from huggingface_hub import save_torch_state_dict
    from safetensors.torch import save_file

    state = read(folder / FOLDER)
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt", ".yaml"):
            (target / file.name).write_bytes(file.read_bytes())
    judgement = heads.part_of(state)
    state = heads.without_head_keys(state)
    if (folder / "adapter_config.json").is_file():
        save_file(state, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
    else:
        save_torch_state_dict(state, str(target), metadata={"format": "pt"})
    if judgement:
        described = next(folder.glob("*_head.json"), None)
        if described is None:
            raise ModelError(f"{folder} has the weights of a head and no *_head.json that says which.")
        facts = json.loads(described.read_text(encoding="utf-8"))
        heads.save_tensors(judgement, described.name.removesuffix("_head.json"), target, facts)
    log.info("Joined %d tensors of %s.", len(state) + len(judgement), folder)


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a torch.distributed.checkpoint folder, by their names in the model. Raises ModelError."""
    import torch
    from torch.distributed import checkpoint as dcp

    reader = _reader(folder)
    try:
        table = reader.read_metadata().state_dict_metadata
        state = {
            name: torch.empty(tuple(item.size), dtype=item.properties.dtype)
            for name, item in table.items()
            if name.startswith(_TOP)
        }
        with warnings.catch_warnings(action="ignore"):  # that there is one process is meant so
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, dcp.CheckpointException) as error:
        raise ModelError(f"{folder} cannot be joined: {error}") from error
    if not state:
        raise ModelError(f"{folder} holds no weights of a model.")
    return {name.removeprefix(_TOP): value for name, value in state.items()}


def _reader(folder: Path) -> FileSystemReader:
    from torch.distributed.checkpoint import FileSystemReader

    class Careful(FileSystemReader):
        """Reads the table of contents with an unpickler that makes nothing else of it."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (folder / ".metadata").open("rb") as file:
                return _Table(file).load()

    return Careful(folder)


class _Table(pickle.Unpickler):
    """Knows the classes of a table of contents."""

    def __init__(self, file: IO[bytes]):
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        import torch

        kind = getattr(torch, name, None) if module == "torch" else None
        if module == f"{_TABLE}.metadata" or (module, name) in _KNOWN or isinstance(kind, torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its table of contents asks for {module}.{name}, which no checkpoint needs")
