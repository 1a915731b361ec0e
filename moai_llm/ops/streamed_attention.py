"""Attention over keys that come in blocks, so that a cache need never lie in memory as a whole.

Maximum and sum of each softmax are carried from block to block (online softmax, arXiv 1805.02867; the outer loop of
FlashAttention, 2205.14135). The result is that of one softmax over all keys; tests compare it with
`attention_reference`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def streamed_attention(
    q: Tensor, past: Iterable[tuple[Tensor, Tensor]], k: Tensor, v: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention of new positions over a past that is seen by all of them.

    Args:
        q: (B, H, L, d). k, v: (B, K, L, d), the keys and values of the same positions.
        past: blocks (B, K, n, d) of what came before, each read once, in any order.

    Returns:
        (B, H, L, d)
    """
    b, heads, length, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = d**-0.5 if scale is None else scale
    grouped = q.reshape(b, k.shape[1], -1, length, d)  # (B, K, G, L, d): the queries of one key head side by side
    causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    top, total, y = _block(grouped, k, v, scale, wide, causal)
    for keys, values in past:
        other_top, other_total, other = _block(grouped, keys, values, scale, wide, None)
        new_top = torch.maximum(top, other_top)
        mine, others = (top - new_top).exp(), (other_top - new_top).exp()
        total, y, top = total * mine + other_total * others, y * mine + other * others, new_top
    return (y / total).to(v.dtype).reshape(b, heads, length, d)


def _block(
    q: Tensor, k: Tensor, v: Tensor, scale: float, wide: torch.dtype, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, G, L, 1) maximum of the scores, sum of their exponentials, and (B, K, G, L, d) the values they weigh."""
    scores = (q @ k[:, :, None].transpose(-1, -2)).to(wide) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(wide).min)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    return top, weights.sum(-1, keepdim=True), (weights.to(v.dtype) @ v[:, :, None]).to(wide)
