"""Limits on the gradient: a fixed norm, a percentile of the norms so far, or a share of each unit's weights.

`train.max_grad_norm` holds under each of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moai_llm.optimization import ClipConfig
from moai_llm.training.optim import decays


class Clipped(NamedTuple):
    norm: Tensor  # of the gradient as it was
    kept: Tensor  # the share of that norm which is left: 1 where nothing was clipped


class Clip:
    """Called once a step, between the last backward and the optimizer; clips the gradients of its model in place."""

    def __init__(self, model: nn.Module, config: ClipConfig | None = None, max_norm: float = 1.0) -> None:
        self.config, self.max_norm = config or ClipConfig(), max_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.matrices = _matrices(model)
        self.norms: deque[float] = deque(maxlen=self.config.history)  # a resumed run needs them

    def remember(self, norms: Iterable[float]) -> None:
        """In place of what is remembered: of a run that goes on from a checkpoint."""
        self.norms.clear()
        self.norms.extend(norms)

    def __call__(self) -> Clipped:
        with_gradient = [parameter for parameter in self.parameters if parameter.grad is not None]
        norm = left = _norm(with_gradient)
        if self.config.name == "agc":
            clip_units_(self.matrices, self.config.ratio, self.config.eps)
            left = _norm(with_gradient)
        limit = self._limit(norm)
        nn.utils.clip_grads_with_norm_(with_gradient, limit, left)
        return Clipped(norm, left / norm.clamp_min(1e-20) * (limit / (left + 1e-6)).clamp_max(1))

    def _limit(self, norm: Tensor) -> float:
        """AutoClip (arXiv 2007.14469, Algorithm 1): the norm of this step counts too. One that is not finite would
        spoil the percentile for as long as it is remembered.
        """
        if self.config.name != "percentile":
            return self.max_norm
        if math.isfinite(float(norm)):
            self.norms.append(float(norm))
        if not self.norms:
            return self.max_norm
        return min(self.max_norm, float(np.percentile(self.norms, self.config.percentile)))


def clip_units_(parameters: Iterable[Tensor], ratio: float, eps: float) -> None:
    """Adaptive gradient clipping (arXiv 2102.06171, section 4.1): the gradient of a unit, a row of weights that makes
    one output, is at most `ratio` times as large as the unit, which counts as no smaller than `eps`.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        weight = torch.linalg.vector_norm(parameter.detach(), dim=-1, keepdim=True).clamp_min(eps)
        gradient = torch.linalg.vector_norm(parameter.grad, dim=-1, keepdim=True)
        parameter.grad.mul_((ratio * weight / gradient.clamp_min(1e-6)).clamp_max(1))


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    """What has units: matrices and stacks of them, without the output layer, which the paper leaves alone."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(output, "weight", None)
    named = model.named_parameters()
    return [parameter for name, parameter in named if decays(name, parameter) and parameter is not head]


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
