"""What a model that reads images does with them: which weights of what sees can be trained, and who sees whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.core.batch import Batch
from luthier.core.errors import ConfigError
from luthier.core.log import get_logger
from luthier.model import heads
from luthier.model.modality import part_of
from luthier.model.policy import media_arguments

log = get_logger("model")


def trains_sight(model: nn.Module, shown: Batch) -> bool:
    """Whether weights of what sees, or of what carries over, are trained. shown: padded rows with an image.

    Of these weights, those that no image reaches are frozen: LLaVA takes its features from the last layer but one. They
    would wait for a gradient for ever, and other processes with them. Raises ConfigError if nothing is left to train.
    """
    part = part_of(model)
    if part is None:
        return False
    head = heads.head_of(model)
    judging = set() if head is None else {id(weight) for weight in head.parameters()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sight = [weight for name, weight in trained.items() if part(name) != "language" and id(weight) not in judging]
    if not sight:
        return False
    embedded = model.get_input_embeddings().weight
    shown = shown.to(embedded.device)
    media = media_arguments(shown, embedded.dtype)
    reached = _reached(model(input_ids=shown.ids, use_cache=False, **media).logits)
    lost = [weight for weight in sight if id(weight) not in reached]
    for weight in lost:
        weight.requires_grad_(False)
    if len(lost) == len(trained):
        raise ConfigError("nothing is left to train: images reach none of the weights that are not kept still.")
    if lost:
        size = f"{sum(weight.numel() for weight in lost):,}"
        log.info("%d weights of what sees (%s parameters) are reached by no image; they stand still.", len(lost), size)
    return len(lost) < len(sight)


def looks_ahead(model: nn.Module, shown: Batch) -> bool:
    """Whether tokens of an image see later ones, as in Gemma 3, where they see one another. shown: padded rows with an
    image. Found by what the logits at each token of the first row depend on."""
    added: list[Tensor] = []

    def add(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        added.append(torch.zeros_like(named["inputs_embeds"], requires_grad=True))
        return args, {**named, "inputs_embeds": named["inputs_embeds"] + added[-1]}

    decoder: Any = model.get_decoder()
    handle = decoder.register_forward_pre_hook(add, with_kwargs=True)
    try:
        shown = shown.to(model.get_input_embeddings().weight.device)
        media = media_arguments(shown, model.get_input_embeddings().weight.dtype)
        logits = model(input_ids=shown.ids, use_cache=False, **media).logits[0]
    finally:
        handle.remove()
    middle = logits.shape[0] // 2
    (moved,) = torch.autograd.grad(logits[: middle + 1].square().sum(), added)
    return bool(moved[0, middle + 1 :].any())


def _reached(tensor: Tensor) -> set[int]:
    """The ids of the weights that a tensor was computed from."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::AccumulateGrad":
            found.add(id(node.variable))
        waiting += [follower for follower, _ in node.next_functions]
    return found
