"""x W^T + bias. For a few rows on a CPU, as in decoding, `native` reads the weights at the speed of the memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define

FEW_ROWS = 16  # with more the library's matrix product is as fast
DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> (..., O); the library's own except for a few rows without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _few_plain_rows(x, weight):
        return F.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _few_plain_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() <= FEW_ROWS * x.shape[-1]
        and x.dtype in DTYPES
        and x.dtype is weight.dtype
        and is_plain(weight)
        and not torch.is_autocast_enabled("cpu")
    )


def is_plain(weight: Tensor) -> bool:
    """Whether a kernel may read it from memory: a subclass (quantized, distributed) knows its own product."""
    return type(weight) in (Tensor, torch.nn.Parameter)


_linear = define(
    "linear",
    {
        "reference": Implementation(F.linear),
        "native": Implementation("moai_llm.ops.linear_native:linear_native", DTYPES),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
