"""Generation with the model as it stands in memory: in batches, or one token after another as they come."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.core.errors import DataError

if TYPE_CHECKING:
    from luthier.engines.sampling import GenerateConfig


class Engine:
    """A model that answers prompts of token ids. Adapters may be merged or not; the model is left as it was found."""

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        # PEFT's own `generate` would bring back the folder's generation config; its layers live in the base model.
        self._base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def context(self) -> int | None:
        """Most tokens the model can take, where its configuration says."""
        # Not every architecture has the attribute, and some have it under another name that only lookup knows.
        return getattr(self._base.config.get_text_config(), "max_position_embeddings", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: GenerateConfig,
        stop_ids: Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        keep_stop: bool = False,
        media: Mapping[int, Callable[[], Mapping[str, Tensor]]] | None = None,
    ) -> list[list[int]]:
        """The answer to each prompt, in order, without what follows the stop token, and without that token itself
        unless `keep_stop`.

        Prompts are batched by length, `infer_batch_size` at a time. An answer depends on its prompt and on its
        seed (`seeds`, one per prompt; by default 0, 1, 2 ...), not on what shares the batch; only sampling with
        beams draws from torch's global generator. media: for prompts that show images, by place, what makes the
        tensors the model is given of them; each has a batch of its own. Raises DataError for a prompt that leaves no
        room for an answer.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        rooms = [self._room(prompt, sampling) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        with self._speaking():
            for rows in self._batches(
                [len(prompt) for prompt in prompts], rooms, sampling.infer_batch_size, media or ()
            ):
                new_tokens = max(rooms[i] for i in rows)
                shown = media[rows[0]]() if media and rows[0] in media else {}
                new = self._batch(
                    [prompts[i] for i in rows], sampling, stop_ids, new_tokens, [seeds[i] for i in rows], shown
                )
                for i, ids in zip(rows, new):
                    answers[i] = _until_stop(ids[: rooms[i]], stop_ids, keep_stop)
        return answers

    def stream(
        self, prompt: Sequence[int], sampling: GenerateConfig, stop_ids: Sequence[int], *, seed: int = 0
    ) -> Iterator[str]:
        """The answer to one prompt as pieces of text, each given out when its characters are whole.

        The pieces joined are the text of what `generate` gives for the same seed. Closing the iterator stops the
        model at once. Beam search comes as one piece.
        """
        if sampling.num_beams > 1:
            yield self.text(self.generate([prompt], sampling, stop_ids, seeds=[seed])[0], sampling)
            return
        pieces = _Detokenizer(self.tokenizer, skip_special_tokens=sampling.skip_special_tokens)
        for token in self._tokens(prompt, sampling, stop_ids, seed):
            if piece := pieces.add(token):
                yield piece
        if rest := pieces.finish():
            yield rest

    def text(self, ids: Sequence[int], sampling: GenerateConfig) -> str:
        """Generated ids as text, spaces left as they are."""
        return _decode(self.tokenizer, ids, sampling.skip_special_tokens)

    def _batches(
        self, lengths: Sequence[int], rooms: Sequence[int], size: int, alone: Container[int] = ()
    ) -> Iterator[list[int]]:
        """Prompts of like length, the longest first, and never one that would run past the context with the others."""
        yield from ([i] for i in range(len(lengths)) if i in alone)
        batch: list[int] = []
        for i in sorted((i for i in range(len(lengths)) if i not in alone), key=lambda i: lengths[i], reverse=True):
            over = bool(batch) and self.context is not None and lengths[batch[0]] + rooms[i] > self.context
            if over or len(batch) == size:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _room(self, prompt: Sequence[int], sampling: GenerateConfig) -> int:
        room = sampling.room(len(prompt), self.context)
        if not len(prompt):
            raise DataError("a prompt has no tokens; the model cannot begin from nothing. Give it some text.")
        if room < 1:
            raise DataError(
                f"a prompt of {len(prompt)} tokens leaves no room for an answer: the model takes {self.context} tokens,"
                f" max_length is {sampling.max_length}, max_new_tokens is {sampling.max_new_tokens}."
                " Shorten the prompt or raise the limit."
            )
        return room

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: GenerateConfig,
        stop_ids: Sequence[int],
        new_tokens: int,
        seeds: Sequence[int],
        shown: Mapping[str, Tensor],
    ) -> list[list[int]]:
        ids, mask = _pad_left(prompts, self._base.device)
        media = {name: self._placed(tensor) for name, tensor in shown.items()}
        config = sampling.to_hf(new_tokens=new_tokens, stop_ids=stop_ids, pad_id=self._pad_id(stop_ids))
        steps = _sampler(sampling, seeds)
        out = self._base.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=steps, **media
        )
        return out[:, ids.shape[1] :].tolist()

    def _placed(self, tensor: Tensor) -> Tensor:
        """Where the model is, in its number format."""
        return tensor.to(self._base.device, self._base.dtype if tensor.is_floating_point() else None)

    def _tokens(
        self, prompt: Sequence[int], sampling: GenerateConfig, stop_ids: Sequence[int], seed: int
    ) -> Iterator[int]:
        room = self._room(prompt, sampling)
        steps = _sampler(sampling, [seed])
        if sampling.repetition_penalty != 1:
            steps.insert(0, RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        seen = torch.tensor([list(prompt)], device=self._base.device)
        new, cache = seen, None
        for _ in range(room):
            # Between two tokens the caller runs: neither inference mode nor eval may leak to it.
            with self._speaking():
                out = self._base(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                new = steps(seen, out.logits[:, -1].float()).argmax(-1, keepdim=True)
                seen = torch.cat([seen, new], dim=1)
            token = int(new)
            if token in stop_ids:
                return
            yield token

    def _pad_id(self, stop_ids: Sequence[int]) -> int:
        known = self.tokenizer.pad_token_id
        return known if known is not None else next(iter(stop_ids), 0)

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Eval mode and no gradients; the generation config of the model's folder set aside, since it would leak."""
        training = [module for module in self.model.modules() if module.training]
        folder, self._base.generation_config = self._base.generation_config, GenerationConfig()
        if training:
            self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self._base.generation_config = folder
            for module in training:
                module.training = True


class GumbelNoise(LogitsProcessor):
    """Turns taking the largest logit into drawing from their softmax, each row with a generator of its own.

    argmax(logits + g) with g ~ Gumbel(0, 1) is a draw from softmax(logits) (Gumbel 1954; "the Gumbel-max trick").
    """

    def __init__(self, seeds: Sequence[int]):
        self.seeds = seeds
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: float [rows, V]."""
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(int(seed)) for seed in self.seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators):
            row.exponential_(generator=generator)
        return scores - noise.log()


class _Detokenizer:
    """Text as tokens come, without showing half a character.

    What the last tokens look like depends on those before them, so the text is that of a window of tokens minus
    that of the part already shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._window = 0
        self._shown = 0

    def add(self, token: int) -> str:
        """What can be shown now that this token is here; empty in the middle of a character."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window, self._shown = self._shown, len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back, as it is."""
        text = self._new_text()
        self._window = self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = _decode(self._tokenizer, self._ids[self._window : self._shown], self._skip)
        return _decode(self._tokenizer, self._ids[self._window :], self._skip)[len(before) :]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], skip_special_tokens: bool) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [rows, longest]. Rows are filled with their own first token, which no penalty minds."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    return ids, mask.long()


def _sampler(sampling: GenerateConfig, seeds: Sequence[int]) -> LogitsProcessorList:
    """What happens to the logits before the largest is taken: nothing, or all of sampling."""
    steps = LogitsProcessorList()
    if not sampling.do_sample or sampling.num_beams > 1:
        return steps
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    steps.append(GumbelNoise(seeds))
    return steps


def _until_stop(ids: list[int], stop_ids: Sequence[int], keep_stop: bool) -> list[int]:
    return next((ids[: i + keep_stop] for i, token in enumerate(ids) if token in stop_ids), ids)
