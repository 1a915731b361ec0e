"""The `native` steps of channel mixers: mlp_step.cpp, built for this CPU.

Importing this module builds the library, or takes it from the cache, and compares it with the references; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops import native
from moai_llm.ops.mlp_step import (
    ACTIVATIONS,
    DenseWeights,
    dense_step_reference,
    experts_step_reference,
)
from moai_llm.ops.moe import Experts
from moai_llm.ops.native import ready

_library = native.load("mlp_step.cpp")
_KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}


def _function(name: str, sizes: int, flags: int, pointers: int) -> Any:
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * sizes + [ctypes.c_int] * flags + [ctypes.c_void_p] * pointers
    function.errcheck = native.raise_if_failed
    return function


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_DENSE = {dtype: _function(f"moai_dense_step_{name}", 3, 2, 8) for dtype, name in _NAMES.items()}
_EXPERTS = {dtype: _function(f"moai_experts_step_{name}", 5, 3, 8) for dtype, name in _NAMES.items()}


def dense_step_native(x: Tensor, weights: DenseWeights) -> Tensor:
    w, half, (inner, width) = weights, x.dtype, weights.up.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = (
        ready(x, half, (x.shape[0], width)), ready(w.gate, half, (inner, width)), ready(w.up, half, (inner, width)),
        ready(w.down, half, (width, inner)), ready(w.gate_bias, half, (inner,)), ready(w.up_bias, half, (inner,)),
        ready(w.down_bias, half, (width,)), y,
    )  # fmt: skip
    _DENSE[half](x.shape[0], width, inner, _KINDS[w.act], torch.get_num_threads(), *native.addresses(*tensors))
    return y


def experts_step_native(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: str) -> Tensor:
    (rows, width), (count, columns, _), half, k = x.shape, experts.up.shape, x.dtype, ids.shape[1]
    inner = experts.down.shape[2]
    if columns != (2 * inner if experts.gated else inner):
        raise ValueError(f"up {tuple(experts.up.shape)} and down {tuple(experts.down.shape)} do not fit")
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = (
        ready(x, half, (rows, width)), ready(ids, torch.int64, (rows, k)), ready(weights, torch.float32, (rows, k)),
        ready(experts.up, half, (count, columns, width)), ready(experts.down, half, (count, width, inner)),
        ready(experts.up_bias, half, (count, columns)), ready(experts.down_bias, half, (count, width)), y,
    )  # fmt: skip
    _EXPERTS[half](
        rows, width, inner, count, k, int(experts.gated), _KINDS[act], torch.get_num_threads(),
        *native.addresses(*tensors),
    )  # fmt: skip
    return y


def _check(random: native.Random) -> None:
    rows, width, inner, count = 5, 21, 37, 3
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, gate, up = random(rows, width).to(dtype), random(inner, width).to(dtype), random(inner, width).to(dtype)
        down, bias, out = random(width, inner).to(dtype), random(inner).to(dtype), random(width).to(dtype)
        stacked = random(count, 2 * inner, width).to(dtype), random(count, width, inner).to(dtype)
        ids, weights = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 0], [2, 0]]), 1 + random(rows, 2)
        for act in ACTIVATIONS:
            dense = DenseWeights(act, up, down, gate if act != "relu" else None, bias, out, bias)
            native.require_close(dense_step_native(x, dense), dense_step_reference(x, dense), tolerance)
            experts = Experts(*stacked)
            got = experts_step_native(x, ids, weights, experts, act)
            native.require_close(got, experts_step_reference(x, ids, weights, experts, act), tolerance)


native.self_check(_check)
