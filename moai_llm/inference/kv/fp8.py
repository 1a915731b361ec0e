"""Keys and values as float8_e4m3fn with a scale for each token and head.

The largest number of a head's vector becomes 448, the largest of the format. A normal number is then off by at most
1/16 of itself (three bits of mantissa), a smaller one by at most 2^-10 of the scale. In contrast to transformers' own
fp8 layer no scale is guessed from the first tokens, so none is too small for a later one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import StreamedLayer

LARGEST = 448.0
BLOCK = 1024


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, L, d) -> bytes of the same shape and scales (B, K, L, 1) in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny).float()
    scaled = (wide / scale).clamp(-LARGEST, LARGEST)  # the scale is rounded: past 448 there is only nan
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def from_fp8(numbers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dtype, torch.float32)
    return (numbers.view(torch.float8_e4m3fn).to(wide) * scale.to(wide)).to(dtype)


class Fp8Layer(StreamedLayer):
    """One byte a number and four a vector."""

    held = ("k_numbers", "k_scales", "v_numbers", "v_scales")

    def start(self, k: Tensor, v: Tensor) -> None:
        self.k_numbers, self.k_scales = k[:, :, :0].to(torch.uint8), k[:, :, :0, :1].float()
        self.v_numbers, self.v_scales = v[:, :, :0].to(torch.uint8), v[:, :, :0, :1].float()

    def append(self, k: Tensor, v: Tensor) -> None:
        for name, x in (("k", k), ("v", v)):
            numbers, scales = to_fp8(x)
            setattr(self, f"{name}_numbers", torch.cat([getattr(self, f"{name}_numbers"), numbers], 2))
            setattr(self, f"{name}_scales", torch.cat([getattr(self, f"{name}_scales"), scales], 2))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.k_numbers.shape[2], BLOCK):
            part = slice(start, start + BLOCK)
            yield (
                from_fp8(self.k_numbers[:, :, part], self.k_scales[:, :, part], self.dtype),
                from_fp8(self.v_numbers[:, :, part], self.v_scales[:, :, part], self.dtype),
            )
