"""Pruning by position: the latest keys, and with sinks the first ones of the text as well (StreamingLLM, arXiv
2309.17453).

A query sees the last `window` keys, itself included, and the first `sinks` ones, in whatever chunks the prompt came.
Section 3.2 there gives keys the positions they have in the cache and not in the text: so a sink is never farther away
than it was in training. Angles of RoPE are differences, so it suffices to turn a query back, for its scores with the
sinks, by as many positions as lie forgotten between; keys stay as they were written. Without RoPE nothing is turned.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import Layer
from moai_llm.ops.attention import attention

Turn = Callable[[Tensor, Tensor], Tensor]  # queries (B, H, L, d), positions (L,) to turn each back by


class WindowLayer(Layer):
    """The first keys and the last ones.

    Args:
        window: latest keys that a query sees, itself included.
        sinks: first keys of the text that every query sees.
        turn: how queries are turned back by positions; None leaves them.
    """

    held = ("first_keys", "first_values", "keys", "values")

    def __init__(self, window: int, sinks: int = 0, turn: Turn | None = None) -> None:
        super().__init__()
        assert window > 0 and sinks >= 0
        self.window, self.sinks, self.turn = window, sinks, turn

    def start(self, k: Tensor, v: Tensor) -> None:
        self.first_keys, self.first_values = k[:, :, :0], v[:, :, :0]
        self.keys, self.values = k[:, :, :0], v[:, :, :0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, d) new queries over what is held and the new (B, K, L, d), which are held from then on."""
        self.ready(k, v)
        assert self.keys is not None and self.values is not None
        new = k.shape[2]
        joining = max(0, min(self.sinks - self.seen, new))  # new tokens that are sinks
        first_keys = torch.cat([self.first_keys, k[:, :, :joining]], 2)
        first_values = torch.cat([self.first_values, v[:, :, :joining]], 2)
        keys = torch.cat([self.keys, k[:, :, joining:]], 2)
        values = torch.cat([self.values, v[:, :, joining:]], 2)
        end = self.seen + new
        if end <= self.sinks + self.window or not self.sinks:  # nothing lies forgotten between
            window = None if end <= self.sinks + self.window else self.window
            y = attention(q, torch.cat([first_keys, keys], 2), torch.cat([first_values, values], 2), window=window)
        else:
            y = self._over_gap(q, first_keys, first_values, keys, values)
        self.seen = end
        self.first_keys, self.first_values = first_keys, first_values
        self.keys, self.values = _last(keys, self.window - 1), _last(values, self.window - 1)
        return y

    def _over_gap(self, q: Tensor, first_keys: Tensor, first_values: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Sinks are scored with turned queries, the rest with the queries as they are, under one softmax."""
        b, heads, new, d = q.shape
        at = torch.arange(self.seen, self.seen + new, device=q.device)
        places = at[-1] + 1 - keys.shape[2] + torch.arange(keys.shape[2], device=q.device)
        sinks = torch.arange(first_keys.shape[2], device=q.device)
        sees = torch.cat(
            [sinks <= at[:, None], (places <= at[:, None]) & (places > at[:, None] - self.window)], 1
        )  # (L, sinks + keys)
        forgotten = (at + 1 - self.window - self.sinks).clamp_min(0)
        turned = q if self.turn is None else self.turn(q, forgotten)
        groups = first_keys.shape[1]
        scores = torch.cat(
            [
                turned.reshape(b, groups, -1, new, d) @ first_keys[:, :, None].transpose(-1, -2),
                q.reshape(b, groups, -1, new, d) @ keys[:, :, None].transpose(-1, -2),
            ],
            -1,
        )
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5
        weights = scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1).to(values.dtype)
        return (weights @ torch.cat([first_values, values], 2)[:, :, None]).reshape(b, heads, new, d)


def _last(x: Tensor, count: int) -> Tensor:
    """(B, K, at most count, d), a copy where it is less than all: a view would keep the rest."""
    return x if x.shape[2] <= count else x[:, :, x.shape[2] - count :].clone()
