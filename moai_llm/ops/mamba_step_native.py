"""The `native` step of a Mamba mixer: mamba_step.cpp, built for this CPU.

Importing this module builds the library, or takes it from the cache, and compares it with the reference; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops import native
from moai_llm.ops.mamba_step import StepWeights, mamba_step_reference
from moai_llm.ops.native import ready

_library = native.load("mamba_step.cpp")


def _function(name: str) -> Any:
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * 6 + [ctypes.c_int, ctypes.c_float] + [ctypes.c_void_p] * 17
    function.errcheck = native.raise_if_failed
    return function


_FUNCTIONS = {torch.float32: _function("moai_mamba_step_fp32"), torch.bfloat16: _function("moai_mamba_step_bf16")}


def mamba_step_native(x: Tensor, window: Tensor, state: Tensor, weights: StepWeights) -> Tensor:
    w, half, wide = weights, x.dtype, torch.float32
    (b, d, n), width, kernel, rank = state.shape, x.shape[1], window.shape[2], w.dt_proj.shape[1]
    windows, states = ready(window, half, (b, d, kernel)), ready(state, wide, (b, d, n))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tensors = (
        ready(x, half, (b, width)), windows, states, ready(w.in_x, half, (d, width)), ready(w.in_z, half, (d, width)),
        ready(w.conv, half, (d, kernel)), ready(w.conv_bias, half, (d,)), ready(w.x_proj, half, (rank + 2 * n, d)),
        ready(w.dt_proj, half, (d, rank)), ready(w.dt_bias, wide, (d,)), ready(w.A_log, wide, (d, n)),
        ready(w.D, wide, (d,)), ready(w.out, half, (width, d)), ready(w.dt_norm, half, (rank,)),
        ready(w.B_norm, half, (n,)), ready(w.C_norm, half, (n,)), y,
    )  # fmt: skip
    _FUNCTIONS[half](b, width, d, n, rank, kernel, torch.get_num_threads(), w.eps, *native.addresses(*tensors))
    if windows is not window:  # it was not contiguous
        window.copy_(windows)
    if states is not state:
        state.copy_(states)
    return y


def _check(random: native.Random) -> None:
    b, width, d, n, rank, kernel = 2, 21, 37, 13, 5, 3
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        shapes = ((d, width), (d, width), (d, kernel), (d,), (rank + 2 * n, d), (d, rank))
        in_x, in_z, conv, bias, x_proj, dt_proj = (random(*shape).to(dtype) for shape in shapes)
        dt_norm, B_norm, C_norm = (1 + random(size).to(dtype) for size in (rank, n, n))
        recurrence, out = (random(d), random(d, n), random(d)), random(width, d).to(dtype)
        weights = StepWeights(1e-6, in_x, in_z, conv, bias, x_proj, dt_proj, *recurrence, out, dt_norm, B_norm, C_norm)
        x, window, state = random(b, width).to(dtype), random(b, d, kernel).to(dtype), random(b, d, n)
        mine, theirs = [window.clone(), state.clone()], [window.clone(), state.clone()]
        got = [mamba_step_native(x, mine[0], mine[1], weights), *mine]
        wanted = [mamba_step_reference(x, theirs[0], theirs[1], weights), *theirs]
        for result, truth in zip(got, wanted):
            native.require_close(result, truth, tolerance)


native.self_check(_check)
