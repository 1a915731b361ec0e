"""Channel mixers at the few positions of a decoding step, as one op each: the dense one, and chosen experts.

Two or three products and an activation are five operations, and a mixture of experts several dozen; to start them costs
more than to run them, and torch's product of a few rows uses a part of the memory's speed. `reference` is the readable
form, `native` one C++ function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define
from moai_llm.ops.linear import FEW_ROWS
from moai_llm.ops.moe import Experts, experts_forward, experts_reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}  # in the order of the enum of mlp_step.cpp


class DenseWeights(NamedTuple):
    """W width of the model, I width inside. Without `gate` the activation is on `up` itself."""

    act: str
    up: Tensor  # (I, W)
    down: Tensor  # (W, I)
    gate: Tensor | None = None  # (I, W)
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    gate_bias: Tensor | None = None


def takes(x: Tensor, weight: Tensor, act: str) -> bool:
    """Whether the ops of this file may run in place of the layers: a few rows, without gradients, as they are."""
    return (
        act in ACTIVATIONS
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and x.dtype is weight.dtype
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


def dense_step(x: Tensor, weights: DenseWeights) -> Tensor:
    """x (R, W) -> (R, W): down(act(gate(x)) * up(x)), or down(act(up(x)))."""
    return _dense_step(x, weights)


def dense_step_reference(x: Tensor, weights: DenseWeights) -> Tensor:
    w, act = weights, ACTIVATIONS[weights.act]
    up = F.linear(x, w.up, w.up_bias)
    return F.linear(act(up) if w.gate is None else act(F.linear(x, w.gate, w.gate_bias)) * up, w.down, w.down_bias)


def experts_step(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: str) -> Tensor:
    """`experts_forward` of ops/moe.py for a few rows: x (R, W), ids (R, K) int64, weights (R, K) fp32 -> (R, W)."""
    return _experts_step(x, ids, weights, experts, act)


def experts_step_reference(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: str) -> Tensor:
    return experts_reference(x, ids, weights, experts, ACTIVATIONS[act])


def experts_step_torch(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: str) -> Tensor:
    return experts_forward(x, ids, weights, experts, ACTIVATIONS[act])


_HALVES = (torch.float32, torch.bfloat16)
_dense_step = define(
    "dense_step",
    {
        "reference": Implementation(dense_step_reference),
        "native": Implementation("moai_llm.ops.mlp_step_native:dense_step_native", _HALVES),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
_experts_step = define(
    "experts_step",
    {
        "reference": Implementation(experts_step_reference),
        "torch": Implementation(experts_step_torch),
        "native": Implementation("moai_llm.ops.mlp_step_native:experts_step_native", _HALVES),
    },
    order={"cpu": ["native", "torch"], "any": ["torch"]},
)
