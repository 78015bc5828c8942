"""The one attention rule, `k <= q < end[k]`, computed by whichever backend suits the batch.

    plain      rows that hold one chain each: the model's own causal attention; padding sits to the right, unseen
    dense      a boolean [T, T] mask for SDPA: few, short runs
    segments   run by run on CPU: each run attends to the runs above it and causally to itself, so that nothing
               outside the rule is computed (a dense mask computes all T x T pairs)
    flex       FlexAttention with a block mask on GPU: compiled once, the mask built once per batch

Models reach it through transformers' `AttentionInterface` under the name `luthier`; no model code is touched. The
plan of a batch travels as a keyword argument of the forward call, so that gradient checkpointing sees it again when
it recomputes. Without a plan (generation), the same name is transformers' own SDPA attention. Models that need eager
attention (logit soft-caps, attention sinks) get additive float masks instead, one per kind of layer: a boolean mask is
silently added as 0/1 by eager attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.batch import Batch
from luthier.core.errors import ModelError

NAME = "luthier"
"""The attention implementation registered with transformers."""

# One small SDPA call costs about as much as this many query-key pairs of a dense one (measured on CPU, head size 64).
SEGMENT_OVERHEAD = 16 * 1024


@dataclass
class Plan:
    """How one batch is attended to; built once, used by every layer."""

    kind: str
    position: Tensor
    """int64 [R, T]"""
    end: Tensor
    """int64 [R, T]"""
    segments: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    block: Tensor | None = None
    """int64 [R, T] or None: see `Batch.block`."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Masks by window, shared by the layers of one forward pass."""

    def mask(self, window: int | None) -> Tensor:
        """bool [R, 1, T, T], True where a query may look."""
        if window not in self.cache:
            self.cache[window] = tree_mask(self.position, self.end, window, self.block)
        return self.cache[window]


def tree_mask(position: Tensor, end: Tensor, window: int | None = None, block: Tensor | None = None) -> Tensor:
    """bool [R, 1, T, T] from position and end, int64 [R, T]: the rule; a window keeps the nearest `window` depths.

    block: int64 [R, T], tokens of one block see one another whatever their order.
    """
    index = torch.arange(end.shape[1], device=end.device)
    sees = (index[None, None, :] <= index[None, :, None]) & (index[None, :, None] < end[:, None, :])
    if block is not None:
        sees |= (block[:, :, None] == block[:, None, :]) & (block[:, :, None] >= 0)
    if window is not None:
        sees &= position[:, :, None] - position[:, None, :] < window
    return sees[:, None]


def choose(batch: Batch, *, backend: str | None = None) -> Plan:
    """The plan for a batch: the cheapest exact way, or `backend` if the caller insists."""
    if backend is None:
        backend = _cheapest(batch)
    return Plan(backend, batch.position, batch.end, batch.segments, batch.block)


def _cheapest(batch: Batch) -> str:
    if batch.layout == "padded":
        return "plain" if batch.block is None else "flex" if batch.ids.is_cuda else "dense"
    if batch.ids.is_cuda:
        return "flex"
    dense = batch.ids.shape[1] ** 2
    if dense <= 4 * SEGMENT_OVERHEAD:
        return "dense"
    return "segments" if segment_pairs(batch.segments) < dense else "dense"


def segment_pairs(segments: tuple[tuple[int, int, tuple[int, ...]], ...]) -> int:
    """Query-key pairs the segments backend computes, with the cost of its calls in the same unit."""
    lengths = [stop - start for start, stop, _ in segments]
    return sum(
        length * (length + sum(lengths[above] for above in ancestors)) + SEGMENT_OVERHEAD
        for length, (_, _, ancestors) in zip(lengths, segments)
    )


def install(model: nn.Module) -> str:
    """Make `model` attend by plan; returns `luthier`, or the model's own implementation: `eager` for models that need
    masks instead, any for those whose layers take none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    own = model.config._attn_implementation
    if own == "eager" or _unmasked(model.config.get_text_config()):
        # Code of such layers (DeepSeek V3.2) also asks which implementation it is, and sees all where it knows none.
        return own
    model.set_attn_implementation(NAME)
    return NAME


def forward_arguments(
    model_config: Any, implementation: str, plan: Plan, dtype: torch.dtype, *, explicit: bool = False
) -> dict[str, Any]:
    """The mask-related keyword arguments of the model's forward call.

    Padded rows need none: that is what every model computes by itself. Else positions and a mask go together; a 4-D
    mask is returned as it is by transformers' mask builders, which also keeps them from guessing packed documents out
    of the positions. explicit: give the language model its mask, and no plan that other parts would find.
    """
    if plan.kind == "plain":
        return {}
    kinds = getattr(model_config, "layer_types", None)
    if unknown := _unmasked(model_config):
        # Llama 4's chunks or a state would go unnoticed in rows shorter than they reach.
        raise ModelError(f"layers of the kind {', '.join(unknown)} take no attention mask; set layout: padded")
    if implementation == NAME and not explicit:
        placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=plan.end.device)
        return {"position_ids": plan.position, "attention_mask": placeholder, "luthier_plan": plan}
    window = getattr(model_config, "sliding_window", None)

    def written(sees: Tensor) -> Tensor:
        return sees if implementation == NAME else _additive(sees, dtype)

    masks = {
        "full_attention": lambda: written(plan.mask(None)),
        "sliding_attention": lambda: written(plan.mask(window)),
    }
    if not kinds:
        mask = masks["sliding_attention" if window else "full_attention"]()
        return {"position_ids": plan.position, "attention_mask": mask}
    return {"position_ids": plan.position, "attention_mask": {kind: masks[kind]() for kind in sorted(set(kinds))}}


def _unmasked(model_config: Any) -> list[str]:
    """The kinds of layers that no mask of ours can steer."""
    return sorted(set(getattr(model_config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    luthier_plan: Plan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls. query [R, H, T, D], key and value [R, Hkv, T, D] -> [R, T, H, D]."""
    if luthier_plan is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is not None and attention_mask.numel() != 1:
        # Some families (Doge) write what they have learnt into the mask; of the placeholder they make one of their own.
        raise ModelError(f"{type(module).__name__} makes a mask of its own; set layout: padded")
    for unsupported in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(unsupported) is not None:
            raise ValueError(f"attention with {unsupported} needs the eager implementation; set flash_attn: disabled")
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and luthier_plan.kind != "flex":
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    window = kwargs.get("sliding_window")
    out = BACKENDS[luthier_plan.kind](luthier_plan, query, key, value, scaling, dropout, window)
    return out.transpose(1, 2).contiguous(), None


def _dense(plan: Plan, query, key, value, scale, dropout, window):
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=plan.mask(window), dropout_p=dropout, scale=scale
    )


def _segments(plan: Plan, query, key, value, scale, dropout, window):
    lengths = [stop - start for start, stop, _ in plan.segments]
    # `split` keeps one backward node for all runs; slicing would make a full-size gradient for each of them.
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    pieces = []
    mutual = [plan.block is not None and bool(plan.block[0, start] >= 0) for start, _, _ in plan.segments]
    for index, (_, _, ancestors) in enumerate(plan.segments):
        above = sum(lengths[a] for a in ancestors)
        seen = (*ancestors, index)
        k = torch.cat([keys[s] for s in seen], 2) if ancestors else keys[index]
        v = torch.cat([values[s] for s in seen], 2) if ancestors else values[index]
        plain = not mutual[index] and not ancestors and (window is None or lengths[index] <= window)
        mask = None if plain else _run_mask(plan, lengths[index], above, window, mutual[index])
        pieces.append(
            F.scaled_dot_product_attention(
                queries[index], k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=plain
            )
        )
    return torch.cat(pieces, 2)


def _run_mask(plan: Plan, length: int, above: int, window: int | None, mutual: bool) -> Tensor:
    """bool [length, above + length]: a run of `length` tokens below `above` others, causal (or, mutual, seeing itself
    both ways), within the window."""
    name = (length, above, window, mutual)
    if name not in plan.cache:
        device = plan.end.device
        distance = torch.arange(above, above + length, device=device)[:, None] - torch.arange(
            above + length, device=device
        )
        seen = (distance >= 0) | mutual
        plan.cache[name] = seen if window is None else seen & (distance < window)
    return plan.cache[name]


def _flex(plan: Plan, query, key, value, scale, dropout, window):
    if dropout:
        raise ValueError("FlexAttention has no dropout; set attention_dropout to 0 or layout: padded")
    from torch.nn.attention.flex_attention import create_block_mask

    name = ("block", window)
    if name not in plan.cache:
        end, position, block = plan.end, plan.position, plan.block

        def rule(row, head, q, k):
            sees = (k <= q) & (q < end[row, k])
            if block is not None:
                sees = sees | ((block[row, q] == block[row, k]) & (block[row, q] >= 0))
            return sees if window is None else sees & (position[row, q] - position[row, k] < window)

        rows, length = end.shape
        plan.cache[name] = create_block_mask(rule, rows, None, length, length, device=end.device)
    return _compiled_flex(query.is_cuda)(
        query, key, value, block_mask=plan.cache[name], scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


_flex_kernel: list[Any] = []


def _compiled_flex(on_gpu: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not on_gpu:
        return flex_attention
    if not _flex_kernel:
        # dynamic=True: a new length costs nothing; specialising costs seconds of compilation for each.
        _flex_kernel.append(torch.compile(flex_attention, dynamic=True))
    return _flex_kernel[0]


BACKENDS = {"dense": _dense, "segments": _segments, "flex": _flex}
