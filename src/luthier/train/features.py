"""A frozen backbone: the hidden states a head reads, computed once and kept on disk, so that epochs take seconds.

They lie beside the encoded data, under a name made of the model's weights and the examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.batch import Batch
from luthier.core.errors import TrainingError
from luthier.core.types import Encoded
from luthier.core.types import Path as TokenPath
from luthier.data.bar import batch_bar
from luthier.data.cache import cached, key_of, sha
from luthier.data.layout import collate
from luthier.data.source import DataConfig
from luthier.data.store import ITEMS, META, write
from luthier.model.head_only import HeadOnlySetup, hidden_at_tokens
from luthier.model.policy import PolicySetup
from luthier.train.precompute import CODE, fingerprint, supervised
from luthier.train.sampler import Bundles, Collator

if TYPE_CHECKING:
    import pyarrow


@dataclass(frozen=True)
class WithHidden(Encoded):
    """An example of which only the supervised tokens are left, with the hidden states at them."""

    hidden: np.ndarray | None = None
    """float [E, H], path after path."""


@dataclass(frozen=True)
class Features:
    """Asks a model for the hidden states of whole sets of examples.

    setup: the policy. data: where the cache is. collator: how rows are laid out, in a layout that was checked.
    batch_size: examples a forward pass.
    """

    setup: PolicySetup
    data: DataConfig
    collator: Collator
    batch_size: int

    def __call__(self, rows: Bundles, name: str) -> Bundles:
        """The same examples with their hidden states; `name` is what the progress bar calls them."""
        examples: Any = rows.examples
        parts = self._parts | {"examples": examples.fingerprint}

        def build(folder: Path) -> None:
            found = self._computed(examples, name)
            write((_table([vectors], self._kind) for vectors in found), _table([], self._kind).schema, folder / ITEMS)
            (folder / META).write_text(json.dumps({"parts": parts, "examples": len(examples)}, indent=1), "utf-8")

        reduced = _Reduced(examples, cached(self.data, key_of(parts), build), self._width)
        return Bundles(reduced, rows.bundles, tokens=reduced.tree_tokens)

    def head_only(self) -> tuple[HeadOnlySetup, Collator]:
        """What trains the head on them: a setup without the model, and a collator."""
        names = self.collator.options["columns"]
        return HeadOnlySetup(self.setup), Collator(_collate, columns=names, width=self._width)

    @cached_property
    def _width(self) -> int:
        return int(self.setup.model.config.get_text_config().hidden_size)

    @cached_property
    def _kind(self) -> str:
        """float64 for a model in float64; else float32, which holds any 16-bit number."""
        wide = self.setup.model.get_input_embeddings().weight.dtype == torch.float64
        return "float64" if wide else "float32"

    @cached_property
    def _parts(self) -> dict[str, str]:
        home = Path(__file__).resolve().parents[1]
        files = [Path(__file__), *(home / name for name in CODE), home / "model" / "head_only.py"]
        return {
            "the model": fingerprint(self.setup),
            "numbers": str(self.setup.model.get_input_embeddings().weight.dtype),
            "code of the features": sha("".join(file.read_text(encoding="utf-8") for file in files)),
        }

    def _computed(self, examples: Sequence[tuple[Encoded, str]], name: str) -> Iterator[np.ndarray]:
        """Hidden states of each example, float [E, H]."""
        self.setup.model.eval()
        device = next(self.setup.model.parameters()).device
        starts = range(0, len(examples), self.batch_size)
        for start in batch_bar(starts, f"Reading the hidden states of {name}"):
            items = [examples[i] for i in range(start, min(start + self.batch_size, len(examples)))]
            batch = self.collator([items])["batch"].to(device)
            found = hidden_at_tokens(self.setup, batch).to(getattr(torch, self._kind)).cpu().numpy()
            counts = [sum(len(supervised(path)) for path in encoded.paths) for encoded, _ in items]
            for (_, place), vectors in zip(items, np.split(found, np.cumsum(counts)[:-1])):
                if not np.isfinite(vectors).all():
                    raise TrainingError(f"the model gives hidden states that are no numbers for {place}.")
                yield vectors


class _Reduced(Sequence[tuple[Encoded, str]]):
    """Examples reduced to their supervised tokens. Picklable: processes map one file."""

    def __init__(self, examples: Any, folder: Path, width: int):
        self.examples, self.folder, self.width = examples, folder, width
        self.tree_tokens = self.path_tokens = self.longest = examples.supervised
        self.answers = examples.answers
        self.fingerprint = examples.fingerprint

    def __reduce__(self):
        return _Reduced, (self.examples, self.folder, self.width)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        encoded, name = self.examples[index]
        vectors = self._batches[index].column("hidden").values.to_numpy().reshape(-1, self.width)
        paths = tuple(_reduced(path) for path in encoded.paths)
        return WithHidden(paths, encoded.truncated, encoded.extra, hidden=vectors), name

    @cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / ITEMS)))
        return [reader.get_batch(nth) for nth in range(reader.num_record_batches)]


def _reduced(path: TokenPath) -> TokenPath:
    """A path of nothing but its supervised tokens, below a root that every path has."""
    chosen = supervised(path).tolist()
    columns = {name: [float("nan"), *(values[i] for i in chosen)] for name, values in path.columns.items()}
    return replace(
        path,
        ids=[0, *(path.ids[i] for i in chosen)],
        weights=[0.0, *(path.weights[i] for i in chosen)],
        columns=columns,
        block=None,
    )


def _collate(items: Sequence[tuple[WithHidden, str]], *, columns: Sequence[str], width: int) -> Batch:
    """As `data.layout.collate`, with the hidden states."""
    batch = collate(items, layout="packed", pad_id=0, columns=columns)
    vectors = [encoded.hidden for encoded, _ in items]
    hidden = np.concatenate(vectors) if vectors else np.zeros((0, width), np.float32)
    return replace(batch, hidden=torch.from_numpy(hidden))


def _table(vectors: Sequence[np.ndarray], kind: str) -> pyarrow.RecordBatch:
    """One row per example: its vectors one after the other."""
    import pyarrow as pa

    flat = [each.reshape(-1) for each in vectors]
    return pa.RecordBatch.from_pydict({"hidden": pa.array(flat, pa.list_(pa.from_numpy_dtype(np.dtype(kind))))})
