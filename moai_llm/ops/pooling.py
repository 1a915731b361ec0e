"""One vector for each document of packed rows, from the hidden states of its tokens; and dropout that depends on the
row alone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.moe import counter_uniform

Pooling = Literal["mean", "last", "first"]


def pool_documents(hidden: Tensor, seq_idx: Tensor, documents: int, how: Pooling = "mean") -> Tensor:
    """(B, documents, D): the mean of each document's hidden states, or its last or first; zero where a row has none.

    Computed in fp32 (fp64 for fp64). Documents of higher numbers, which padding is, are left out.

    Args:
        hidden: (B, L, D). seq_idx: (B, L) number of the document at each position; one document is one stretch.
    """
    rows, length, width = hidden.shape
    there = seq_idx < documents
    if how == "mean":
        weight = there
    else:
        border = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (0, 1) if how == "last" else (1, 0), value=True)
        weight = there & border
    number = torch.arange(rows, device=seq_idx.device)[:, None] * documents + seq_idx.clamp_max(documents - 1)
    number = number[weight].long()
    values = hidden[weight].to(torch.promote_types(hidden.dtype, torch.float32))
    sums = values.new_zeros(rows * documents, width).index_add(0, number, values)
    count = torch.bincount(number, minlength=rows * documents).clamp_min(1)
    return (sums / count[:, None]).view(rows, documents, width)


def keyed_dropout(x: Tensor, share: float, key: Tensor) -> Tensor:
    """Set a share of x (B, L, D) to zero and scale the rest; a pure function of the key (B,) of each row and of the
    place in it, so that neither the rows beside it nor a second pass change what is dropped.
    """
    kept = counter_uniform(key + 104_729, tuple(x.shape)) >= share
    return torch.where(kept, x / (1 - share), 0)
