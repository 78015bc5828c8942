"""Writing beside training: what is to be written is copied first, and one thread writes it while steps go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class Writer:
    """Runs one job at a time: at once, or in a thread. What a job raises is kept until somebody asks.

    Threads overlap with training because safetensors, torch.save, hashing and fsync all work outside the interpreter.
    """

    def __init__(self, *, background: bool = False):
        self.background = background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job; the one before it must have been waited for."""
        assert self._thread is None, "a job is still going on"
        if self.background:
            # No daemon: an interpreter that ends waits for the checkpoint.
            self._thread = threading.Thread(target=self._run, args=(job,), name="luthier-checkpoint")
            self._thread.start()
        else:
            self._run(job)

    def wait(self) -> BaseException | None:
        """Let the job end; returns what it raised, and forgets it."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        return error

    def failure(self) -> BaseException | None:
        """What the job raised, if it has ended so; does not wait."""
        return self._error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error


def snapshot(value: Any, *, copy: bool, seen: dict[Any, Tensor] | None = None) -> Any:
    """The same nest of dicts and lists with every tensor in CPU memory.

    copy: also copy what lies there already, so that later steps cannot change it. Tensors that share memory still do:
    that is how tied weights are recognised. Other values are kept as they are.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return _on_cpu(value.detach(), copy, seen)
    if isinstance(value, Mapping):
        return {key: snapshot(item, copy=copy, seen=seen) for key, item in value.items()}
    if isinstance(value, list):
        return [snapshot(item, copy=copy, seen=seen) for item in value]
    return value


def _on_cpu(tensor: Tensor, copy: bool, seen: dict[Any, Tensor]) -> Tensor:
    if tensor.device.type == "cpu" and not copy:
        return tensor
    if tensor.layout != torch.strided or type(tensor) is not Tensor:
        return tensor.to("cpu", copy=True)
    key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if key not in seen or not tensor.numel():
        seen[key] = tensor.to("cpu", copy=True)
    return seen[key]
