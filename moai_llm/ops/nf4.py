"""Weights in 4 bits that are normally distributed, NF4 (QLoRA, arXiv 2305.14314, section 3): packing and unpacking.

A block of 64 weights shares a scale, its largest magnitude; each weight is the nearest of 16 levels, two to a byte, the
first in the upper half. With double quantisation the scales are bytes themselves: less their mean, 256 of them share a
step. bitsandbytes unpacks to the same bits several times as fast. Packing is done once, here, so that what a run
trains on does not depend on what is installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define

BLOCK, SCALES = 64, 256  # weights that share a scale, scales that share a step
# quantiles of the normal distribution, zero among them (appendix E)
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Packed(NamedTuple):
    """Weights in blocks; n is their number, the last block is filled up with zeros."""

    codes: Tensor  # (ceil(n / 64) * 32,) uint8
    scales: Tensor  # (ceil(n / 64),) fp32, or int8 with double quantisation
    steps: Tensor | None = None  # (ceil(n / 64 / 256),) fp32
    mean: Tensor | None = None  # () fp32

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self if part is not None)

    def to(self, device: Any) -> Packed:
        return Packed(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def blocks(self, first: int, last: int) -> Packed:
        """Some of the blocks, their scales as fp32."""
        per_block = BLOCK // 2
        return Packed(self.codes[first * per_block : last * per_block], unpack_scales(self)[first:last])


def pack(weight: Tensor, *, double: bool = True) -> Packed:
    """A weight of any shape, row after row.

    Args:
        double: whether the scales are quantised, too: 4.13 bits a weight instead of 4.5.
    """
    blocks = _in_blocks(weight.detach().reshape(-1).float(), BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    middles = (levels[1:] + levels[:-1]) / 2
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nibbles = torch.bucketize(shares, middles, out_int32=True).to(torch.uint8).view(-1)
    codes = (nibbles[::2] << 4) | nibbles[1::2]
    if not double:
        return Packed(codes, scales)
    mean = scales.mean()
    deviations = _in_blocks(scales - mean, SCALES)
    steps = deviations.abs().amax(1) / 127
    tiny = torch.finfo(torch.float32).tiny
    rounded = (deviations / steps.clamp_min(tiny)[:, None]).round().to(torch.int8)
    return Packed(codes, rounded.view(-1)[: len(scales)].clone(), steps, mean)


def unpack_scales(packed: Packed) -> Tensor:
    """(blocks,) fp32."""
    if packed.steps is None or packed.mean is None:
        return packed.scales
    return packed.scales * packed.steps.repeat_interleave(SCALES)[: len(packed.scales)] + packed.mean


def unpack(packed: Packed, shape: torch.Size | tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight: level times scale in fp32, then rounded to `dtype`."""
    values = _unpack(packed.codes, unpack_scales(packed), dtype)
    return values[: torch.Size(shape).numel()].view(shape)


def unpack_reference(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """codes (32 blocks,), scales (blocks,) -> (64 blocks,)."""
    levels = torch.tensor(LEVELS, device=codes.device)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # of each byte its two levels
    return (pairs[codes.int()].view(-1, BLOCK) * scales[:, None]).to(dtype).view(-1)


def _in_blocks(values: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


_unpack = define(
    "nf4",
    {
        "reference": Implementation(unpack_reference),
        "bitsandbytes": Implementation("moai_llm.ops.nf4_bitsandbytes:unpack_bitsandbytes"),
    },
    order={"any": ["bitsandbytes", "reference"]},
)
