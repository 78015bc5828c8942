"""Batches of rows that show images: laid out as all rows are, with what the processor makes of the images beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.errors import DataError
from luthier.core.types import Encoded
from luthier.data.layout import collate
from luthier.data.processor import Vision
from luthier.data.processor_template import MEDIA
from luthier.data.source import BadRow

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.core.batch import Batch


@dataclass(frozen=True)
class MediaCollate:
    """`data.layout.collate` for a model that sees. Picklable, for worker processes."""

    vision: Vision
    blank: bool = False
    """Whether a micro-batch without images shows a blank one in its padding, where nobody sees it: what sees is
    computed then as well, and its weights get gradients, of zero. So processes that share a model, or its gradients,
    do the same things in the same order, whichever of them has an image."""

    def __call__(self, items: Sequence[tuple[Encoded, str]], **options: Any) -> Batch:
        """Padded rows, one answer each. Raises DataError for images that are not what they were."""
        return self._shown(collate(items, **options))

    def _shown(self, batch: Batch) -> Batch:
        assert batch.layout == "padded", batch.layout
        rows = [self._row(batch, answer) for answer in range(batch.answers)]
        showing = [row for row in rows if row[0]]
        tensors: Mapping[str, Any] = {}
        if showing:
            tensors = self._tensors(showing)
        elif self.blank:
            ids, tensors = self.vision.blank()
            batch = with_tail(batch, ids)
        media = {**self.vision.kinds(batch.ids), **tensors}
        aside = None if batch.aside is None else self._shown(batch.aside)
        return replace(batch, media=media, aside=aside)

    def _tensors(self, rows: Sequence[tuple[Sequence[str], int, str]]) -> Mapping[str, Any]:
        names = "; ".join(dict.fromkeys(name for _, _, name in rows))
        try:
            tensors, counts = self.vision.tensors([images for images, _, _ in rows])
        except BadRow as bad:
            raise DataError(
                f"{names}: {bad.reason}: {bad.detail}. It was there when the row was encoded; bring it back, or encode "
                "again with overwrite_cache: true."
            ) from None
        for (_, expected, name), count in zip(rows, counts):
            if count != expected:
                raise DataError(
                    f"{name}: its images become {count} tokens, and {expected} when the row was encoded: an image was "
                    "changed. Encode again with overwrite_cache: true."
                )
        return tensors

    def _row(self, batch: Batch, answer: int) -> tuple[Sequence[str], int, str]:
        """The images of a row, its image tokens, and where it came from."""
        group = int(batch.group[answer])
        said, name = batch.extras[group].get(MEDIA), batch.names[group]
        if said is None:
            return (), 0, name
        row, column = divmod(int(batch.last[answer]), batch.ids.shape[1])
        count = int(np.isin(batch.ids[row, : column + 1].numpy(), said["ids"]).sum())
        # An answer may begin a branch in the middle of a conversation, and show its first images only.
        shown = [0, *np.cumsum(said["tokens"]).tolist()].index(count)
        return said["images"][:shown], count, name


def with_tail(batch: Batch, ids: Sequence[int]) -> Batch:
    """Padded rows with these ids in the padding of the shortest row, which grows where they do not fit. What was in the
    batch cannot see them, and stays where it was in its row."""
    import torch

    rows, width = batch.ids.shape
    # A row is one chain, so its first token's end is its length; of a batch without answers all is padding.
    lengths = batch.end[:, 0] if batch.answers else torch.zeros(rows, dtype=torch.int64)
    row = int(lengths.argmin())
    start = max(int(lengths[row]), 1)
    wider = max(width, start + len(ids))
    columns = torch.arange(width, wider)
    filled = torch.cat([batch.ids, batch.ids[:, -1:].expand(rows, wider - width)], 1)
    filled[row, start : start + len(ids)] = torch.tensor(ids)

    def moved(flat: Tensor) -> Tensor:
        return torch.where(flat < 0, flat, flat // width * wider + flat % width)

    return replace(
        batch,
        ids=filled,
        position=torch.cat([batch.position, columns.expand(rows, -1)], 1),
        end=torch.cat([batch.end, (columns + 1).expand(rows, -1)], 1),
        target=moved(batch.target),
        source=moved(batch.source),
        last=moved(batch.last),
    )
