"""The model as objectives see it: log-probs of supervised tokens, whatever the layout of the batch.

Only the hidden states at the parents of supervised tokens reach the output head, in chunks, with the softmax in
float32: peak memory does not grow with vocabulary x length. A tap in front of the head (a forward pre-hook on the
module that `get_output_embeddings` names) takes the hidden states out of an ordinary forward call, so that DDP, FSDP,
DeepSpeed, PEFT and gradient checkpointing see nothing unusual.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from luthier.core.batch import Alone, Batch
from luthier.core.errors import ModelError
from luthier.model import attention

CHUNK_ELEMENTS = 2**26
"""Logits held at once (tokens x vocabulary). Beyond one chunk, chunks are recomputed in the backward pass."""


REFERENCE_COLUMN = "reference_logp"
"""Column of precomputed reference log-probs."""


class HiddenTap:
    """Takes the hidden states in front of the output head out of a forward call.

    While `open`, the head is given a single position, so that the model's own logits cost nothing.
    """

    def __init__(self, head: nn.Module):
        self.open = False
        self.hidden: Tensor | None = None
        self.handle = head.register_forward_pre_hook(self._tap)

    def _tap(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not self.open:
            return None
        self.hidden = args[0]
        return (args[0][:, :1], *args[1:])

    @contextlib.contextmanager
    def opened(self):
        """Within this context forward calls leave their hidden states in `hidden`."""
        self.open = True
        try:
            yield self
        finally:
            self.open, self.hidden = False, None


@dataclass(frozen=True)
class Scores:
    """What the head says about the U distinct supervised tokens of a batch, each float [U]."""

    logp: Tensor
    mean_logp: Tensor | None
    """Mean log-prob over the vocabulary; only computed for label smoothing."""
    hit: Tensor
    """1 where the most probable token is the supervised one; no gradient."""


@dataclass
class PolicySetup:
    """What stays the same from batch to batch. One per model; `bind` gives the objective its Policy.

    model: the bare model (PreTrainedModel or PeftModel). label_smoothing: epsilon of `nll`, spread over the
    vocabulary as transformers' LabelSmoother does. backend: forces an attention backend (see `attention.py`).
    """

    model: nn.Module
    label_smoothing: float = 0.0
    backend: str | None = None
    autocast: Callable[[], Any] = contextlib.nullcontext
    head: nn.Module | None = None
    """What `verdict` asks; attached to the model by `model.heads`."""
    router: float = 0.0
    """Weight of the router's load-balancing loss of a mixture of experts, in training; 0 is none."""
    reference: Any = None
    """What `reference` asks: a `model.reference.Reference`."""
    tap: HiddenTap = field(init=False)
    implementation: str = field(init=False)

    def __post_init__(self) -> None:
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no output head; Luthier trains causal language models.")
        if self.router and "output_router_logits" not in self.model.config.get_text_config().to_dict():
            raise ModelError(
                f"moe_aux_loss_coef: {type(self.model).__name__} is no mixture of experts whose router can be asked. "
                "Leave the key out."
            )
        self.tap = HiddenTap(head)
        self.implementation = attention.install(self.model)

    def bind(self, wrapped: nn.Module | None = None) -> ModelPolicy:
        """A Policy for one batch. `wrapped` is the model as the engine wrapped it (DDP, FSDP), if it did."""
        return ModelPolicy(self, self.model if wrapped is None else wrapped)

    def close(self) -> None:
        """Take the hook off the model again."""
        self.tap.handle.remove()

    @contextlib.contextmanager
    def detached(self):
        """Within this context the model carries no hook of ours, so that it can be copied."""
        self.close()
        try:
            yield
        finally:
            self.tap = HiddenTap(self.model.get_output_embeddings())


class ModelPolicy:
    """Answers an objective's questions about one batch, with one forward pass however many it asks."""

    def __init__(self, setup: PolicySetup, model: nn.Module):
        self._setup = setup
        self._model = model
        self._asked: tuple[Batch, Scores] | None = None
        self._seen: tuple[Batch, Tensor] | None = None
        self._balance: Tensor | None = None

    def logps(self, batch: Batch) -> Tensor:
        """log p(token | its path), float [E]."""
        return self._scores(batch).logp[batch.edge]

    def nll(self, batch: Batch) -> Tensor:
        """-log p, or with label smoothing (1 - eps) * -log p + eps * mean over the vocabulary of -log p; float [E]."""
        scores, epsilon = self._scores(batch), self._setup.label_smoothing
        if scores.mean_logp is None:
            return -scores.logp[batch.edge]
        return -((1 - epsilon) * scores.logp + epsilon * scores.mean_logp)[batch.edge]

    def hits(self, batch: Batch) -> Tensor:
        """1 where the most probable token is the supervised one, else 0; float [E]."""
        return self._scores(batch).hit[batch.edge]

    def verdict(self, batch: Batch) -> Tensor:
        """The head's output at each answer's last token, [N, width]."""
        return self._judge(batch, batch.last)

    def verdict_at_tokens(self, batch: Batch) -> Tensor:
        """The head's output at each supervised token itself (not at its parent), [E, width]."""
        return self._judge(batch, batch.target)[batch.edge]

    def hidden_at_tokens(self, batch: Batch) -> Tensor:
        """The hidden states at each supervised token itself, [E, H]: what `verdict_at_tokens` asks the head about."""
        return self._flat(batch)[batch.target][batch.edge]

    def reference(self, batch: Batch) -> Tensor:
        """`logps` of the frozen reference; those stored in the column `reference_logp` if the batch brings it."""
        stored = batch.columns.get(REFERENCE_COLUMN)
        if stored is not None:
            return stored
        assert self._setup.reference is not None, "the objective did not declare frozen = ('reference',)"
        return self._setup.reference.logps(batch)

    @property
    def _balances(self) -> bool:
        return bool(self._setup.router) and self._setup.model.training

    def router_loss(self, batch: Batch) -> Tensor | None:
        """This micro-batch's share of the router's load-balancing loss, weighted; None where there is none.

        That loss is a product of means, so it is taken over each micro-batch, as transformers does; the shares are
        those of the step's examples.
        """
        if not self._balances:
            return None
        self._flat(batch)
        assert self._balance is not None, "the model gave no load-balancing loss"
        examples = len(batch.names)
        share = examples / max((batch.totals or {}).get("group", examples), 1)
        return self._setup.router * share * self._balance

    def _judge(self, batch: Batch, at: Tensor) -> Tensor:
        head, flat = self._setup.head, self._flat(batch)
        assert head is not None, "the objective did not declare a head"
        picked = flat[at] if len(at) else flat[:0] + flat.sum() * 0
        verdict = head(picked.to(next(head.parameters()).dtype))
        # Without answers the head and the model still get their (zero) gradients: see `_hidden`.
        return verdict if len(at) else verdict + flat.sum() * 0

    def _scores(self, batch: Batch) -> Scores:
        if self._asked is None or self._asked[0] is not batch:
            self._asked = (batch, self._score(self._hidden(batch), batch))
        return self._asked[1]

    def _flat(self, batch: Batch) -> Tensor:
        """Hidden states of every token, [R * T, H]: one forward pass however many questions."""
        if self._seen is None or self._seen[0] is not batch:
            setup = self._setup
            plan = attention.choose(batch, backend=setup.backend)
            dtype = setup.model.get_input_embeddings().weight.dtype
            masks = _masks(setup, batch, plan, dtype)
            if self._balances:
                masks = _with_router(batch, plan, masks)
            media = media_arguments(batch, dtype)
            with setup.tap.opened() as tap:
                output = self._model(input_ids=batch.ids, use_cache=False, **masks, **media)
                hidden = tap.hidden
            self._balance = output.aux_loss if self._balances else None
            assert hidden is not None, "the output head was not called"
            self._seen = (batch, hidden.reshape(-1, hidden.shape[-1]))
        return self._seen[1]

    def _hidden(self, batch: Batch) -> Tensor:
        """Hidden states at the parents of supervised tokens, [U, H]."""
        flat = self._flat(batch)
        picked = flat[batch.source]
        # A batch without supervised tokens still belongs to the step: every parameter gets a (zero) gradient.
        return picked if len(picked) else flat[:0] + flat.sum() * 0

    def _score(self, hidden: Tensor, batch: Batch) -> Scores:
        labels = batch.ids.reshape(-1)[batch.target]
        head = self._setup.model.get_output_embeddings()
        rows = max(1, CHUNK_ELEMENTS // _vocabulary(self._setup.model))
        one_chunk = len(hidden) <= rows
        smooth = self._setup.label_smoothing > 0
        pieces = []
        for start in range(0, max(len(hidden), 1), rows):
            part = hidden[start : start + rows], labels[start : start + rows]
            if one_chunk or not torch.is_grad_enabled():
                pieces.append(self._score_chunk(head, smooth, *part))
            else:
                pieces.append(checkpoint(self._score_chunk, head, smooth, *part, use_reentrant=False))
        logp, mean_logp, hit = (torch.cat(column) for column in zip(*pieces))
        if not len(hidden):
            logp = logp + hidden.sum()
        return Scores(logp, mean_logp if smooth else None, hit)

    def _score_chunk(self, head: nn.Module, smooth: bool, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with self._setup.autocast():
            # FSDP2 gathers the head with the final norm and keeps both until the backward pass; its hooks, which count
            # the calls of such a group, would take this one for the next forward pass.
            logits = head.forward(hidden) if isinstance(head, FSDPModule) else head(hidden)
        logits = shape_logits(self._setup.model.config, logits if logits.dtype == torch.float64 else logits.float())
        total = logits.logsumexp(-1)
        logp = logits.gather(-1, labels[:, None])[:, 0] - total
        mean = logits.mean(-1) - total if smooth else logp.detach()
        with torch.no_grad():
            hit = (logits.argmax(-1) == labels).to(logp.dtype) if len(labels) else logp.detach()
        return logp, mean, hit


def _masks(setup: PolicySetup, batch: Batch, plan: attention.Plan, dtype: torch.dtype) -> dict[str, Any]:
    """Forward arguments that say who sees whom and where tokens are; what sees images attends in its own way."""
    text = setup.model.config.get_text_config()
    masks = attention.forward_arguments(text, setup.implementation, plan, dtype, explicit=bool(batch.media))
    if batch.alone is not None:
        masks["position_ids"] = _own_positions(setup.model, batch, batch.alone)
    return masks


def _own_positions(model: nn.Module, batch: Batch, alone: Alone) -> Tensor:
    """int64 [3, R, T] (M-RoPE) as the model would place the tokens of each answer alone; [R, T] if that is by order.

    Models of transformers that place tokens by more have a method `get_rope_index`.
    """
    asked = next((part for part in model.modules() if "get_rope_index" in dir(type(part))), None)
    if asked is None:
        return batch.position
    found, _ = asked.get_rope_index(**alone.arguments)
    position = batch.position.expand(3, -1, -1).clone()
    position.view(3, -1)[:, alone.node] = found.reshape(3, -1)[:, alone.place]
    return position


def media_arguments(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the model's processor made of the images, as its forward call takes it."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.media.items()}


def _with_router(batch: Batch, plan: attention.Plan, masks: dict[str, Any]) -> dict[str, Any]:
    """Forward arguments that make a mixture of experts return its load-balancing loss, padding left out.

    Shared and packed rows would count tokens otherwise than one sequence a row does.
    """
    if plan.kind != "plain":
        raise ModelError(f"moe_aux_loss_coef needs padded rows, and these are {batch.layout}. Set layout: padded.")
    # A padded row is one chain: its first token's `end` is the row's length.
    real = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.end[:, :1]
    return masks | {"attention_mask": real.long(), "output_router_logits": True}


def _vocabulary(model: nn.Module) -> int:
    return int(model.config.get_text_config().vocab_size)  # of the weights an engine may have left this process a part


def shape_logits(config: Any, logits: Tensor) -> Tensor:
    """What some families do to logits after the head: soft-caps (Gemma 2), scales (Cohere, Granite).

    The first-batch check compares with the model's own logits, so a family missing here cannot go unnoticed.
    """
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
