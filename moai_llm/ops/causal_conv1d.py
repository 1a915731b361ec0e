"""The short depthwise causal convolution in front of a selective scan, with document borders, and its single-token
step.

    y_t = bias + sum_k weight[:, K-1-k] x_{t-k}        over the k in 0..K-1 whose x_{t-k} lies in the same document

Written as K shifted multiply-adds on (batch, length, channels): the layout of the layers around it, so nothing is
transposed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, seq_idx: Tensor | None = None, state: Tensor | None = None
) -> Tensor:
    """Convolve along time.

    Args:
        x: (B, L, D). weight: (D, K). bias: (D,) or None.
        seq_idx: (B, L) document number of each position; taps never reach over a border.
        state: (B, K-1, D) the inputs before x, oldest first; zeros when None.

    Returns:
        (B, L, D) in the dtype of x.
    """
    return _conv(x, weight, bias, seq_idx, state)


def conv_tail(x: Tensor, length: int, seq_idx: Tensor | None = None) -> Tensor:
    """The last `length` inputs (B, <= length, D), which decoding goes on from; those of other documents are zero."""
    tail = x[:, -length:]
    if seq_idx is None:
        return tail
    return tail * (seq_idx[:, -length:] == seq_idx[:, -1:])[..., None]


def conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, state: Tensor | None
) -> Tensor:
    """One output at a time."""
    kernel = weight.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0]) if bias is None else bias.to(x.dtype).expand_as(x[:, 0])
        for k in range(kernel):
            if t - k >= 0:
                same = 1 if seq_idx is None else (seq_idx[:, t - k] == seq_idx[:, t])[:, None]
                y = y + weight[:, kernel - 1 - k].to(x.dtype) * x[:, t - k] * same
            elif state is not None and k - t <= kernel - 1:
                same = 1 if seq_idx is None else (seq_idx[:, 0] == seq_idx[:, t])[:, None]
                y = y + weight[:, kernel - 1 - k].to(x.dtype) * state[:, kernel - 1 + t - k].to(x.dtype) * same
        outputs.append(y)
    return torch.stack(outputs, 1)


def conv_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, state: Tensor | None
) -> Tensor:
    """All outputs at once: one multiply-add per tap."""
    kernel, length = weight.shape[1], x.shape[1]
    w = weight.to(x.dtype)
    past = F.pad(x, (0, 0, kernel - 1, 0)) if state is None else torch.cat([state.to(x.dtype), x], 1)
    y = x * w[:, -1] if bias is None else torch.addcmul(bias.to(x.dtype), x, w[:, -1])
    # what lies before the row belongs to its first document
    ids = None if seq_idx is None else F.pad(seq_idx, (kernel - 1, 0), mode="replicate")
    for k in range(1, kernel):
        shifted = past[:, kernel - 1 - k : kernel - 1 - k + length]
        if ids is not None and seq_idx is not None:
            shifted = shifted * (ids[:, kernel - 1 - k : kernel - 1 - k + length] == seq_idx)[..., None]
        y = torch.addcmul(y, shifted, w[:, kernel - 1 - k])
    return y


_conv = define(
    "causal_conv1d",
    {"reference": Implementation(conv_reference), "torch": Implementation(conv_shifted)},
    order={"any": ["torch"]},
)
