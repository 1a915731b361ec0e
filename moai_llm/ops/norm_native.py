"""The `native` RMSNorm of a few rows: norm.cpp, built for this CPU.

Importing this module builds the library, or takes it from the cache, and compares it with the reference; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops import native
from moai_llm.ops.norm import rms_norm_reference, rms_norm_torch

_library = native.load("norm.cpp")


def _function(name: str) -> Any:
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_float] + [ctypes.c_void_p] * 3
    return function


_FUNCTIONS = {torch.float32: _function("moai_rms_norm_fp32"), torch.bfloat16: _function("moai_rms_norm_bf16")}


def rms_norm_native(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    width = weight.shape[0]
    if not (x.dtype is weight.dtype is dtype and x.is_cpu and weight.is_cpu and x.shape[-1] == width):
        return rms_norm_torch(x, weight, eps, dtype)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    _FUNCTIONS[dtype](x.numel() // width, width, eps, x.data_ptr(), weight.data_ptr(), y.data_ptr())
    return y


def _check(random: native.Random) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        x, weight = random(3, 77).to(dtype), 1 + random(77).to(dtype)
        native.require_close(
            rms_norm_native(x, weight, 1e-6, dtype), rms_norm_reference(x, weight, 1e-6, dtype), tolerance
        )


native.self_check(_check)
