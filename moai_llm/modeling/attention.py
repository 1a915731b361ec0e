"""Attention: multi-head, grouped-query or multi-query by its head counts, full or sliding, with RoPE, learned
positions or none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moai_llm.config import MoaiConfig
from moai_llm.modeling.linear import Linear, plain
from moai_llm.modeling.normalization import RMSNorm
from moai_llm.modeling.slots import SlotCache
from moai_llm.ops.attention import attention, attention_reference
from moai_llm.ops.attention_step import AttentionWeights
from moai_llm.ops.rotary import apply_rotary


class Attention(nn.Module):
    """Token mixer `full_attention` and `sliding_attention` (arXiv 2305.13245; QK-norm as in Qwen3, 2505.09388)."""

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None and config.num_key_value_heads is not None and config.layer_types is not None
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        self.is_causal = True
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        width, heads, bias = config.hidden_size, config.num_attention_heads * self.head_dim, config.attention_bias
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = Linear(width, heads, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(heads, width, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rope: tuple[Tensor, Tensor] | None,
        mask: Any = None,
        seq_idx: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        b, l, _ = x_BLD.shape
        if isinstance(cache, SlotCache) and l == 1 and not torch.is_grad_enabled():
            weights = cache.weights_of(self.layer_idx, self._step_weights)
            if weights is not None:
                return cache.step(self.layer_idx, x_BLD[:, 0], rope, self.window, weights)[:, None]
        q = self.q_norm(self.q_proj(x_BLD).view(b, l, -1, self.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x_BLD).view(b, l, -1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x_BLD).view(b, l, -1, self.head_dim).transpose(1, 2)
        if rope is not None:
            q, k = apply_rotary(q, *rope), apply_rotary(k, *rope)
        if q.dtype != v.dtype:  # under autocast a norm gives back fp32
            q, k = q.to(v.dtype), k.to(v.dtype)
        if isinstance(cache, SlotCache):
            y = cache.attend(self.layer_idx, q, k, v, self.window).transpose(1, 2)
            return self.o_proj(y.reshape(b, l, -1))
        if cache is not None and (attend := _own_attention(cache, self.layer_idx)) is not None:
            if mask is not None or seq_idx is not None:
                raise ValueError("this cache attends by itself: rows without padding, and attn_implementation='sdpa'")
            return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(b, l, -1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
            if mask is None and cache.layers[self.layer_idx].is_compileable:
                k, v = k[:, :, :l], v[:, :, :l]  # first call of a static cache: the rest of its keys are still empty
        y = self._attend(q, k, v, mask, seq_idx)
        return self.o_proj(y.reshape(b, l, -1))

    def _step_weights(self) -> AttentionWeights | None:
        """For the op of one position; None where the projections are more than their weights."""
        if not plain(self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            return None
        q, k, v, o = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        q_norm, k_norm = getattr(self.q_norm, "weight", None), getattr(self.k_norm, "weight", None)
        return AttentionWeights(
            self.head_dim, self.config.rms_norm_eps, q.weight, k.weight, v.weight, o.weight,
            q.bias, k.bias, v.bias, o.bias, q_norm, k_norm,
        )  # fmt: skip

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, seq_idx: Tensor | None) -> Tensor:
        """(B, H, Lq, d) -> (B, Lq, H, d): our op, or the transformers attention function the user asked for by name."""
        chosen = self.config._attn_implementation
        if chosen in (None, "sdpa"):
            return attention(q, k, v, mask=mask, seq_idx=seq_idx, window=self.window).transpose(1, 2)
        if chosen == "eager":
            return attention_reference(q, k, v, mask, seq_idx, self.window, self.head_dim**-0.5).transpose(1, 2)
        function = ALL_ATTENTION_FUNCTIONS[chosen]
        return function(self, q, k, v, mask, scaling=self.head_dim**-0.5, sliding_window=self.window)[0]


def _own_attention(cache: Any, layer_idx: int) -> Any:
    """The `attend` of a cache layer that computes the attention itself (inference/kv); None for transformers' own."""
    layers = cache.layers
    return getattr(layers[layer_idx], "attend", None) if layer_idx < len(layers) else None
