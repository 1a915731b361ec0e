"""The `native` linear layer of a few rows: linear.cpp, built for this CPU.

Importing this module builds the library, or takes it from the cache, and compares it with torch; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops import native

_library = native.load("linear.cpp")


def _function(name: str) -> Any:
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int] + [ctypes.c_void_p] * 4
    function.errcheck = native.raise_if_failed
    return function


_FUNCTIONS = {torch.float32: _function("moai_linear_fp32"), torch.bfloat16: _function("moai_linear_bf16")}


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O), of one dtype on the CPU; sums are fp32."""
    (out, width), dtype = weight.shape, x.dtype
    if x.shape[-1] != width or (bias is not None and bias.shape != (out,)):
        raise ValueError(f"x {tuple(x.shape)}, weight {(out, width)} and bias do not fit")
    x, weight, bias = native.ready(x, dtype), native.ready(weight, dtype), native.ready(bias, dtype)
    y = x.new_empty(*x.shape[:-1], out)
    _FUNCTIONS[dtype](
        x.numel() // width, width, out, torch.get_num_threads(), x.data_ptr(), weight.data_ptr(),
        None if bias is None else bias.data_ptr(), y.data_ptr(),
    )  # fmt: skip
    return y


def _check(random: native.Random) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for rows, width, out in ((1, 77, 13), (3, 130, 1000)):
            x, w, b = random(rows, width).to(dtype), random(out, width).to(dtype), random(out).to(dtype)
            native.require_close(linear_native(x, w, b), F.linear(x.double(), w.double(), b.double()), tolerance)


native.self_check(_check)
