"""A processor for images alone, of a model whose own could take videos too, where torchvision is not installed.

transformers wants torchvision for videos, and then refuses the whole processor; for images Pillow is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.video_processing_utils import VideoProcessorMixin

from luthier.core.errors import ModelError
from luthier.core.log import get_logger

log = get_logger("model")

PARTS = ("image_processor", "tokenizer", "video_processor")


class NoVideos(VideoProcessorMixin):
    """Stands where a processor keeps what takes its videos."""

    def preprocess(self, videos: Any, **kwargs: Any) -> Any:
        """Raises ModelError."""
        raise ModelError("Videos need torchvision, in the build that belongs to your torch.")


class ImagesOnly:
    """In front of a kind of processor: it may be made with `NoVideos`, and pickled for worker processes."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As ProcessorMixin's, which without torchvision does not know any class for videos."""
        if isinstance(argument, NoVideos):
            return NoVideos
        return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self).__mro__[2], vars(self))


def images_only(
    name: str | Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, where: Mapping[str, Any]
) -> ProcessorMixin | None:
    """The processor that transformers has for this configuration, without its part for videos; None if it has none, or
    one that needs more than images and text. where: revision, cache and the like, as `from_pretrained` takes them."""
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or set(kind.get_attributes()) != set(PARTS):
        return None
    said, _ = kind.get_processor_dict(name, **where)
    parts = dict(zip(PARTS, (AutoImageProcessor.from_pretrained(name, **where), tokenizer, NoVideos())))
    return _of(kind).from_args_and_dict([parts[part] for part in kind.get_attributes()], said)


@functools.cache
def _of(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    log.info("torchvision is not installed: %s takes images, and no videos.", kind.__name__)
    return type(kind.__name__, (ImagesOnly, kind), {})


def _again(kind: type[ProcessorMixin], state: Mapping[str, Any]) -> ProcessorMixin:
    processor = object.__new__(_of(kind))
    vars(processor).update(state)
    return processor
