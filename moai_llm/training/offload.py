"""Memory of the host in place of a CUDA device's: activations between forward and backward, the states of AdamW.

Both are slower than what they replace, by what the bus between host and device takes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from moai_llm.ops.nf4_weight import NF4Weight
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError

SMALLEST = 2**16  # bytes; smaller tensors stay where they are


def require_host(recipe: Recipe, device: torch.device) -> None:
    """Refuse `train.offload` where there is no other memory to go to."""
    if recipe.train.offload != "none" and device.type != "cuda":
        raise MoaiError(
            f"train.offload={recipe.train.offload} moves memory of a CUDA device to its host, and this run is on "
            f"{device}: leave it out"
        )


class _Moved(NamedTuple):
    device: torch.device
    tensor: Tensor


class HostActivations:
    """Within `hooks()` what autograd keeps for the backward is kept in the host's memory, and comes back when it is
    needed; weights, which are on the device anyway, and small tensors stay.
    """

    def __init__(self, model: nn.Module, smallest: int = SMALLEST) -> None:
        self.model, self.smallest = model, smallest

    def hooks(self) -> AbstractContextManager[Any]:
        kept = (parameter for parameter in self.model.parameters() if not isinstance(parameter, NF4Weight))
        weights = {parameter.untyped_storage().data_ptr() for parameter in kept}

        def pack(tensor: Tensor) -> Tensor | _Moved:
            small = tensor.numel() * tensor.element_size() < self.smallest
            if small or isinstance(tensor, NF4Weight) or tensor.untyped_storage().data_ptr() in weights:
                return tensor
            pinned = tensor.device.type == "cuda"
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            return _Moved(tensor.device, there.copy_(tensor))

        def unpack(kept: Tensor | _Moved) -> Tensor:
            return kept.tensor.to(kept.device, non_blocking=True) if isinstance(kept, _Moved) else kept

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class HostAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) whose averages stay in the host's memory, 8 bytes a parameter, and whose fused step runs
    there on copies of weight and gradient, one parameter after the other.
    """

    on_host = True  # where `place_state` puts what it reads

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
        assert parameter.grad is not None
        weight, grad = parameter.detach().to("cpu", copy=True), parameter.grad.to("cpu")
        beta1, beta2 = group["betas"]
        adamw(
            [weight], [grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], fused=True,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=False,
        )  # fmt: skip
        parameter.copy_(weight)
