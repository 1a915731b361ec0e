"""Rotary position embedding (arXiv 2104.09864): the table of angles, and the rotation of queries and keys by it.

The two halves of a head form the pairs, as in transformers. Angles are products in fp64, because position x frequency
in fp32 is off by 7e-3 in the cosine at 128k positions.
"""

from __future__ import annotations

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
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    if 2 * half < x.shape[-1]:
        rotated.append(x[..., 2 * half :].to(rotated[0].dtype))
    return torch.cat(rotated, -1).to(x.dtype)
