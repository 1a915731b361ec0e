"""Lion: the sign of an average of gradients, with one state for each parameter (arXiv 2302.06675, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements that one pass works on: few launches for small tensors, little memory between two operations


class Lion(torch.optim.Optimizer):
    """c = b1 m + (1 - b1) g;  p = p - lr (sign(c) + weight_decay p);  m = b2 m + (1 - b2) g."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameters in _chunks(group["params"]):
                gradients = [p.grad for p in parameters if p.grad is not None]
                averages = [self._average(p) for p in parameters]
                updates = torch._foreach_lerp(averages, gradients, 1 - beta1)
                torch._foreach_sign_(updates)
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                torch._foreach_add_(parameters, updates, alpha=-lr)
                torch._foreach_lerp_(averages, gradients, 1 - beta2)
        return loss

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
        return state["exp_avg"]


def _chunks(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those that have a gradient, in runs of at most CHUNK elements; a larger tensor is a run of its own."""
    chunk: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if chunk and sum(p.numel() for p in chunk) + parameter.numel() > CHUNK:
            yield chunk
            chunk = []
        chunk.append(parameter)
    if chunk:
        yield chunk
