"""Where a number stopped being finite: one more pass over a batch, with an eye on every module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_module(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module whose output is not finite, in the order of computation; None if all are finite.

    forward: runs the model. Random numbers are as they were when it returns, and other than they were in training.
    """
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(name + _weights_of(module))

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        with _same_random_numbers(), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_gradient(model: nn.Module, forward: Callable[[], Tensor]) -> str | None:
    """The first parameter, on the way back from the loss, whose gradient is not finite, and how many there are.

    forward: gives the loss. No `.grad` is touched, and no other process is asked.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with _same_random_numbers():
        gradients = torch.autograd.grad(forward(), [parameter for _, parameter in named], allow_unused=True)
    bad = [name for (name, _), gradient in zip(named, gradients) if gradient is not None and not _finite(gradient)]
    return f"{bad[-1]} ({len(bad)} of {len(named)} gradients are not finite)" if bad else None


def _weights_of(module: nn.Module) -> str:
    own = module.parameters(recurse=False)
    return " (its weights already hold such numbers)" if not all(_finite(p) for p in own) else ""


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
