"""Mamba-1, the selective state space mixer (arXiv 2312.00752), with Jamba's norms on its small projections
(2403.19887).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from moai_llm.config import MoaiConfig
from moai_llm.modeling.linear import Linear, plain
from moai_llm.modeling.normalization import RMSNorm
from moai_llm.modeling.slots import SlotStates
from moai_llm.ops.causal_conv1d import causal_conv1d, conv_tail
from moai_llm.ops.mamba_step import StepWeights, mamba_step
from moai_llm.ops.selective_scan import selective_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # range of the initial step sizes, as published


class Mamba(nn.Module):
    """Token mixer `linear_attention`. Its decoding state is constant: (D, N) fp32 and the last K inputs of the
    convolution.
    """

    KEEP_FP32 = ("A_log", "D", "dt_bias")

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.ssm_dt_rank is not None
        width, inner = config.hidden_size, config.ssm_expand * config.hidden_size
        self.layer_idx, self.kernel, self.eps = layer_idx, config.conv_kernel_size, config.rms_norm_eps
        self.sizes = [config.ssm_dt_rank, config.ssm_state_size, config.ssm_state_size]
        # x and z apart, so that tensor parallelism can split both by channels
        self.in_proj_x = Linear(width, inner, bias=False)
        self.in_proj_z = Linear(width, inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(inner, self.kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner)) if config.conv_bias else None
        self.x_proj = Linear(inner, sum(self.sizes), bias=False)
        self.dt_proj = Linear(config.ssm_dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(inner, config.ssm_state_size, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner, dtype=torch.float32))
        self.out_proj = Linear(inner, width, bias=False)
        norms = [RMSNorm(size, config.rms_norm_eps) if config.ssm_norm else nn.Identity() for size in self.sizes]
        self.dt_norm, self.B_norm, self.C_norm = norms

    def init_weights(self) -> None:
        """A_log = log(1..N), D = 1, and dt_bias so that softplus gives steps log-uniform in [1e-3, 1e-1] (section
        3.6).
        """
        inner, states = self.A_log.shape
        init.copy_(self.A_log, torch.arange(1, states + 1, dtype=torch.float32).log().expand(inner, states))
        init.ones_(self.D)
        steps = torch.exp(torch.rand(inner) * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN)).clamp(DT_FLOOR)
        init.copy_(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        init.uniform_(self.conv_weight, -(self.kernel**-0.5), self.kernel**-0.5)
        if self.conv_bias is not None:
            init.zeros_(self.conv_bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Mamba:
        """model.to(dtype) moves these three but never rounds them: the recurrence overflows or drifts in half
        precision.
        """
        kept = {name: getattr(self, name).data for name in self.KEEP_FP32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            parameter = getattr(self, name)
            if parameter.dtype in (torch.float16, torch.bfloat16) and before.dtype == torch.float32:
                parameter.data = before.to(parameter.device)
        return self

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rope: Any = None,
        mask: Any = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        layer: Any = None if cache is None else cache.layers[self.layer_idx]
        slots = layer if isinstance(layer, SlotStates) else None
        one = x_BLD.shape[1] == 1 and not getattr(layer, "record_past", False)
        if one and (before := _before(layer)) is not None:
            find = self._step_weights
            weights = find() if slots is None else cache.weights_of(self.layer_idx, find)
            if weights is not None:
                return mamba_step(x_BLD[:, 0], *before, weights)[:, None]
        A = -torch.exp(self.A_log)

        def convolve(u: Tensor) -> Tensor:
            before = _before(layer)
            past = None if before is None else before[0].transpose(1, 2)[:, 1:]
            return causal_conv1d(u, self.conv_weight, self.conv_bias, seq_idx=seq_idx, state=past)

        def scan(inputs: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
            before = _before(layer)
            state = None if before is None else before[1]
            y, final = selective_scan(
                u, delta, A, B, C, self.D, seq_idx=seq_idx, initial_state=state, return_final_state=True
            )
            if slots is not None:
                slots.write(self._window(inputs, before), final)
            elif layer is not None:
                # transformers keeps K columns, one more than a step needs
                tail = conv_tail(inputs, self.kernel, seq_idx).transpose(1, 2)
                cache.update_conv_state(tail, self.layer_idx, conv_kernel_size=self.kernel)
                cache.update_recurrent_state(final, self.layer_idx)
            return y

        along = _whole if slots is None else partial(cache.piecewise, dim=1)
        inputs, z = self.in_proj_x(x_BLD), self.in_proj_z(x_BLD)
        u = F.silu(along(convolve, inputs))
        dt, B, C = self.x_proj(u).split(self.sizes, -1)
        dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        delta = F.softplus(self.dt_proj(dt).to(self.dt_bias.dtype) + self.dt_bias)
        return self.out_proj(along(scan, inputs, u, delta, B, C) * F.silu(z))

    def _window(self, inputs: Tensor, before: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, D, K) the last K inputs of the convolution, zeros before the start."""
        tail = conv_tail(inputs, self.kernel).transpose(1, 2)
        missing = self.kernel - tail.shape[2]
        if before is None:
            return F.pad(tail, (missing, 0))
        return torch.cat([before[0][..., self.kernel - missing :].to(tail.dtype), tail], -1)

    def _step_weights(self) -> StepWeights | None:
        """For the op of one position; None where the projections are more than their weights, as with an adapter."""
        if not plain(self.in_proj_x, self.in_proj_z, self.x_proj, self.dt_proj, self.out_proj):
            return None
        dt_norm, B_norm, C_norm = (getattr(norm, "weight", None) for norm in (self.dt_norm, self.B_norm, self.C_norm))
        return StepWeights(
            self.eps, self.in_proj_x.weight, self.in_proj_z.weight, self.conv_weight, self.conv_bias,
            self.x_proj.weight, self.dt_proj.weight, self.dt_bias, self.A_log, self.D, self.out_proj.weight,
            dt_norm, B_norm, C_norm,
        )  # fmt: skip


def _before(layer: Any) -> tuple[Tensor, Tensor] | None:
    """What a layer of a cache holds: the window of the convolution and the state; None at the beginning of a text."""
    if isinstance(layer, SlotStates):
        return None if layer.pair is None else layer.rows()
    continues = layer is not None and layer.has_previous_state[0]
    return (layer.conv_states[0], layer.recurrent_states[0]) if continues else None


def _whole(mix: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`SlotCache.piecewise` where there are no pieces."""
    return mix(*tensors)
