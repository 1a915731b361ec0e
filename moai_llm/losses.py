"""Training losses by name, from logits or, without holding logits, from hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops.cross_entropy import LossSums, Objective, chunked_cross_entropy, linear_cross_entropy


def _plain(z_weight: float = 0.0) -> Objective:
    return Objective(z=z_weight)


def _focal(gamma: float = 2.0, z_weight: float = 0.0) -> Objective:
    return Objective(cross_entropy=0, focal=1, gamma=gamma, z=z_weight)


def _smoothed(smoothing: float = 0.1, z_weight: float = 0.0) -> Objective:
    return Objective(cross_entropy=0, smoothed=1, smoothing=smoothing, z=z_weight)


def _multi_objective(
    ce_weight: float = 0.6,
    focal_weight: float = 0.3,
    smooth_weight: float = 0.1,
    focal_gamma: float = 2.0,
    smoothing: float = 0.1,
    z_weight: float = 0.0,
) -> Objective:
    return Objective(ce_weight, focal_weight, smooth_weight, z_weight, focal_gamma, smoothing)


LOSSES: dict[str, Callable[..., Objective]] = {
    "cross_entropy": _plain,
    "focal": _focal,
    "label_smoothing": _smoothed,
    "multi_objective": _multi_objective,
}


@dataclass(frozen=True)
class Loss:
    """A loss over next tokens. Called with logits it returns a mean; `sums` is what training uses."""

    objective: Objective
    ignore_index: int = -100

    def __call__(self, logits: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """Mean over the targets of logits (..., V) against labels (...), which are already shifted."""
        return chunked_cross_entropy_loss(logits, labels, chunk_size, self.ignore_index, objective=self.objective)

    def sums(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> LossSums:
        """Loss sums from hidden states (T, d), the head's weight (V, d) and labels (T,); see ops/cross_entropy.py."""
        return linear_cross_entropy(hidden, weight, labels, objective=self.objective, ignore_index=self.ignore_index)


def create_loss_function(config: dict[str, Any]) -> Loss:
    """{"type": "multi_objective", "params": {"ce_weight": 0.6, ...}} -> Loss.

    Types: cross_entropy, focal, label_smoothing, multi_objective.

    Raises:
        ValueError: an unknown type or parameter.
    """
    unknown = sorted(set(config) - {"type", "params"})
    if unknown:
        raise ValueError(f"loss: unknown keys {unknown}; a loss has `type` and `params`")
    kind = config.get("type", "cross_entropy")
    if kind not in LOSSES:
        raise ValueError(f"loss type {kind!r} is unknown; there are {', '.join(LOSSES)}")
    try:
        return Loss(LOSSES[kind](**(config.get("params") or {})))
    except TypeError as error:
        raise ValueError(f"loss {kind!r}: {error}") from error


def chunked_cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    *,
    reduction: str = "mean",
    objective: Objective = Objective(),  # noqa: B008 - immutable
) -> Tensor:
    """Cross-entropy of logits (..., V) that exist already, in fp32 chunks of `chunk_size` rows.

    It spares the fp32 copies of the logits, not the logits; `linear_cross_entropy` spares those too. Labels are
    already shifted. With no target at all the mean is 0 and has zero gradients.

    Raises:
        ValueError: shapes that do not agree, or a reduction other than mean or sum.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {tuple(labels.shape)} do not match logits {tuple(logits.shape)}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is mean or sum, got {reduction!r}")
    flat_labels = labels.reshape(-1)
    sums = chunked_cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        flat_labels,
        objective=objective,
        ignore_index=ignore_index,
        chunk_rows=chunk_size,
    )
    if reduction == "sum":
        return sums.objective
    return sums.objective / (flat_labels != ignore_index).sum().clamp_min(1)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels (B, L) aligned with their inputs -> the label each position predicts: one to the left, nothing at the
    end.
    """
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
