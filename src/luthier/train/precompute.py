"""`precompute_reference: true`: what the reference says about every example, computed once and kept on disk.

The log-probs lie beside the encoded data, under a name made of the reference's weights and the examples, so that the
next run over the same data with the same reference starts at once. Examples then bring them in the column that
`policy.reference` reads first, and the reference itself need not stay in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from luthier.core.errors import TrainingError
from luthier.core.types import ASIDE, NAN, Encoded
from luthier.core.types import Path as TokenPath
from luthier.data.bar import batch_bar
from luthier.data.cache import cached, key_of, sha
from luthier.data.layout import collate
from luthier.data.source import DataConfig
from luthier.data.store import ITEMS, META, write
from luthier.model.heads import SLOT, base_of
from luthier.model.policy import REFERENCE_COLUMN, PolicySetup
from luthier.model.reference import FrozenModel
from luthier.train.sampler import Bundles, Collator

if TYPE_CHECKING:
    import pyarrow

    from luthier.core.batch import Batch

CODE = ("core/tree.py", "data/layout.py", "model/attention.py", "model/policy.py", "model/reference.py")
"""Modules that decide the numbers, beside this one."""


@dataclass(frozen=True)
class Precompute:
    """Asks `setup.reference` about whole sets of examples.

    setup: the policy, with the autocast that training will use: the Trainer brings it, so make that first. data: where
    the cache is. collator: how rows are laid out, in a layout that was checked. batch_size: examples a forward pass.
    """

    setup: PolicySetup
    data: DataConfig
    collator: Collator
    batch_size: int

    def __call__(self, rows: Bundles, name: str) -> Bundles:
        """The same rows, every path with its log-probs; `name` is what the progress bar calls them.

        The examples must have a `fingerprint`, as `data.encode.EncodedSet` has. Also evaluation sets need this:
        afterwards no reference is left that could be asked. Raises TrainingError for log-probs that are no numbers.
        """
        examples: Any = rows.examples
        parts = self._parts | {"examples": examples.fingerprint, "completed": str(rows.complete is not None)}

        def build(folder: Path) -> None:
            batches = (_table(chunk) for chunk in self._computed(rows, name))
            write(batches, _table([]).schema, folder / ITEMS)
            (folder / META).write_text(json.dumps({"parts": parts, "examples": len(examples)}, indent=1), "utf-8")

        return Bundles(WithReference(rows, cached(self.data, key_of(parts), build)), rows.bundles, tokens=rows.tokens)

    def carrying(self) -> Collator:
        """The collator for rows that bring the log-probs."""
        return Collator(_collate, **self.collator.options)

    @cached_property
    def _parts(self) -> dict[str, str]:
        """What decides the log-probs of an example."""
        home = Path(__file__).resolve().parents[1]
        files = [Path(__file__), *(home / name for name in CODE)]
        device = next(self.setup.model.parameters()).device.type
        with self.setup.autocast():
            numbers = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as the weights"
        return {
            "the reference": fingerprint(self.setup),
            "autocast": numbers,
            "code of the reference": sha("".join(file.read_text(encoding="utf-8") for file in files)),
            "version of transformers": version("transformers"),
        }

    def _computed(self, rows: Bundles, name: str) -> Iterator[list[np.ndarray]]:
        """Log-probs of the supervised tokens of each example, path after path, a list a forward pass."""
        count = len(rows.examples)
        starts = range(0, count, self.batch_size)
        for start in batch_bar(starts, f"Asking the reference about {name}"):
            items = [_completed(rows, index) for index in range(start, min(start + self.batch_size, count))]
            yield self._ask(items)

    def _ask(self, items: Sequence[tuple[Encoded, str]]) -> list[np.ndarray]:
        options = self.collator.options
        batch = collate(_as_answers(items), layout=options["layout"], pad_id=options["pad_id"])
        batch = batch.to(next(self.setup.model.parameters()).device)
        found = self.setup.reference.logps(batch).float().cpu().numpy()
        counts = [sum(len(supervised(path)) for path in encoded.paths) for encoded, _ in items]
        parts = np.split(found, np.cumsum(counts)[:-1])
        for (_, name), logps in zip(items, parts):
            if not np.isfinite(logps).all():
                raise TrainingError(
                    f"the reference model gives a log-prob that is no number for {name}. Look at the row with "
                    "`luthier preview`, and run the reference in float32 or bf16."
                )
        return parts


class WithReference(Sequence[tuple[Encoded, str]]):
    """Examples as they are trained, every path with the column `reference_logp`. Picklable: processes map one file."""

    def __init__(self, rows: Bundles, folder: Path):
        self.rows, self.folder = rows, folder

    def __reduce__(self):
        return WithReference, (self.rows, self.folder)

    def __len__(self) -> int:
        return len(self.rows.examples)

    def __getitem__(self, index):
        encoded, name = _completed(self.rows, index)
        which = int(np.searchsorted(self._ends, index, side="right"))
        at = index - (int(self._ends[which - 1]) if which else 0)
        stored, paths, start = self._batches[which].column("logps")[at].values.to_numpy(), [], 0
        for path in encoded.paths:
            chosen = supervised(path)
            values = np.full(len(path.ids), NAN, np.float32)
            values[chosen] = stored[start : start + len(chosen)]
            start += len(chosen)
            paths.append(replace(path, columns={**path.columns, REFERENCE_COLUMN: values}))
        return replace(encoded, paths=tuple(paths)), name

    @cached_property
    def _batches(self) -> list[pyarrow.RecordBatch]:
        import pyarrow as pa

        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / ITEMS)))
        return [reader.get_batch(nth) for nth in range(reader.num_record_batches)]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)


def fingerprint(setup: PolicySetup) -> str:
    """What the reference computes with: its configuration and its weights as they are in memory.

    Not the files' names or digests: merged adapters, added tokens and random starts count, a moved folder does not.
    """
    own = setup.reference.own.model if isinstance(setup.reference, FrozenModel) else None
    model = setup.model if own is None else own
    settings = {key: value for key, value in base_of(model).config.to_dict().items() if not key.startswith("_")}
    settings.pop("transformers_version", None)
    state = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        # Of a model whose adapter is switched off, what is trained is what is switched off.
        if own is None and (tensor.requires_grad or SLOT in name):
            continue
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def _collate(items: Sequence[tuple[Encoded, str]], *, layout: str, pad_id: int, columns: Sequence[str]) -> Batch:
    """As `data.layout.collate`, with the log-probs; also the paths that are only surveyed bring them."""
    answers, aside = (
        [
            (replace(e, paths=tuple(p for p in e.paths if p.name.startswith(ASIDE) == wanted)), where)
            for e, where in items
        ]
        for wanted in (False, True)
    )
    batch = collate(answers, layout=layout, pad_id=pad_id, columns=(*columns, REFERENCE_COLUMN))
    if not any(encoded.paths for encoded, _ in aside):
        return batch
    return replace(batch, aside=collate(_as_answers(aside), layout=layout, pad_id=pad_id, columns=(REFERENCE_COLUMN,)))


def _as_answers(items: Sequence[tuple[Encoded, str]]) -> list[tuple[Encoded, str]]:
    """The same examples, in which every path counts."""
    return [(replace(e, paths=tuple(replace(path, name="") for path in e.paths)), where) for e, where in items]


def _completed(rows: Bundles, index: int) -> tuple[Encoded, str]:
    return rows.examples[index] if rows.complete is None else rows.complete(index, rows.examples)


def supervised(path: TokenPath) -> np.ndarray:
    """Indices of the tokens a batch asks about; the first has nothing before it."""
    return np.flatnonzero(np.asarray(path.weights[1:])) + 1


def _table(logps: Sequence[np.ndarray]) -> pyarrow.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_pydict({"logps": pa.array(logps, pa.list_(pa.float32()))})
