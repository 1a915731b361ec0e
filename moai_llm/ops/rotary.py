"""Rotary position embedding (arXiv 2104.09864): the table of angles, and the rotation of queries and keys by it.

The two halves of a head form the pairs, as in transformers. Angles are products in fp64, because position x frequency
in fp32 is off by 7e-3 in the cosine at 128k positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary_table(position_ids: Tensor, inv_freq: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin (B, L, r/2) in fp32 for positions (B, L) and frequencies (r/2,); `scale` is YaRN's attention
    factor.
    """
    angles = position_ids.to(torch.float64)[..., None] * inv_freq.to(torch.float64)
    return (angles.cos() * scale).to(torch.float32), (angles.sin() * scale).to(torch.float32)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first r of d dimensions of x (B, H, L, d) by cos, sin (B, L, r/2); computed in fp32, returned in x's
    dtype.
    """
    cos, sin = cos[:, None], sin[:, None]
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.is_grad_enabled():
        return rotate(x, cos, sin)
    return _Rotation.apply(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, with cos and sin (B, 1, L, r/2)."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        rotated.append(x[..., 2 * half :].to(rotated[0].dtype))
    return torch.cat(rotated, -1).to(x.dtype)


class _Rotation(torch.autograd.Function):
    """The same in half of the passes over memory: the gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_once(x, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_once(grads[0], cos, sin, -1), None, None


def _rotate_once(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    first, second = wide[..., :half], wide[..., half : 2 * half]
    y = torch.empty_like(wide)
    torch.mul(first, cos, out=y[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y[..., half : 2 * half]).addcmul_(first, sin, value=sign)
    y[..., 2 * half :] = wide[..., 2 * half :]
    return y.to(x.dtype)
