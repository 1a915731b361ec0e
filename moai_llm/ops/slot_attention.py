"""Attention of new positions over slots of a cache: rows of different lengths, each seeing its own beginning only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moai_llm.ops.attention import attention


def slot_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Sequence[int], window: int | None = None
) -> Tensor:
    """Causal attention where the queries are the last Lq of the first `lengths[b]` positions of row b.

    Args:
        q: (B, H, Lq, d). keys, values: (B, K, C, d), of which row b holds `lengths[b]` positions; the rest is finite.
        window: a query sees this many keys, itself included.

    Returns:
        (B, H, Lq, d)
    """
    longest, new = max(lengths), q.shape[2]
    keys, values = keys[:, :, :longest], values[:, :, :longest]
    if min(lengths) == longest:
        if window is not None and longest > window + new - 1:  # the window of the first query is the first key of all
            keys, values = keys[:, :, -(window + new - 1) :], values[:, :, -(window + new - 1) :]
        return attention(q, keys, values, window=window)
    return attention(q, keys, values, mask=slot_mask(lengths, new, longest, window, q.device))


def slot_mask(lengths: Sequence[int], new: int, longest: int, window: int | None, device: torch.device) -> Tensor:
    """(B, 1, Lq, longest), true where a query may look."""
    ends = torch.tensor(lengths, device=device)
    query = ends[:, None, None, None] - new + torch.arange(new, device=device)[:, None]
    key = torch.arange(longest, device=device)
    keep = key <= query
    return keep if window is None else keep & (key > query - window)
