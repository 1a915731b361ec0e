"""A window of keys in a ring: one tensor for good, in which the newest key takes the place of the oldest.

Attention without a mask does not ask in which order keys come, and each key carries its own position in its rotation.
So a step writes one place and reads the ring as it lies; only several tokens at once need the keys in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import Layer
from moai_llm.ops.attention import attention


class RingLayer(Layer):
    """The last keys, in no order.

    Args:
        window: a query sees this many keys, itself included.
    """

    held = ("keys", "values")

    def __init__(self, window: int) -> None:
        super().__init__()
        assert window > 0
        self.window = window

    def start(self, k: Tensor, v: Tensor) -> None:
        self.keys = k.new_zeros(*k.shape[:2], self.window, k.shape[3])
        self.values = v.new_zeros(*v.shape[:2], self.window, v.shape[3])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, d) new queries over what is held and the new (B, K, L, d), which are held from then on."""
        self.ready(k, v)
        assert self.keys is not None and self.values is not None
        new = k.shape[2]
        if new == 1:
            place = self.seen % self.window
            self.keys[:, :, place], self.values[:, :, place] = k[:, :, 0], v[:, :, 0]
            self.seen += 1
            full = min(self.seen, self.window)
            return attention(q, self.keys[:, :, :full], self.values[:, :, :full])
        before = self._places(max(0, self.seen - self.window + 1), self.seen)
        keys, values = torch.cat([self.keys[:, :, before], k], 2), torch.cat([self.values[:, :, before], v], 2)
        y = attention(q, keys, values, window=self.window)
        first = max(0, new - self.window)
        places = self._places(self.seen + first, self.seen + new)
        self.keys[:, :, places], self.values[:, :, places] = k[:, :, first:], v[:, :, first:]
        self.seen += new
        return y

    def _places(self, start: int, stop: int) -> Tensor:
        return torch.arange(start, stop, device=self.device) % self.window
