"""Pruning by use: the keys that got most of the attention so far, and the latest ones (H2O, arXiv 2306.14048).

Each head of keys keeps its own `heavy` ones. What counts is the mass, the softmax weights that a key got, summed over
all queries so far and over the query heads of its group (section 4 there). The weights are computed beside the op, in
this mode only. After each forward, of a chunk or of a token, the latest `window` keys stay, and of the rest the
heaviest; what is forgotten is forgotten for good, and so is its mass. So within a chunk every query sees all that was
held before it, and other chunks keep other keys. Keys keep the rotation of their place in the text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import Layer
from moai_llm.ops.attention import visible


class HeavyLayer(Layer):
    """The heaviest keys and the last ones, with their mass.

    Args:
        heavy: keys that stay because of their mass, for each head of keys.
        window: latest keys that stay.
    """

    held = ("keys", "values", "mass")

    def __init__(self, heavy: int, window: int) -> None:
        super().__init__()
        assert heavy > 0 and window > 0
        self.heavy, self.window = heavy, window

    def start(self, k: Tensor, v: Tensor) -> None:
        self.keys, self.values = k[:, :, :0], v[:, :, :0]
        self.mass = torch.zeros(*k.shape[:2], 0, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, d) new queries over what is held and the new (B, K, L, d), which are held from then on."""
        self.ready(k, v)
        keys, values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)  # type: ignore[list-item]
        y, weights = attention_with_weights(q, keys, values)
        mass = torch.nn.functional.pad(self.mass, (0, k.shape[2])) + weights.sum((2, 3))
        self.seen += k.shape[2]
        self._keep(keys, values, mass)
        return y

    def _keep(self, keys: Tensor, values: Tensor, mass: Tensor) -> None:
        self.keys, self.values, self.mass = keys, values, mass
        older = keys.shape[2] - self.window
        if older <= self.heavy:
            return
        chosen = mass[:, :, :older].topk(self.heavy, -1).indices.sort(-1).values  # in the order of the text
        latest = torch.arange(older, keys.shape[2], device=keys.device).expand(*chosen.shape[:2], -1)
        kept = torch.cat([chosen, latest], -1)  # (B, K, heavy + window)
        self.mass = mass.gather(2, kept)
        self.keys = keys.gather(2, kept[..., None].expand(-1, -1, -1, keys.shape[3]))
        self.values = values.gather(2, kept[..., None].expand(-1, -1, -1, values.shape[3]))


def attention_with_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of the last Lq of Lk positions, written out: (B, H, Lq, d) and the weights (B, K, G, Lq, Lk)."""
    b, heads, new, d = q.shape
    scores = q.reshape(b, k.shape[1], -1, new, d) @ k[:, :, None].transpose(-1, -2)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * d**-0.5
    sees = visible(new, k.shape[2], None, None, q.device)[0, 0]
    weights = scores.masked_fill(~sees, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights.to(v.dtype) @ v[:, :, None]).reshape(b, heads, new, d), weights
