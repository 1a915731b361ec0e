"""One position of an attention mixer for decoding, as one op, over a batch of sequences of different lengths.

Projections, norms of queries and keys, rotation, the write into the cache and the attention itself are two dozen small
operations; to start them costs more than to run them, and where the lengths differ they also need a mask. `reference`
is these, `native` one C++ function that reads of each sequence what it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define
from moai_llm.ops.norm import rms_norm
from moai_llm.ops.rotary import rotate
from moai_llm.ops.slot_attention import slot_attention

Rope = tuple[Tensor, Tensor] | None


class AttentionWeights(NamedTuple):
    """W width of the model, H heads of queries, K of keys, d their size. The two norms are both there or both None."""

    size: int  # d
    eps: float  # of the norms
    q: Tensor  # (H d, W)
    k: Tensor  # (K d, W)
    v: Tensor  # (K d, W)
    out: Tensor  # (W, H d)
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    out_bias: Tensor | None = None
    q_norm: Tensor | None = None  # (d,)
    k_norm: Tensor | None = None  # (d,)


def attention_step(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    rope: Rope,
    window: int | None,
    weights: AttentionWeights,
) -> Tensor:
    """Advance each sequence by one position; `keys` and `values` get it in place.

    Args:
        x: (B, W) the input of the mixer at this position.
        keys, values: (B, K, C, d), of which row b holds `lengths[b]` positions; the rest is finite.
        rope: cos and sin (B, 1, r/2) of the position, or None.
        window: a query sees this many keys, itself included; None: all.

    Returns:
        (B, W) in the dtype of x.
    """
    plain = x.dtype is weights.q.dtype is keys.dtype and not torch.is_autocast_enabled(x.device.type)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain:
        return attention_step_reference(x, keys, values, lengths, rope, window, weights)
    return _attention_step(x, keys, values, lengths, rope, window, weights)


def attention_step_reference(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    rope: Rope,
    window: int | None,
    weights: AttentionWeights,
) -> Tensor:
    w, b = weights, x.shape[0]
    pairs = ((w.q, w.q_bias), (w.k, w.k_bias), (w.v, w.v_bias))
    q, k, v = (F.linear(x, weight, bias).view(b, -1, 1, w.size) for weight, bias in pairs)  # (B, heads, 1, d)
    if w.q_norm is not None and w.k_norm is not None:
        q, k = rms_norm(q, w.q_norm, w.eps), rms_norm(k, w.k_norm, w.eps)
    if rope is not None:
        cos, sin = rope[0][:, None], rope[1][:, None]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    rows, place = torch.arange(b, device=x.device), torch.tensor(lengths, device=x.device)
    keys[rows, :, place], values[rows, :, place] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
    y = slot_attention(q, keys, values, [n + 1 for n in lengths], window)
    return F.linear(y.reshape(b, -1), w.out, w.out_bias)


_attention_step = define(
    "attention_step",
    {
        "reference": Implementation(attention_step_reference),
        "native": Implementation(
            "moai_llm.ops.attention_step_native:attention_step_native", (torch.float32, torch.bfloat16)
        ),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
