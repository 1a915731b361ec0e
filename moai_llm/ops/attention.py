"""Causal attention over (batch, heads, length, head_dim), with grouped keys, a sliding window and document borders.

Queries are the last Lq of Lk positions, so a cache needs no extra argument. A row never looks across a border of
`seq_idx`.

`reference` writes the scores out; `sdpa` hands one boolean mask to torch; `split` cuts packed rows at their borders
and windowed rows into blocks, so that torch's causal kernel runs on each piece and no L x L mask exists (6x faster
than a mask on a CPU).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v.

    Args:
        q: (B, H, Lq, d). k, v: (B, K, Lk, d) with H a multiple of K and Lk >= Lq.
        mask: (B or 1, 1, Lq, Lk), boolean (true = may look) or additive. It then says everything; causality,
            `seq_idx` and `window` are not applied on top.
        seq_idx: (B, L) document number of each position, for Lq == Lk.
        window: a query sees this many keys, itself included.
        scale: default 1 / sqrt(d).

    Returns:
        (B, H, Lq, d)
    """
    if seq_idx is not None and q.shape[2] != k.shape[2]:
        raise ValueError("seq_idx describes whole rows: queries and keys must have the same length")
    return _attention(q, k, v, mask, seq_idx, window, q.shape[-1] ** -0.5 if scale is None else scale)


def visible(length_q: int, length_k: int, seq_idx: Tensor | None, window: int | None, device: torch.device) -> Tensor:
    """The boolean mask (B or 1, 1, Lq, Lk) that causality, borders and window amount to."""
    query = torch.arange(length_k - length_q, length_k, device=device)[:, None]
    key = torch.arange(length_k, device=device)[None, :]
    keep = key <= query
    if window is not None:
        keep = keep & (key > query - window)
    keep = keep[None, None]
    if seq_idx is not None:
        keep = keep & (seq_idx[:, None, :, None] == seq_idx[:, None, None, :])
    return keep


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seq_idx: Tensor | None, window: int | None, scale: float
) -> Tensor:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if mask is None:
        mask = visible(q.shape[2], k.shape[2], seq_idx, window, q.device)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seq_idx: Tensor | None, window: int | None, scale: float
) -> Tensor:
    length_q, length_k = q.shape[2], k.shape[2]
    causal = False
    if mask is None and length_q > 1:
        sees_all = window is None or window >= length_k
        causal = seq_idx is None and sees_all and length_q == length_k
        if not causal:
            mask = visible(length_q, length_k, seq_idx, window, q.device)
    elif mask is None and window is not None and window < length_k:  # one query: its window is the end of the keys
        k, v = k[:, :, -window:], v[:, :, -window:]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def attention_split(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seq_idx: Tensor | None, window: int | None, scale: float
) -> Tensor:
    whole_rows = mask is None and q.shape[2] == k.shape[2] > 1
    narrow = window is not None and window < q.shape[2]
    if torch.compiler.is_compiling() or not whole_rows or (seq_idx is None and not narrow):
        return attention_sdpa(q, k, v, mask, seq_idx, window, scale)
    borders = document_borders(seq_idx, q.shape[0], q.shape[2])
    if not narrow and all(len(row) == 2 for row in borders):
        return attention_sdpa(q, k, v, None, None, None, scale)
    rows = []
    # `split`, not slices: the backward of a slice fills a tensor of the whole size with zeros each time
    for row_borders, *row in zip(borders, q.split(1), k.split(1), v.split(1)):
        lengths = [stop - start for start, stop in zip(row_borders, row_borders[1:])]
        documents = zip(*(t.split(lengths, 2) for t in row))
        rows.append(torch.cat([_windowed(*document, window=window, scale=scale) for document in documents], 2))
    return torch.cat(rows, 0)


def _windowed(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float) -> Tensor:
    """One document: in one call, or a block of `window` queries at a time against the at most 2 window - 1 keys they
    see.
    """
    length = q.shape[2]
    if window is None or window >= length:
        return attention_sdpa(q, k, v, None, None, None, scale)
    blocks = []
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        blocks.append(attention_sdpa(q[:, :, start:stop], keys, values, None, None, window, scale))
    return torch.cat(blocks, 2)


def document_borders(seq_idx: Tensor | None, batch: int, length: int) -> list[list[int]]:
    """For each row the positions where a document starts, and the length: [0, ..., length]."""
    if seq_idx is None:
        return [[0, length]] * batch
    borders = [[0] for _ in range(batch)]
    for row, position in (seq_idx[:, 1:] != seq_idx[:, :-1]).nonzero().tolist():
        borders[row].append(position + 1)
    return [[*row, length] for row in borders]


_attention = define(
    "attention",
    {
        "reference": Implementation(attention_reference),
        "sdpa": Implementation(attention_sdpa),
        "split": Implementation(attention_split),
    },
    order={"cpu": ["split"], "any": ["sdpa"]},
)
