"""Keys and values in 8 or 4 bits, after KIVI (arXiv 2402.02750): keys by channel, values by token, the latest as they
are.

A few channels of keys are large in every token, so a group of keys is one channel over `group` tokens; values have no
such channels, so their group is one token over `group` channels. A group is stored as its minimum, its step, and whole
numbers of steps, so no number is off by more than half a step, beyond rounding. The last `residual` tokens stay as they
are, until `group` more have come.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import StreamedLayer

BLOCK = 1024  # tokens that are read at a time


def quantize(x: Tensor, bits: int, dim: int, group: int) -> tuple[Tensor, Tensor]:
    """Cut `dim` of x into groups.

    Returns:
        uint8 numbers of steps, two in a byte for 4 bits (then neighbours of dim -2, whose size must be even), and the
        minimum and step of each group, (2, ..., groups, ...), in x's dtype but never wider than fp32.
    """
    dim %= x.dim()
    shape = (*x.shape[:dim], x.shape[dim] // group, group, *x.shape[dim + 1 :])
    groups = x.reshape(shape)
    low, high = groups.amin(dim + 1, keepdim=True), groups.amax(dim + 1, keepdim=True)
    levels = 2**bits - 1
    stored = x.dtype if x.element_size() == 2 else torch.float32
    limits = torch.stack([low.double(), (high.double() - low.double()) / levels]).to(stored)
    # steps are counted with the limits as they are stored, so that their rounding is not added to the numbers' own
    start, step = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in limits)
    whole = ((groups - start) / torch.where(step > 0, step, 1)).round().clamp(0, levels)
    numbers = whole.to(torch.uint8).reshape(x.shape)
    if bits == 4:
        numbers = numbers[..., 0::2, :] | (numbers[..., 1::2, :] << 4)
    return numbers, limits.squeeze(dim + 2)


def dequantize(numbers: Tensor, limits: Tensor, bits: int, dim: int, group: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize`, within half a step."""
    if bits == 4:
        numbers = torch.stack([numbers & 15, numbers >> 4], -2).flatten(-3, -2)
    dim %= numbers.dim()
    shape = (*numbers.shape[:dim], numbers.shape[dim] // group, group, *numbers.shape[dim + 1 :])
    start, step = limits.unsqueeze(dim + 2).to(torch.promote_types(dtype, torch.float32))
    return (numbers.reshape(shape) * step + start).to(dtype).reshape(numbers.shape)


def value_group(group: int, width: int) -> int:
    """Channels of a group of values: as asked for where that divides the head, else the whole head."""
    return group if width % group == 0 else width


class QuantizedLayer(StreamedLayer):
    """Groups of numbers and their steps, and the latest tokens as they are.

    Args:
        bits: 8 or 4.
        group: tokens, and channels, that share a minimum and a step; even.
        residual: the latest tokens that stay as they are.
    """

    held = ("k_numbers", "k_limits", "v_numbers", "v_limits", "k_latest", "v_latest")

    def __init__(self, bits: int, group: int = 32, residual: int = 128) -> None:
        super().__init__()
        assert bits in (4, 8) and group > 0 and group % 2 == 0 and residual >= 0
        self.bits, self.group, self.residual = bits, group, residual

    def start(self, k: Tensor, v: Tensor) -> None:
        self.k_latest, self.v_latest = k[:, :, :0], v[:, :, :0]
        packed = self._packed(k[:, :, :0], v[:, :, :0])
        self.k_numbers, self.k_limits, self.v_numbers, self.v_limits = packed

    def _packed(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole groups of tokens; limits with the rows of the batch first, as all that is held."""
        if k.shape[2] == 0:
            b, heads, _, d = k.shape
            rows = torch.empty(b, heads, 0, d, dtype=torch.uint8, device=k.device)
            dtype = k.dtype if k.element_size() == 2 else torch.float32
            of_keys = torch.empty(b, heads, 0, 2, d, dtype=dtype, device=k.device)
            width = v.shape[3]
            groups = width // value_group(self.group, width)
            of_values = torch.empty(b, heads, 0, 2, groups, dtype=dtype, device=v.device)
            return rows, of_keys, torch.empty(b, heads, 0, width, dtype=torch.uint8, device=v.device), of_values
        k_numbers, k_limits = quantize(k, self.bits, 2, self.group)
        v_numbers, v_limits = quantize(v, self.bits, 3, value_group(self.group, v.shape[3]))
        # (2, B, K, groups or tokens, channels or groups) -> (B, K, ..., 2, ...)
        return k_numbers, k_limits.permute(1, 2, 3, 0, 4), v_numbers, v_limits.permute(1, 2, 3, 0, 4)

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k_latest = torch.cat([self.k_latest, k], 2)
        self.v_latest = torch.cat([self.v_latest, v], 2)
        count = (self.k_latest.shape[2] - self.residual) // self.group * self.group
        if count <= 0:
            return
        packed = self._packed(self.k_latest[:, :, :count], self.v_latest[:, :, :count])
        before = (self.k_numbers, self.k_limits, self.v_numbers, self.v_limits)
        joined = [torch.cat(pair, 2) for pair in zip(before, packed)]
        self.k_numbers, self.k_limits, self.v_numbers, self.v_limits = joined
        self.k_latest = self.k_latest[:, :, count:].clone()  # a view would keep what was packed
        self.v_latest = self.v_latest[:, :, count:].clone()

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, stored = self.v_limits.shape[2], 8 // self.bits  # tokens; tokens in a row of bytes
        size = max(self.group, BLOCK // self.group * self.group)
        for start in range(0, count, size):
            stop = min(start + size, count)
            bytes_, groups = slice(start // stored, stop // stored), slice(start // self.group, stop // self.group)
            k_limits = self.k_limits[:, :, groups].permute(3, 0, 1, 2, 4)
            v_limits = self.v_limits[:, :, start:stop].permute(3, 0, 1, 2, 4)
            channels = value_group(self.group, self.v_numbers.shape[3])
            yield (
                dequantize(self.k_numbers[:, :, bytes_], k_limits, self.bits, 2, self.group, self.dtype),
                dequantize(self.v_numbers[:, :, bytes_], v_limits, self.bits, 3, channels, self.dtype),
            )
        if self.k_latest.shape[2]:
            yield self.k_latest, self.v_latest
