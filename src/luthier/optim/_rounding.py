"""AdamW that rounds at random; see `stochastic.py` for why."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2017) that computes in float32 and rounds bfloat16 results at random.

    params: groups of (name, parameter). Weights of other formats are rounded as ever. The random numbers depend on the
    seed, the parameter's name and the step alone, so that all processes round alike and a resumed run goes on as the
    uninterrupted one.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, parameter in zip(group["param_names"], group["params"]):
                if parameter.grad is not None:
                    self._update(name, parameter, group)
        return loss

    def _update(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        (fast, slow), step = group["betas"], state["step"]
        weight, first, second = (_local(t) for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
        gradient = _local(parameter.grad).float()
        mean = first.float().lerp_(gradient, 1 - fast)
        square = second.float().mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
        scale = (square / (1 - slow**step)).sqrt_().add_(group["eps"])
        moved = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        moved.addcdiv_(mean, scale, value=-group["lr"] / (1 - fast**step))
        # crc32 and not hash(): the latter changes from process to process.
        generator = torch.Generator(weight.device)
        generator.manual_seed(zlib.crc32(f"{self.seed} {name} {step}".encode()))
        for target, exact in ((weight, moved), (first, mean), (second, square)):
            round_into(target, exact, generator)


def round_into(target: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    """Write float32 `exact` into `target`: bfloat16 up or down at random so that the mean is exact, others as ever.

    bfloat16 is the upper half of float32's bits: a random number added to the lower half carries into the upper one
    with the probability of what the lower half is worth.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, device=exact.device, generator=generator)
    bits = (exact.contiguous().view(torch.int32) + noise) & -0x10000
    rounded = bits.view(torch.float32)
    # What is not finite must stay what it is, and show.
    target.copy_(torch.where(exact.isfinite(), rounded, exact))


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, or the tensor itself; both share their memory with it."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
