"""The dense channel mixer: SwiGLU (arXiv 2002.05202) or a plain two-matrix MLP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from moai_llm.config import MoaiConfig
from moai_llm.modeling.linear import Linear, plain
from moai_llm.ops.mlp_step import DenseWeights, dense_step, takes


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) with `mlp_gated: false`."""

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(width, inner, bias=bias) if config.mlp_gated else None
        self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.act_name, self.act = config.hidden_act, ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        if plain(self.gate_proj, self.up_proj, self.down_proj) and takes(x, self.up_proj.weight, self.act_name):
            return dense_step(x.reshape(-1, x.shape[-1]), self._step_weights()).view_as(x), None
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x))), None
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)), None

    def _step_weights(self) -> DenseWeights:
        gate = self.gate_proj
        return DenseWeights(
            self.act_name, self.up_proj.weight, self.down_proj.weight, None if gate is None else gate.weight,
            self.up_proj.bias, self.down_proj.bias, None if gate is None else gate.bias,
        )  # fmt: skip
