"""Qwen2-VL's processor without videos: its own class wants torchvision for them. A module of its own, to be pickled."""

from __future__ import annotations

import transformers


class ImagesOnly(transformers.ProcessorMixin):
    return_mm_token_type_ids = True
    replace_image_token = transformers.Qwen2VLProcessor.replace_image_token

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
