"""Keys and values in the memory of the CPU; on the device are those of the layer at work and of the next one.

While a layer computes, a side stream brings the keys of the next one (the last layer brings the first's, for the next
token). Only what is new goes back, into pinned memory that lies token after token, so that what is brought is one
piece. transformers' own offloading moves the whole layer both ways at every token. The streams have not been run on a
GPU here; a CPU, on which tests run it, has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import Layer

LEAST = 256  # tokens the host's tensor has room for at first; it doubles


class OffloadedLayer(Layer):
    """`following` is the layer whose keys are brought while this one computes."""

    held = ("host",)

    def __init__(self) -> None:
        super().__init__()
        self.following: OffloadedLayer = self
        self.host: Tensor | None = None  # (room, 2, B, K, d)
        self._brought: Tensor | None = None  # (seen, 2, B, K, d) on the device
        self._side: Any = None

    def start(self, k: Tensor, v: Tensor) -> None:
        assert k.shape == v.shape
        if self.device.type == "cuda":
            self._side = torch.cuda.Stream(self.device)
        self.host = self._room(k, LEAST)

    def _room(self, k: Tensor, tokens: int) -> Tensor:
        shape = (tokens, 2, *k.shape[:2], k.shape[3])
        return torch.zeros(shape, dtype=k.dtype, device="cpu", pin_memory=self._side is not None)

    def prefetch(self) -> None:
        """Begin to bring what is held to the device."""
        if not self.seen or self._brought is not None:
            return
        assert self.host is not None
        if self._side is None:
            self._brought = self.host[: self.seen].clone()
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))  # what this layer wrote last is on its way down
        with torch.cuda.stream(self._side):
            self._brought = self.host[: self.seen].to(self.device, non_blocking=True)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.ready(key_states, value_states)
        self.prefetch()  # the first time, and where layers do not come in their order
        past, self._brought = self._brought, None
        new = torch.stack([key_states, value_states]).permute(3, 0, 1, 2, 4)
        if past is None:
            keys_and_values = new
        else:
            if self._side is not None:
                now = torch.cuda.current_stream(self.device)
                now.wait_stream(self._side)
                past.record_stream(now)  # its memory came from the side stream and is still read on this one
            keys_and_values = torch.cat([past, new])
        self._send(new, key_states)
        self.following.prefetch()  # after sending: a single layer follows itself
        keys, values = keys_and_values.permute(1, 2, 3, 0, 4)
        return keys, values

    def _send(self, new: Tensor, k: Tensor) -> None:
        assert self.host is not None
        stop = self.seen + new.shape[0]
        if stop > self.host.shape[0]:
            if self._side is not None:
                torch.cuda.current_stream(self.device).synchronize()  # copies into the old memory must have ended
            wider = self._room(k, max(stop, 2 * self.host.shape[0]))
            wider[: self.seen] = self.host[: self.seen]
            self.host = wider
        self.host[self.seen : stop].copy_(new.contiguous(), non_blocking=True)
        self.seen = stop

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.host is not None:
            self._settle()
            self.host = self.host.index_select(2, indices.to("cpu"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.host is not None:
            self._settle()
            self.host = self.host.repeat_interleave(repeats, 2)

    def _settle(self) -> None:
        """No copy is on its way, and nothing old is on the device."""
        self._brought = None
        if self._side is not None:
            torch.cuda.synchronize(self.device)

    def reset(self) -> None:
        if self.is_initialized:
            self._settle()
        super().reset()


def chain(layers: list[OffloadedLayer]) -> None:
    """Each brings the one after it, the last the first."""
    for layer, following in zip(layers, [*layers[1:], *layers[:1]]):
        layer.following = following
