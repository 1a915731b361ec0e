"""The dense channel mixer: SwiGLU (arXiv 2002.05202) or a plain two-matrix MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from moai_llm.config import MoaiConfig
from moai_llm.modeling.linear import Linear


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) with `mlp_gated: false`."""

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias) if config.mlp_gated else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x))), None
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)), None
