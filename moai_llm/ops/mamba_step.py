"""One position of a Mamba-1 mixer for decoding: what lies between its input and its output projections, in one op.

Convolution, silu, the selection of dt, B and C, the step of the recurrence and the gate are a dozen small operations;
to start them costs more than to run them. `reference` is that dozen, `native` one C++ function.
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
    """D channels, N states, rank R, kernel K. The three norms are all there or all None."""

    eps: float  # of the norms
    conv: Tensor  # (D, K)
    conv_bias: Tensor | None  # (D,)
    x_proj: Tensor  # (R + 2N, D): dt, B, C
    dt_proj: Tensor  # (D, R)
    dt_bias: Tensor  # (D,) fp32
    A_log: Tensor  # (D, N) fp32
    D: Tensor  # (D,) fp32
    dt_norm: Tensor | None  # (R,)
    B_norm: Tensor | None  # (N,)
    C_norm: Tensor | None  # (N,)


def mamba_step(u: Tensor, z: Tensor, window: Tensor, state: Tensor, weights: StepWeights) -> Tensor:
    """Advance by one position; `window` and `state` are updated in place.

    Args:
        u, z: (B, D) the two input projections of this position.
        window: (B, D, K) the last K inputs of the convolution, zeros before the start.
        state: (B, D, N) fp32, the state of the recurrence.

    Returns:
        (B, D) the input of the output projection.
    """
    plain = u.dtype is weights.x_proj.dtype and not torch.is_autocast_enabled(u.device.type)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not plain:
        return mamba_step_reference(u, z, window, state, weights)
    return _mamba_step(u, z, window, state, weights)


def mamba_step_reference(u: Tensor, z: Tensor, window: Tensor, state: Tensor, weights: StepWeights) -> Tensor:
    w = weights
    window.copy_(torch.cat([window[..., 1:], u[..., None].to(window.dtype)], -1))
    x = (window * w.conv.to(window.dtype)).sum(-1).to(u.dtype)
    x = F.silu(x if w.conv_bias is None else x + w.conv_bias.to(x.dtype))
    parts = F.linear(x, w.x_proj).split([w.dt_proj.shape[1], state.shape[2], state.shape[2]], -1)
    norms = (w.dt_norm, w.B_norm, w.C_norm)
    dt, B, C = (part if norm is None else rms_norm(part, norm, w.eps) for part, norm in zip(parts, norms))
    delta = F.softplus(F.linear(dt, w.dt_proj).to(w.dt_bias.dtype) + w.dt_bias)
    return selective_scan_step(state, x, delta, -torch.exp(w.A_log), B, C, w.D) * F.silu(z)


_mamba_step = define(
    "mamba_step",
    {
        "reference": Implementation(mamba_step_reference),
        "native": Implementation("moai_llm.ops.mamba_step_native:mamba_step_native", (torch.float32, torch.bfloat16)),
    },
    order={"cpu": ["native", "reference"], "any": ["reference"]},
)
