"""NF4 weights unpacked by bitsandbytes; importing this fails where the package is not installed."""

from __future__ import annotations

import bitsandbytes  # noqa: F401 - it registers the op
import torch
from torch import Tensor


def unpack_bitsandbytes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (32 blocks,), scales (blocks,) -> (64 blocks,)."""
    block = 2 * len(codes) // len(scales)
    shape = (len(scales), block)
    return torch.ops.bitsandbytes.dequantize_4bit.default(codes, scales, block, "nf4", shape, dtype).view(-1)
