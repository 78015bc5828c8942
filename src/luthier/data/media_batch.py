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

    from luthier.core.batch import Alone, Batch

GRID = "image_grid_thw"
"""What processors of models with M-RoPE say of each image: its patches in time, height and width."""


@dataclass(frozen=True)
class MediaCollate:
    """`data.layout.collate` for a model that sees. Picklable, for worker processes."""

    vision: Vision
    blank: bool = False
    """Whether a micro-batch without images shows a blank one in its padding, where nobody sees it: what sees is
    computed then as well, and its weights get gradients, of zero. So processes that share a model, or its gradients,
    do the same things in the same order, whichever of them has an image."""

    def __call__(self, items: Sequence[tuple[Encoded, str]], *, layout: str, **options: Any) -> Batch:
        """See `collate`. An image that answers share in one row is there once. Raises DataError for images that are not
        what they were."""
        padded = collate(items, layout="padded", **options)
        return (
            self._shown(padded) if layout == "padded" else self._joint(collate(items, layout=layout, **options), padded)
        )

    def _joint(self, batch: Batch, padded: Batch) -> Batch:
        """A row of several answers, and beside it what the model is asked where it places their tokens."""
        paths = [_path(batch, answer) for answer in range(batch.answers)]
        shown = [self._begins(batch, answer, path) for answer, path in enumerate(paths)]
        images = {begin: image for begins in shown for begin, image in begins}
        places = sorted(images)
        tensors: Mapping[str, Any] = {}
        if places:
            count = int(np.isin(batch.ids.numpy(), self.vision.token_ids).sum())
            tensors = self._tensors([([images[place] for place in places], count, "; ".join(batch.names))])
        elif self.blank:
            ids, tensors = self.vision.blank()
            batch = with_tail(batch, ids)
        alone = None
        if places and GRID in tensors:
            grids = tensors[GRID][[places.index(begin) for begins in shown for begin, _ in begins]]
            alone = _alone({"input_ids": padded.ids, GRID: grids, **self.vision.kinds(padded.ids)}, paths)
        aside = None if batch.aside is None else self._joint(batch.aside, padded.aside)
        return replace(batch, media={**self.vision.kinds(batch.ids), **tensors}, alone=alone, aside=aside)

    def _begins(self, batch: Batch, answer: int, path: np.ndarray) -> list[tuple[int, str]]:
        """Where in the row each image of an answer begins, and the image."""
        said = batch.extras[int(batch.group[answer])].get(MEDIA)
        if said is None:
            return []
        at = path[np.isin(batch.ids[0].numpy()[path], said["ids"])]
        starts = [0, *np.cumsum(said["tokens"]).tolist()]
        # See `_row`: the first images only.
        return [(int(at[start]), image) for start, image in zip(starts[: starts.index(len(at))], said["images"])]

    def _shown(self, batch: Batch) -> Batch:
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


def _path(batch: Batch, answer: int) -> np.ndarray:
    """Indices of an answer's tokens in the one row there is, root first."""
    last, end = int(batch.last[answer]), batch.end[0].numpy()
    index = np.arange(len(end))
    return index[(index <= last) & (last < end)]


def _alone(arguments: Mapping[str, Tensor], paths: Sequence[np.ndarray]) -> Alone:
    import torch

    from luthier.core.batch import Alone

    width = arguments["input_ids"].shape[1]
    place = np.concatenate([answer * width + np.arange(len(path)) for answer, path in enumerate(paths)])
    return Alone(arguments, torch.from_numpy(place), torch.from_numpy(np.concatenate(paths)))


def with_tail(batch: Batch, ids: Sequence[int]) -> Batch:
    """Rows with these ids in the padding of the shortest row, which grows where they do not fit. What was in the
    batch cannot see them, and stays where it was in its row."""
    import torch

    rows, width = batch.ids.shape
    # A padded row is one chain, so its first token's end is its length; of a batch without answers all is padding.
    lengths = batch.end[:, 0] if batch.answers else torch.zeros(rows, dtype=torch.int64)
    lengths = lengths if batch.layout == "padded" else torch.tensor([width])
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
