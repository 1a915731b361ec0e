"""The sparse channel mixer: a router and stacked experts (arXiv 1701.06538, 2101.03961), dropless.

What the router reports leaves as output and is added up by the model, outside any recomputed region: a buffer written
here would count a token twice under activation checkpointing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from moai_llm.config import MoaiConfig
from moai_llm.ops.linear import linear
from moai_llm.ops.mlp_step import experts_step, takes
from moai_llm.ops.moe import Experts, counter_normal, experts_forward, top_k

EXPERT_WEIGHTS = ("up_proj", "down_proj")  # the stacked matrices of a layer, by name


class RouterSums(NamedTuple):
    """Sums over the counted tokens of one layer, fp32. Sums, so that micro-batches and ranks simply add."""

    selected: Tensor  # (E,) how many of the K selections fell on each expert; no gradient
    probability: Tensor  # (E,)
    z: Tensor  # () squared log of the partition function


class Router(nn.Module):
    """Scores every expert for every token; fp32 from the logits on, whatever the model's precision."""

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__()
        self.k, self.normalise = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        self.noise_weight = (
            nn.Parameter(torch.empty(config.num_experts, config.hidden_size)) if config.router_noise else None
        )

    def forward(self, x_TD: Tensor, noise_key: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> weights (T, K), ids (T, K), probabilities (T, E), logits (T, E)."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            logits = linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
            noise = None
            if self.noise_weight is not None and self.training and noise_key is not None:
                spread = F.softplus(F.linear(x, self.noise_weight.to(x.dtype)))
                noise = counter_normal(noise_key, tuple(logits.shape)).to(x.dtype) * spread
            return (*top_k(logits, self.k, self.normalise, noise), logits)


class MoE(nn.Module):
    """Each token through its K best experts, summed with the router's weights."""

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.moe_intermediate_size is not None
        count, width, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.layer_idx, self.gated = layer_idx, config.mlp_gated
        self.router = Router(config)
        up = 2 * inner if config.mlp_gated else inner
        self.up_proj = nn.Parameter(torch.empty(count, up, width))  # gate and up, one after the other, when gated
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        self.up_bias = nn.Parameter(torch.empty(count, up)) if config.mlp_bias else None
        self.down_bias = nn.Parameter(torch.empty(count, width)) if config.mlp_bias else None
        self.act_name, self.act = config.hidden_act, ACT2FN[config.hidden_act]

    def init_weights(self, std: float) -> None:
        for weight in (self.router.weight, self.up_proj, self.down_proj):
            init.normal_(weight, mean=0.0, std=std)
        for zero in (self.router.bias, self.router.noise_weight, self.up_bias, self.down_bias):
            if zero is not None:
                init.zeros_(zero)

    def forward(
        self, x: Tensor, *, token_mask: Tensor | None = None, noise_key: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, RouterSums]:
        """x (B, L, D); only tokens of `token_mask` (B, L) enter the sums, all are routed."""
        key = None if noise_key is None else noise_key + 7_919 * (self.layer_idx + 1)
        y, routed = self._mix(x, key)
        return y, router_sums(*routed[1:], token_mask)

    def step(self, x: Tensor) -> Tensor:
        """`forward` in decoding: the same without what the router reports, which costs as much as a small expert."""
        return self._mix(x, None)[0]

    def _mix(self, x: Tensor, key: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        flat = x.reshape(-1, x.shape[-1])
        routed: tuple[Tensor, Tensor, Tensor, Tensor] = self.router(flat, key)
        weights, ids = routed[:2]
        experts = Experts(self.up_proj, self.down_proj, self.up_bias, self.down_bias, self.gated)
        if type(self.up_proj) is nn.Parameter and takes(flat, self.up_proj, self.act_name):
            y = experts_step(flat, ids, weights, experts, self.act_name)
        else:
            y = experts_forward(flat, ids, weights, experts, self.act)
        return y.view_as(x), routed


def router_sums(ids_TK: Tensor, probabilities_TE: Tensor, logits_TE: Tensor, token_mask: Tensor | None) -> RouterSums:
    """What the balance loss, the z-loss and the utilisation counters need of one layer."""
    mask = None if token_mask is None else token_mask.reshape(-1, 1).to(probabilities_TE.dtype)
    selected = F.one_hot(ids_TK, probabilities_TE.shape[-1]).sum(1).to(probabilities_TE.dtype)
    z = torch.logsumexp(logits_TE, -1, keepdim=True).square()
    if mask is not None:
        selected, probabilities_TE, z = selected * mask, probabilities_TE * mask, z * mask
    return RouterSums(selected.sum(0), probabilities_TE.sum(0), z.sum())
