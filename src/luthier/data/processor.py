"""The model's own processor, asked two things: which tokens an image becomes, and the tensors of a batch's images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError, ModelError
from luthier.data.media import MediaConfig, Pictures
from luthier.data.source import BadRow

if TYPE_CHECKING:
    from torch import Tensor

OF_THE_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "text_replacement_offsets")
"""What a processor returns that is no image."""
BLANK = (64, 64)
"""Sides of an image that shows nothing, in pixels. White, since some models drop images of zeros as padding."""
REMEMBERED = 4096
"""Images whose tokens are kept in mind."""
FAILURES = (ValueError, TypeError, OSError, RuntimeError, ZeroDivisionError, IndexError)
"""What processors raise at images they cannot take: too narrow, too small ..."""


class Vision:
    """A processor with what the configuration says to it. Picklable.

    processor: transformers' processor of the model. root: what paths of images are relative to.
    Raises ConfigError where the processor does not know a wish, ModelError where it is of an unknown kind.
    """

    def __init__(self, processor: Any, config: MediaConfig, root: Path | None):
        self.processor, self.config = processor, config
        self.pictures = Pictures(root, config)
        self._options = _options(processor, config)
        self._known: dict[str, tuple[str, int]] = {}
        declared = vars(processor).get("image_token")
        if not isinstance(declared, str):
            raise ModelError(f"{type(processor).__name__} names no image token, so images cannot be placed with it.")
        self.token = declared
        """Stands for one image in the text that the chat template writes."""
        self.token_ids: tuple[int, ...] = tuple(processor.image_token_ids)
        """The tokens whose embeddings the model replaces."""
        self.reserved: tuple[str, ...] = tuple(processor.all_special_multimodal_tokens)
        """Words that no text may hold: the model would look for an image there."""
        self._kinds = self._kinds_key()

    def expanded(self, named: str) -> tuple[str, int]:
        """What stands in the text for an image, and how many of its tokens are image tokens. Raises BadRow."""
        if named not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[named] = self._expand(named)
        return self._known[named]

    def tensors(self, rows: Sequence[Sequence[str]]) -> tuple[dict[str, Tensor], list[int]]:
        """What the model's forward call needs of these images, row after row; and how many image tokens each row has.

        Raises BadRow for an image that is gone or broken.
        """
        import torch

        shown = [[self.pictures(named) for named in row] for row in rows]
        made = self._call([self.token * len(row) for row in rows], shown, padding=True, return_tensors="pt")
        tensors = {name: value for name, value in made.items() if name not in OF_THE_TEXT}
        odd = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if odd:
            raise ModelError(
                f"{type(self.processor).__name__} returns {', '.join(odd)} of several rows in a form that Luthier does "
                "not know how to put into one batch. Set per_device_train_batch_size: 1."
            )
        counts = torch.isin(made["input_ids"], torch.tensor(self.token_ids)).sum(1).tolist()
        return tensors, counts

    def kinds(self, ids: Tensor) -> dict[str, Tensor]:
        """What the forward call is told of the kind of each token, if it wants to know. ids: int64 [R, T]."""
        import torch

        if self._kinds is None:
            return {}
        return {self._kinds: torch.tensor(self.processor.create_mm_token_type_ids(ids.tolist()))}

    def row(self, images: Sequence[str], ids: Sequence[int]) -> dict[str, Tensor]:
        """What the forward call is given beside the ids of one row that shows these images. Raises DataError."""
        import torch

        try:
            tensors, _ = self.tensors([images])
        except BadRow as bad:
            raise DataError(f"{bad.reason}: {bad.detail}") from None
        return tensors | self.kinds(torch.tensor([ids]))

    def blank(self) -> tuple[list[int], dict[str, Tensor]]:
        """A small white image as a row of its own: its ids, and what the forward call needs of it."""
        from PIL import Image

        made = self._call([self.token], [[Image.new("RGB", BLANK, "white")]], return_tensors="pt")
        tensors = {name: value for name, value in made.items() if name not in OF_THE_TEXT}
        return made["input_ids"][0].tolist(), tensors

    def fingerprint(self) -> str:
        """Everything that decides how many tokens an image becomes, but for the image."""
        settings = self.processor.image_processor.to_dict()
        own = {name: value for name, value in vars(self.processor).items() if isinstance(value, int | str | float)}
        named = [type(self.processor).__name__, settings, own, asdict(self.config), sorted(self._options)]
        return json.dumps(named, sort_keys=True, default=str)

    def _expand(self, named: str) -> tuple[str, int]:
        picture = self.pictures(named)
        try:
            made = self._call([self.token], [[picture]])
        except FAILURES as error:
            raise BadRow("an image that the model's processor does not take", f"{named[:80]}: {error}") from None
        written = made["text_replacement_offsets"][0][0]["replacement"]
        count = sum(token in self.token_ids for token in made["input_ids"][0])
        return written, count

    def _call(self, text: list[str], images: list[list[Any]], **more: Any) -> Any:
        return self.processor(
            text=text,
            images=images,
            add_special_tokens=False,
            return_text_replacement_offsets=True,
            **self._options,
            **more,
        )

    def _kinds_key(self) -> str | None:
        if not type(self.processor).return_mm_token_type_ids:
            return None
        made = self.processor(text=["a"])
        return next(name for name in ("mm_token_type_ids", "token_type_ids") if name in made)


def _options(processor: Any, config: MediaConfig) -> dict[str, bool]:
    takes = type(processor.image_processor).valid_kwargs.__annotations__
    options = {}
    for key, name, wanted in (
        ("image_do_pan_and_scan", "do_pan_and_scan", config.image_do_pan_and_scan),
        ("crop_to_patches", "crop_to_patches", config.crop_to_patches),
    ):
        if wanted and name not in takes:
            raise ConfigError(
                f"{key}: true, and the image processor of this model ({type(processor.image_processor).__name__}) has "
                "no such choice. Leave it out."
            )
        options |= {name: True} if wanted else {}
    return options
