"""x W^T + bias on a CPU without gradients. For a few rows, as in decoding, `native` reads the weights at the speed of
the memory. For many rows of bf16, as in a prompt, `fp32` avoids bf16 products where a CPU has no instructions for them.
"""

from __future__ import annotations

import math
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define
from moai_llm.runtime import has_fast_bf16

FEW_ROWS = 16  # with more the library's matrix product is as fast
NATIVE_ROWS = 32  # without bf16 instructions: `native` wins up to 32 rows, `fp32` from 48 on, torch at none from 17 on
MOST_ROWS = 2048  # multiplied at a time: bounds what is fp32 of a large vocabulary
BLOCK = 2**20  # weights upcast at a time: 4 MB that stay in the caches; 2^19 to 2^21 are equally fast
DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O); the library's own with gradients and for many rows of fp32."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_ours(x, weight):
        return F.linear(x, weight, bias)
    if x.numel() <= FEW_ROWS * x.shape[-1]:
        return _linear(x, weight, bias)
    if x.dtype is torch.float32:
        return F.linear(x, weight, bias)
    if (
        x.numel() <= NATIVE_ROWS * x.shape[-1]
        and many_rows_in_fp32(x, weight)
        and _linear.pick("cpu", x.dtype) == "native"
    ):
        return _linear(x, weight, bias)
    return _linear_many_rows(x, weight, bias)


@torch.no_grad()
def linear_into(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x (R, I), weight (O, I) -> `out` (R, O), for what computes its gradients by hand."""
    if x.dtype is torch.bfloat16 and _is_ours(x, weight):
        return _linear_many_rows(x, weight, out=out)
    return linear_reference(x, weight, out=out)


def many_rows_in_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether many rows of x, which are bf16, are multiplied in fp32."""
    return x.dtype is torch.bfloat16 and _is_ours(x, weight) and _linear_many_rows.pick("cpu", x.dtype) == "fp32"


def _is_ours(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and x.dtype is weight.dtype
        and is_plain(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain(weight: Tensor) -> bool:
    """Whether a kernel may read it from memory: a subclass (quantized, distributed) knows its own product."""
    return type(weight) in (Tensor, torch.nn.Parameter)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias) if out is None else torch.mm(x, weight.t(), out=out)


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """The products and the bias in fp32, rounded once. Beside x in fp32 it needs one block of weights and what they
    give: a few megabytes, a few dozen for thousands of rows.
    """
    (outputs, width), rows = weight.shape, math.prod(x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], outputs) if out is None else out
    x_wide, y_flat = x.reshape(rows, x.shape[-1]).float(), y.view(rows, outputs)
    size = max(1, BLOCK // max(1, width))
    for start in range(0, outputs, size):
        part = slice(start, start + size)
        block = weight[part].float().t()
        for first in range(0, rows, MOST_ROWS):
            some = slice(first, first + MOST_ROWS)
            if bias is None:
                y_flat[some, part] = x_wide[some] @ block
            else:
                y_flat[some, part] = torch.addmm(bias[part].float(), x_wide[some], block)
    return y


def _no_gain(dtype: torch.dtype) -> str | None:
    """Why many rows are left to torch. With AVX2 only, a bf16 product of it takes several times as long as one in fp32;
    where there are instructions for bf16 it is the faster one.
    """
    if dtype is not torch.bfloat16:
        return f"nothing to gain in {str(dtype).removeprefix('torch.')}"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "not known whether bf16 products are slow on this CPU"
    return "bf16 products are fast on this CPU" if has_fast_bf16(torch.device("cpu")) else None


_linear = define(
    "linear",
    {
        "reference": Implementation(F.linear),
        "native": Implementation("moai_llm.ops.linear_native:linear_native", DTYPES),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
_linear_many_rows = define(
    "linear_many_rows",
    {
        "reference": Implementation(linear_reference),
        "fp32": Implementation(linear_fp32, DTYPES, unless=_no_gain),
    },
    order={"cpu": ["fp32", "reference"], "any": ["reference"]},
)
