"""The processor of a model that reads images: loaded with the model's tokenizer, kept beside what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.source import ModelConfig, hub, model_folder, no_source, sees

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")
"""What a processor consists of beside the tokenizer, each where the model has it."""


def load_processor(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """transformers' processor of a model, with this tokenizer as its own; None for a model that reads text alone.

    Raises ModelError where the model has none, or where a package is missing.
    """
    name = config.model_name_or_path
    folder = model_folder(config)
    if folder is not None and not (folder / "config.json").exists():
        return None  # a tokenizer alone
    from transformers import AutoConfig, AutoProcessor, ProcessorMixin

    where = {"trust_remote_code": config.trust_remote_code, **hub(config)}
    try:
        settings = AutoConfig.from_pretrained(folder or name, **where)
        if not sees(settings):
            return None
        try:
            processor = AutoProcessor.from_pretrained(folder or name, **where)
        except ImportError:
            from luthier.model.images_only import images_only

            processor = images_only(folder or name, settings, tokenizer, where)
            if processor is None:
                raise
    except ImportError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{name}: its processor needs a package that is missing: {reason} Install pillow, and torchvision in the "
            "build that belongs to your torch."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(no_source("model_name_or_path", name, folder, error)) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"model_name_or_path: {name} reads images and has no processor (preprocessor_config.json or "
            "processor_config.json). Copy these files from the model it was made from."
        )
    processor.tokenizer = tokenizer
    return processor


class KeepProcessor:
    """Puts the processor's files, as they are, into every folder that a run saves."""

    def __init__(self, config: ModelConfig):
        from transformers.utils import cached_file

        name = config.model_name_or_path
        folder = model_folder(config)
        found = [
            cached_file(str(folder or name), file, _raise_exceptions_for_missing_entries=False, **hub(config))
            for file in FILES
        ]
        self.files = [Path(file) for file in found if file is not None]

    def __call__(self, folder: Path) -> None:
        """Copy them."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
