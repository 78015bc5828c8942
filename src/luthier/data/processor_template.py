"""Messages with images to ids, through the model's own processor: its chat template, its expansion of each image.

What is trained is found as in `chat_template.py`. In the rendered text each image is a sentence of private characters
that names it, so that a piece of text knows its images wherever it was cut out. Image tokens leave here as negative
numbers that say of which image they are; `settle` makes them what they are and refuses rows that lost some on the way
through a stage's cuts: an image is shown whole, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from luthier.core.errors import TemplateError
from luthier.core.types import Encoded, Example, Message, Path
from luthier.data.chat_template import ChatTemplateRenderer
from luthier.data.chat_text import ChatText, Spans
from luthier.data.media import MARK
from luthier.data.pieces import Pieces
from luthier.data.processor import Vision
from luthier.data.source import BadRow
from luthier.data.template import TemplateConfig

OPEN, CLOSE = "\ue000", "\ue001"
NAMED = re.compile(f"{OPEN}(\\d+):(.*?){CLOSE}", re.DOTALL)
"""An image in rendered text: its number in the conversation, and its reference."""
MEDIA = "media"
"""Key of `Encoded.extra`: {"images": references, "tokens": image tokens of each, "ids": the ids of such tokens}."""


class MediaText(ChatText):
    """The processor's chat template: contents are lists of parts, and each image is named in what it writes."""

    def __init__(self, config: TemplateConfig, tokenizer: Any, vision: Vision):
        super().__init__(config, tokenizer)
        self._vision = vision

    def check_prompt(self, messages: Sequence[Message], system: str, tools: str, asked: str) -> None:
        """As in ChatText; of a message with images, the texts between them."""
        super().check_prompt([part for message in messages for part in texts_of(message)], system, tools, asked)

    def _apply(
        self, messages: Sequence[Message], system: str, tools: str, *, ask: bool, spans: bool
    ) -> tuple[str, Spans]:
        check_words(self._vision, messages, system)
        text, found = super()._apply(messages, system, tools, ask=ask, spans=spans)
        images = shown_in(messages)
        pieces = text.split(self._vision.token)
        if len(pieces) - 1 != len(images):
            raise TemplateError(
                f"the processor's chat template writes {len(pieces) - 1} images of a conversation that shows "
                f"{len(images)}."
            )
        names = [name_of(nth, named) for nth, named in enumerate(images)]
        written = pieces[0] + "".join(name + piece for name, piece in zip(names, pieces[1:]))
        return written, [(self._moved(pieces, names, a), self._moved(pieces, names, b)) for a, b in found]

    def _moved(self, pieces: Sequence[str], names: Sequence[str], at: int) -> int:
        """Where a place of the rendered text is once images are named."""
        old = new = 0
        for piece, name in zip(pieces, names):
            if at <= old + len(piece):
                break
            old, new = old + len(piece) + len(self._vision.token), new + len(piece) + len(name)
        return new + at - old

    def _dicts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        said = super()._dicts(messages)
        return [{**told, "content": _parts(message)} for told, message in zip(said, messages, strict=True)]


class MediaPieces(Pieces):
    """Pieces of text, in which named images become as many tokens as the processor says."""

    def __init__(self, tokenizer: Any, vision: Vision):
        super().__init__(tokenizer)
        self._vision = vision

    def __call__(self, text: str) -> list[int]:
        """The ids of one piece, those of images negative: see `number`."""
        if OPEN not in text:
            return super().__call__(text)
        shown = [(int(nth), *self._vision.expanded(named)) for nth, named in NAMED.findall(text)]
        written = iter(shown)
        ids = np.array(self._encode([NAMED.sub(lambda _: next(written)[1], text)])[0])
        at = np.flatnonzero(np.isin(ids, self._vision.token_ids))
        owners = np.repeat([nth for nth, _, _ in shown], [count for _, _, count in shown])
        if len(at) != len(owners):
            raise TemplateError(f"{len(shown)} images become {len(at)} tokens side by side, {len(owners)} one by one.")
        kinds = np.array([self._vision.token_ids.index(token) for token in ids[at].tolist()])
        ids[at] = -(owners * len(self._vision.token_ids) + kinds + 1)
        return ids.tolist()

    def warm(self, texts) -> None:
        """As in Pieces; texts with images are tokenised when they are asked for."""
        super().warm([text for text in texts if OPEN not in text])


class Seeing:
    """What renderers that show images have in common: `settle`, between what a stage cuts and what is stored."""

    vision: Vision

    def settle(self, example: Example, found: Sequence[Encoded], *, cutoff_len: int) -> list[Encoded]:
        """What a stage encoded, with image tokens as the model reads them and the images they stand for.

        Raises BadRow where an image token was cut away, or came of a text.
        """
        images = shown_in(example.prompt)
        if any(token in self.vision.token_ids for encoded in found for path in encoded.paths for token in path.ids):
            raise BadRow("a text that stands for an image", f"a text holds {self.vision.token!r} and shows none there")
        if not images:
            return list(found)
        tokens = [self.vision.expanded(named)[1] for named in images]
        said: Mapping[str, Any] = {"images": images, "tokens": tokens, "ids": list(self.vision.token_ids)}
        settled = []
        for encoded in found:
            kept = [self._kept(path, tokens) for path in encoded.paths]
            if None in kept or (encoded.truncated and max(filter(None, kept), default=0) < len(images)):
                raise BadRow(
                    f"images do not fit into cutoff_len={cutoff_len}",
                    f"{len(images)} images of {sum(tokens)} tokens, and {encoded.truncated} tokens would be cut",
                )
            paths = tuple(self._settled(path) for path in encoded.paths)
            settled.append(replace(encoded, paths=paths, extra={**encoded.extra, MEDIA: said}))
        return settled

    def _kept(self, path: Path, tokens: Sequence[int]) -> int | None:
        """How many of the images a path shows, from the first on; None if one is in pieces."""
        ids = np.asarray(path.ids)
        owners = (-ids[ids < 0] - 1) // len(self.vision.token_ids)
        count = int(owners.max()) + 1 if len(owners) else 0
        return count if np.bincount(owners, minlength=count).tolist() == list(tokens[:count]) else None

    def _settled(self, path: Path) -> Path:
        weights = [0.0 if token < 0 else weight for token, weight in zip(path.ids, path.weights)]
        return replace(path, ids=self._read(path.ids), weights=weights)

    def _read(self, ids: Sequence[int]) -> list[int]:
        """Ids as the model reads them."""
        own = self.vision.token_ids
        return [own[(-token - 1) % len(own)] if token < 0 else token for token in ids]


class ProcessorRenderer(Seeing, ChatTemplateRenderer):
    """The chat template of the model's processor. See `core/objective.py:Renderer`."""

    name = "processor"

    def __init__(self, config: TemplateConfig, vision: Vision):
        self.vision = vision
        tokenizer = vision.processor.tokenizer
        if vision.processor.chat_template is not None:
            tokenizer.chat_template = vision.processor.chat_template
        text, pieces = MediaText(config, tokenizer, vision), MediaPieces(tokenizer, vision)
        super().__init__(config, tokenizer, text=text, pieces=pieces)

    def prompt(self, messages: Sequence[Message], *, system: str = "", tools: str = "") -> list[int]:
        """See Renderer: ids as the model reads them."""
        return self._read(super().prompt(messages, system=system, tools=tools))

    def fingerprint(self) -> str:
        """Everything beside the tokenizer's files and the images that decides ids."""
        return repr((super().fingerprint(), self.vision.fingerprint()))


def name_of(nth: int, named: str) -> str:
    """What stands in rendered text for the nth image of a conversation."""
    return f"{OPEN}{nth}:{named}{CLOSE}"


def shown_in(messages: Sequence[Message]) -> list[str]:
    """The images of a conversation, in order."""
    return [named for message in messages for named in message.media]


def check_words(vision: Vision, messages: Sequence[Message], system: str) -> None:
    """Raise TemplateError for a text that holds what would be taken for an image."""
    forbidden = (*vision.reserved, OPEN, CLOSE)
    texts = [system, *(part.content for message in messages for part in texts_of(message))]
    word = next((word for word in forbidden for text in texts if word in text), None)
    if word is not None:
        raise TemplateError(
            f"a text holds {word!r}, which stands for an image, and the row shows none there. Name the column of "
            "the images with columns: {images: ...}, or mend the text."
        )


def texts_of(message: Message) -> list[Message]:
    """A message as the texts between its images."""
    if not message.media:
        return [message]
    return [replace(message, content=text, media=()) for text in message.content.split(MARK)]


def _parts(message: Message) -> list[dict[str, str]]:
    """A content as templates of processors read it."""
    parts: list[dict[str, str]] = []
    for nth, text in enumerate(message.content.split(MARK) if message.media else [message.content]):
        parts += [{"type": "image"}] if nth else []
        parts += [{"type": "text", "text": text}] if text else []
    return parts
