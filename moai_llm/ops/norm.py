"""RMSNorm over the last dimension (arXiv 1910.07467).

`torch` is the library's own function: one kernel on CUDA, and what torch.compile fuses. On a CPU the library runs it as
a dozen small kernels forward and backward. In training `saved` keeps 1/rms and needs half of the passes over memory; in
decoding `native` is one call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define

FEW = 2**16  # elements below which one thread is enough


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 or wider.

    Args:
        x: (..., D). weight: (D,).

    Returns:
        (..., D) in the dtype that follows: the autocast one where autocast is on (what comes next multiplies matrices
        in it, several times the same input), else that of x.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    few = x.numel() <= FEW and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return (_rms_norm_step if few else _rms_norm)(x, weight, eps, dtype)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(dtype)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(dtype)


def rms_norm_saved(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return rms_norm_torch(x, weight, eps, dtype)
    return _Saved.apply(x, weight, eps, dtype)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        g, w = grads[0].to(inverse.dtype), weight.to(inverse.dtype)
        normed = x * inverse
        product = g * normed
        along = torch.mv(product.reshape(-1, w.shape[0]), w).view(inverse.shape).div_(w.shape[0])
        d_weight = product.reshape(-1, w.shape[0]).sum(0)
        d_x = (g * w).sub_(normed.mul_(along)).mul_(inverse)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None, None


_rms_norm = define(
    "rms_norm",
    {
        "reference": Implementation(rms_norm_reference),
        "torch": Implementation(rms_norm_torch),
        "saved": Implementation(rms_norm_saved),
    },
    order={"cpu": ["saved"], "any": ["torch"]},
)
_rms_norm_step = define(
    "rms_norm_step",
    {
        "reference": Implementation(rms_norm_reference),
        "torch": Implementation(rms_norm_torch),
        "native": Implementation("moai_llm.ops.norm_native:rms_norm_native", (torch.float32, torch.bfloat16)),
    },
    order={"cpu": ["native", "torch"], "any": ["torch"]},
)
