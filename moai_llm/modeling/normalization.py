"""RMSNorm (arXiv 1910.07467) and LayerNorm, chosen by `norm_type`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moai_llm.config import MoaiConfig
from moai_llm.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32 (`ops.norm`)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


MoaiRMSNorm = RMSNorm  # the name older code imports

NORMS: dict[str, type[nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": nn.LayerNorm}


def make_norm(config: MoaiConfig) -> nn.Module:
    """The norm of the residual stream."""
    return NORMS[config.norm_type](config.hidden_size, eps=config.rms_norm_eps)
