"""Images of a row: where it names them, which turn shows which, and the picture that the model's processor is given.

A reference is a path, or what the row itself holds of a picture, as text (`base64:...`). Pictures are opened where
tokens are counted and again where a batch is made, never kept.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.core.types import Message
from luthier.data.source import BadRow, Columns, excerpt

if TYPE_CHECKING:
    from PIL.Image import Image

MARK = "<image>"
"""Stands for an image in the text of a message."""
HELD = "base64:"
"""A reference that begins so holds the picture."""
NEXT = ""
"""Stands for the next image of the row's column."""
NOT_YET = "videos and audio are not supported yet"
SHOWN_BY = ("user", "observation")
"""Turns that may show images."""


@dataclass(frozen=True, kw_only=True)
class MediaConfig:
    """What becomes of images before the model's own processor has its way with them."""

    image_max_pixels: int = 768 * 768
    """Images of more pixels are made smaller, keeping their shape."""
    image_min_pixels: int = 32 * 32
    """Images of fewer pixels are made larger, keeping their shape."""
    image_do_pan_and_scan: bool = False
    """Show long or high images in cut-outs too, where the model's processor can do so (Gemma 3)."""
    crop_to_patches: bool = False
    """Show images in tiles, where the model's processor can do so (InternVL)."""

    def __post_init__(self) -> None:
        if not 1 <= self.image_min_pixels <= self.image_max_pixels:
            raise ConfigError(
                f"image_min_pixels: {self.image_min_pixels}, image_max_pixels: {self.image_max_pixels}; expected "
                "numbers of 1 or more, the first not above the second."
            )


def with_images(row: Mapping[str, Any], columns: Columns, messages: Sequence[Message]) -> list[Message]:
    """Messages that know their images: those they bring along, or the next of the row's column, one for each marker.

    A row that neither has the column nor brings images keeps its markers as the words they are. Raises BadRow.
    """
    for meaning in ("videos", "audios"):
        if _column(row, columns, meaning):
            raise BadRow(NOT_YET, f"column {columns.names.get(meaning)!r}")
    listed = _column(row, columns, "images")
    if listed is None and not any(message.media for message in messages):
        return list(messages)
    waiting = [reference(value) for value in listed or ()]
    brought = len(waiting) + sum(map(bool, (named for message in messages for named in message.media)))
    marks = sum(message.content.count(MARK) for message in messages)
    if marks != brought:
        raise BadRow(f"as many {MARK} markers as images are needed", f"{marks} markers, {brought} images")
    shown = []
    for nth, message in enumerate(messages, 1):
        count = message.content.count(MARK)
        own = message.media or (NEXT,) * count
        if len(own) != count:
            raise BadRow(f"as many {MARK} markers as images are needed", f"message {nth}: {count}, {len(own)} images")
        if own and message.role not in SHOWN_BY:
            raise BadRow("an image in a turn that cannot show any", f"message {nth}, of {message.role}")
        shown.append(replace(message, media=tuple(named or waiting.pop(0) for named in own)))
    return shown


def _column(row: Mapping[str, Any], columns: Columns, meaning: str) -> list[Any] | None:
    """What a media column holds, as a list; None where the row has no such column."""
    name = columns.names.get(meaning)
    if name is None or name not in row:
        return None
    value = row[name]
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def content(value: Any, where: str) -> tuple[str, tuple[str, ...]]:
    """The content of a message as text, and the images it brings along: a string, nothing, or a list of parts.

    Parts are of type text, image or image_url; an image part without a picture is the next of the row's column.
    """
    if value is None:
        return "", ()
    if isinstance(value, str):
        return value, ()
    texts, pictures = [], []
    for part in value if isinstance(value, list) else [value]:
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(MARK)
            source = _source_of(part)
            if source is None and kind == "image_url":
                raise BadRow("a message that is not text", f"{where}: {excerpt(part)} names no image")
            pictures.append(NEXT if source is None else reference(source))
        elif kind in ("video", "video_url", "audio", "audio_url", "input_audio"):
            raise BadRow(NOT_YET, f"{where}: {excerpt(part)}")
        else:
            raise BadRow("a message that is not text", f"{where}: {excerpt(value)}")
    return "".join(texts), tuple(pictures)


def _source_of(part: Mapping[str, Any]) -> Any:
    """Where an image part says its picture is; None if it does not say."""
    inner = part.get("image_url", part.get("image"))
    if isinstance(inner, Mapping) and "url" in inner:
        return inner["url"]
    if inner is not None:
        return inner
    held = {key: part[key] for key in ("bytes", "path") if part.get(key)}
    return held or part.get("url")


def reference(value: Any) -> str:
    """What names a picture from here on; raises BadRow."""
    from PIL import Image

    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return HELD + base64.b64encode(value["bytes"]).decode("ascii")
    if isinstance(value, Image.Image):  # what `datasets` makes of a column of images
        held = io.BytesIO()
        value.save(held, "PNG")
        return HELD + base64.b64encode(held.getvalue()).decode("ascii")
    named = value.get("path") if isinstance(value, Mapping) else value
    if not isinstance(named, str) or not named:
        raise BadRow("an image that is neither a path nor bytes", excerpt(value))
    if named.startswith("data:"):
        head, _, tail = named.partition(",")
        if not head.endswith(";base64"):
            raise BadRow("an image that is neither a path nor bytes", f"{excerpt(named)}: expected base64")
        return HELD + tail
    if named.startswith(("http://", "https://")):
        raise BadRow("an image on the web, which is never fetched", f"{named[:80]}; download it into media_dir")
    return named


@dataclass(frozen=True)
class Pictures:
    """Opens references, at the size that the configuration allows."""

    root: Path | None
    """What paths are relative to; a path that is not below it is taken as it is."""
    config: MediaConfig

    def __call__(self, named: str) -> Image:
        """The picture in RGB. Raises BadRow if there is none, or none that can be read."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self._stream(named)) as image:
                return self._sized(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            why = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise BadRow("an image that cannot be read", f"{_short(named)}: {why}") from None

    def _stream(self, named: str) -> Path | io.BytesIO:
        if named.startswith(HELD):
            try:
                return io.BytesIO(base64.b64decode(named.removeprefix(HELD), validate=True))
            except binascii.Error as error:
                raise BadRow("an image that cannot be read", f"{_short(named)}: {error}") from None
        below = None if self.root is None else self.root / named
        for path in (below, Path(named)):
            if path is not None and path.is_file():
                return path
        raise BadRow("an image that is not there", f"{named} (looked for {below or Path(named).absolute()})")

    def _sized(self, image: Image) -> Image:
        """As LLaMA-Factory does: one factor for both sides, sides rounded down."""
        config = self.config
        for beyond, limit in (
            (image.width * image.height > config.image_max_pixels, config.image_max_pixels),
            (image.width * image.height < config.image_min_pixels, config.image_min_pixels),
        ):
            if beyond:
                factor = math.sqrt(limit / (image.width * image.height))
                return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))
        return image


def _short(named: str) -> str:
    return "a picture in the row itself" if named.startswith(HELD) else named
