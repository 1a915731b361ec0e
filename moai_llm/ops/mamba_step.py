"""One position of a Mamba-1 mixer for decoding, as one op.

Projections, convolution, silu, the selection of dt, B and C, the step of the recurrence and the gate are two dozen
small operations; to start them costs more than to run them. `reference` is these, `native` one C++ function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define
from moai_llm.ops.norm import rms_norm
from moai_llm.ops.selective_scan import selective_scan_step


class StepWeights(NamedTuple):
    """W width of the model, D channels, N states, rank R, kernel K. The three norms are all there or all None."""

    eps: float  # of the norms
    in_x: Tensor  # (D, W)
    in_z: Tensor  # (D, W)
    conv: Tensor  # (D, K)
    conv_bias: Tensor | None  # (D,)
    x_proj: Tensor  # (R + 2N, D): dt, B, C
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,) fp32
    A_log: Tensor  # (D, N) fp32
    D: Tensor  # (D,) fp32
    out: Tensor  # (W, D)
    dt_norm: Tensor | None = None  # (R,)
    B_norm: Tensor | None = None  # (N,)
    C_norm: Tensor | None = None  # (N,)


def mamba_step(x: Tensor, window: Tensor, state: Tensor, weights: StepWeights) -> Tensor:
    """Advance by one position; `window` and `state` are updated in place.

    Args:
        x: (B, W) the input of the mixer at this position.
        window: (B, D, K) the last K inputs of the convolution, zeros before the start.
        state: (B, D, N) fp32, the state of the recurrence.

    Returns:
        (B, W) in the dtype of x.
    """
    plain = x.dtype is weights.x_proj.dtype and not torch.is_autocast_enabled(x.device.type)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain:
        return mamba_step_reference(x, window, state, weights)
    return _mamba_step(x, window, state, weights)


def mamba_step_reference(x: Tensor, window: Tensor, state: Tensor, weights: StepWeights) -> Tensor:
    w = weights
    u, z = F.linear(x, w.in_x), F.linear(x, w.in_z)
    window.copy_(torch.cat([window[..., 1:], u[..., None].to(window.dtype)], -1))
    u = (window * w.conv.to(window.dtype)).sum(-1).to(u.dtype)
    u = F.silu(u if w.conv_bias is None else u + w.conv_bias.to(u.dtype))
    parts = F.linear(u, w.x_proj).split([w.dt_proj.shape[1], state.shape[2], state.shape[2]], -1)
    norms = (w.dt_norm, w.B_norm, w.C_norm)
    dt, B, C = (part if norm is None else rms_norm(part, norm, w.eps) for part, norm in zip(parts, norms))
    delta = F.softplus(F.linear(dt, w.dt_proj).to(w.dt_bias.dtype) + w.dt_bias)
    y = selective_scan_step(state, u, delta, -torch.exp(w.A_log), B, C, w.D)
    return F.linear(y * F.silu(z), w.out)


_mamba_step = define(
    "mamba_step",
    {
        "reference": Implementation(mamba_step_reference),
        "native": Implementation("moai_llm.ops.mamba_step_native:mamba_step_native", (torch.float32, torch.bfloat16)),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
