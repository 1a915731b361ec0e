"""Optimizers and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moai_llm.recipe import OptimConfig

# recurrence parameters: pulling them to zero would change time constants, not simplify the model
NO_DECAY = ("A_log", "D", "dt_bias")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; norms, biases and the state space's recurrence do not. Each parameter once."""
    decaying: list[nn.Parameter] = []
    still: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() >= 2 and name.rsplit(".", 1)[-1] not in NO_DECAY and not name.endswith("bias")
            (decaying if decays else still).append(parameter)
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": still, "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return OPTIMIZERS[config.name](parameter_groups(model, config.weight_decay), config)


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), fused: on a CPU several times faster than the default loop, on CUDA the fastest too."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {"adamw": _adamw}
