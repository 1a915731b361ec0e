"""Muon: the average gradient of a matrix, made orthogonal (arXiv 2502.16982; kellerjordan.github.io/posts/muon).

The rule is that of torch.optim.Muon, which tests/training/test_optimizers.py compares it with. Beyond it, a stack of
matrices such as the experts of a sparse layer is taken too, each made orthogonal on its own and all at once; and the
computing can be done in fp32, many times faster on a CPU without fast bf16 (`python -m benchmarks.run optimizers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# of the polynomial a x + b x^3 + c x^5 that drives singular values towards 1
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


class Muon(torch.optim.Optimizer):
    """Parameters are matrices (out, in), or stacks of them (matrices, out, in)."""

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.1,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                update = orthogonalise(parameter.grad.lerp(average, momentum), self.dtype)
                parameter.mul_(1 - lr * group["weight_decay"])
                # makes an update as large as AdamW's, so that its learning rates serve (arXiv 2502.16982, section 2.2)
                parameter.add_(update, alpha=-lr * 0.2 * math.sqrt(max(parameter.shape[-2:])))
        return loss


def orthogonalise(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Newton-Schulz iteration on (..., out, in): each matrix U S V^T becomes nearly U V^T, singular values around 1."""
    shape, tall = x.shape, x.shape[-2] > x.shape[-1]
    x = x.reshape(-1, *shape[-2:]).to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return (x.mT if tall else x).reshape(shape)
