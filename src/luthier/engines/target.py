"""A model that remembers what it computed: drafts are verified, and drafted, in one pass over the tokens that are new.

The cache keeps every token in every layer, in sliding ones too, where the model's own mask hides what lies outside the
window: so any number of tokens can be taken back, which caches cut to the window cannot do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from luthier.core.errors import ModelError
from luthier.core.prefix import common_prefix

KINDS = {"full_attention", "sliding_attention"}
"""Layers whose cached tokens can be taken back. States of recurrent layers cannot."""

TAKES_MASKS = {"sdpa", "eager", "luthier"}
"""Attention implementations that take a ready-made mask; `luthier` is that of training."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference between logits with and without cache, as a share of the largest logit; 0.25 in 16 bits."""

PROBE = 12
"""Tokens that a new cache is checked with."""


@dataclass(frozen=True)
class Pass:
    """What one pass of a model says about some tokens."""

    logits: Tensor
    """float [X, V], float32 or wider."""
    hidden: Tensor
    """float [X, H]: what the output head read, after the final norm."""


class Cached:
    """A model with a KV cache of its own, for one sequence at a time.

    model: in evaluation mode; a PeftModel speaks with its adapter. within: what every pass happens in, such as
    `model.disable_adapter`. Raises ModelError for a model whose cache cannot be rewound.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, *, within: Callable[[], AbstractContextManager[Any]] = nullcontext
    ):
        # PEFT's layers live in the base model; its wrapper adds nothing to a forward pass.
        self.model: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
        self.within = within
        self.passes = 0
        """Forward passes so far."""
        self.computed = 0
        """Tokens computed so far."""
        self._cache = DynamicCache()
        self._ids: list[int] = []
        """What is cached."""
        _refuse(self.model)
        self._check()

    @property
    def device(self) -> torch.device:
        """Where its input goes."""
        return self.model.get_input_embeddings().weight.device

    @property
    def vocabulary(self) -> int:
        """Rows of the output."""
        return self.model.get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def run(self, ids: Sequence[int], keep: int = 1, *, block: int | None = None) -> Pass:
        """Logits [keep, V] and hidden states [keep, H] at the last `keep` of `ids`.

        The longest beginning that the last call had too is not computed again. block: from this token on all tokens
        see one another, also those after them; they are not remembered.
        """
        ids = list(ids)
        if not 1 <= keep <= len(ids):
            raise ValueError(f"keep {keep} of {len(ids)} tokens")
        start = self._rewind(ids, len(ids) - keep if block is None else min(block, len(ids) - keep))
        new = torch.tensor([ids[start:]], device=self.device)
        mask = {} if block is None else {"attention_mask": self._mask(start, len(ids), block)}
        # A pass that is interrupted leaves nothing to go on from.
        self._ids = []
        with self.within(), tapped(self.model.get_output_embeddings()) as tap:
            out = self.model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=keep, **mask)
        self._ids = ids
        self.passes += 1
        self.computed += new.shape[1]
        if block is not None:
            self._rewind(ids, block)
        logits, hidden = out.logits[0, -keep:], tap.hidden[0, -keep:]
        return Pass(logits if logits.dtype == torch.float64 else logits.float(), hidden)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache, self._ids = DynamicCache(), []

    def _rewind(self, ids: Sequence[int], most: int) -> int:
        """Forget what is no beginning of `ids`, and all after the first `most` tokens; returns how many are left."""
        start = min(common_prefix(self._ids, ids), most)
        if start == 0:
            self.forget()
        elif start < len(self._ids):
            # A negative number of tokens to remove means the same in every release of transformers.
            self._cache.crop(start - len(self._ids))
            self._ids = self._ids[:start]
        return start

    def _mask(self, start: int, stop: int, block: int) -> Tensor | dict[str, Tensor]:
        """What tokens `start` to `stop` see of all before `stop`, as transformers takes it: one additive mask
        [1, 1, Q, K], or one for each kind of layer."""
        if (attention := self.model.config._attn_implementation) not in TAKES_MASKS:
            raise ModelError(
                f"{_name(self.model)} attends by {attention}, which takes no mask of its own; the hybrid layout of "
                "accept heads needs flash_attn: sdpa or disabled."
            )
        query = torch.arange(start, stop, device=self.device)[:, None]
        key = torch.arange(stop, device=self.device)
        sees = (key <= query) | ((key >= block) & (query >= block))

        def additive(window: int | None) -> Tensor:
            hidden = ~sees if window is None else ~sees | (query - key >= window)
            # Eager attention adds its mask: booleans would be added as 0 and 1.
            mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
            return mask.masked_fill(hidden, torch.finfo(self.model.dtype).min)[None, None]

        config = self.model.config.get_text_config()
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        if not kinds:
            return additive(window)
        return {kind: additive(window if kind == "sliding_attention" else None) for kind in sorted(set(kinds))}

    def _check(self) -> None:
        """Raise ModelError unless passes with the cache, taken back and gone on with, equal one without."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        ids = [(7 * i + 10) % rows for i in range(PROBE)]
        astray = [(token + 3) % rows for token in ids[4:]]
        with torch.no_grad(), self.within():
            plain = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=False).logits[0, -5:]
        try:
            self.run([*ids[:4], *astray])
            self.run(ids[:7], 2)
            found = self.run(ids, 5).logits
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            raise ModelError(f"{_name(self.model)} cannot be used with a cache of keys and values: {error}") from error
        worst, scale = float((found - plain.to(found.dtype)).abs().max()), float(plain.abs().max())
        if not worst <= TOLERANCE.get(self.model.dtype, 0.25) * scale:
            raise ModelError(
                f"{_name(self.model)} says something else when part of a text is cached (logits up to {scale:.3g} "
                f"differ by {worst:.3g}), so drafts cannot be taken back. Use it without speculation (leave draft out)."
            )
        self.passes = self.computed = 0


class Target(Cached):
    """The model whose word counts."""

    def verify(self, ids: Sequence[int], draft: Sequence[int]) -> Pass:
        """One pass over a draft of g tokens that follows `ids`.

        logits [g + 1, V]: row i judges draft[i], having read what comes before it; the last is the bonus after a draft
        that is accepted whole. hidden [g, H]: at each draft token, so one position later than the logits beside it.
        """
        found = self.run([*ids, *draft], len(draft) + 1)
        return Pass(found.logits, found.hidden[1:])


@dataclass(frozen=True)
class Draft:
    """Tokens somebody thinks the target would say next; there may be none."""

    ids: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    """float [len(ids), V] of the distribution each was taken from, V the target's; None where there is none."""


class Drafter(Protocol):
    """Proposes what comes next; see drafters/."""

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        """At most `count` tokens that may follow `ids`."""

    def forget(self) -> None:
        """Let go of what is remembered of earlier texts."""


@dataclass
class _Tap:
    hidden: Tensor | None = None


@contextmanager
def tapped(head: nn.Module) -> Iterator[Any]:
    """Within this context `hidden` of what is yielded is what `head` read last."""
    tap = _Tap()

    def read(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        tap.hidden = given[0]

    handle = head.register_forward_pre_hook(read)
    try:
        yield tap
    finally:
        handle.remove()


def _refuse(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - KINDS)
    if model._is_stateful or model.config.is_encoder_decoder or odd:
        why = f"layers of the kind {', '.join(odd)}" if odd else "a state that is not a cache of keys and values"
        raise ModelError(
            f"{_name(model)} has {why}, which cannot take back tokens that were not accepted. Speculation works with "
            "models whose layers are full or sliding-window attention; use this one without (leave draft out)."
        )


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} ({model.name_or_path or 'in memory'})"
