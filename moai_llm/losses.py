"""Training losses by name: of the next token, of a teacher's distribution, of pairs of answers, of vectors of texts.

Those over a vocabulary are computed from hidden states, without holding logits; the first also from logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.cross_entropy import LossSums, Objective, chunked_cross_entropy, linear_cross_entropy
from moai_llm.ops.distillation import DistillationSums, DistillationTerms, Head, linear_distillation


@dataclass(frozen=True)
class Loss:
    """A loss over next tokens. Called with logits it returns a mean; `sums` is what training uses."""

    objective: Objective = Objective()
    ignore_index: int = -100

    def __call__(self, logits: Tensor, labels: Tensor, chunk_size: int = 1024) -> Tensor:
        """Mean over the targets of logits (..., V) against labels (...), which are already shifted."""
        return chunked_cross_entropy_loss(logits, labels, chunk_size, self.ignore_index, objective=self.objective)

    def sums(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> LossSums:
        """Loss sums from hidden states (T, d), the head's weight (V, d) and labels (T,); see ops/cross_entropy.py."""
        return linear_cross_entropy(hidden, weight, labels, objective=self.objective, ignore_index=self.ignore_index)


@dataclass(frozen=True)
class DistillationLoss:
    """How far a student is from its teacher, and from the next token."""

    terms: DistillationTerms
    ignore_index: int = -100

    def sums(self, student: Head, teacher: Head, labels: Tensor, tokens: int | None = None) -> DistillationSums:
        """Loss sums from both models' hidden states and heads; see ops/distillation.py."""
        return linear_distillation(student, teacher, labels, self.terms, tokens=tokens, ignore_index=self.ignore_index)


class PairLosses(NamedTuple):
    """One number for each pair, (n,)."""

    objective: Tensor  # what is trained on
    preference: Tensor  # the part of it that compares
    chosen: Tensor  # the implicit rewards, detached
    rejected: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """How well a model tells the better answer from the worse one.

    With d the log-ratio of the model to the reference on the better answer, minus the one on the worse (or the
    log-probabilities themselves where there is no reference) and h = beta d - gamma:

        DPO (arXiv 2305.18290)      -log sigmoid(h); smoothed by s (its section on noise; "cDPO"):
                                    -(1 - s) log sigmoid(h) - s log sigmoid(-h)
        IPO (arXiv 2310.12036)      (d - 1 / (2 beta))^2, `squared`
        SimPO (arXiv 2405.14734)    -log sigmoid(h), from means over tokens, without a reference

    `sft_weight` adds the cross-entropy of the better answer, per token (arXiv 2404.19733).
    """

    beta: float
    label_smoothing: float = 0.0
    sft_weight: float = 0.0
    length_normalized: bool = False  # means over the tokens of an answer in place of sums
    gamma: float = 0.0
    squared: bool = False
    needs_reference: bool = True

    def __call__(self, log_probs: Tensor, lengths: Tensor, reference: Tensor | None = None) -> PairLosses:
        """
        Args:
            log_probs: (n, 2) summed over the learned tokens of the better and the worse answer, and `lengths` (n, 2)
                their number. reference: (n, 2) the same of the reference model.
        """
        if self.needs_reference != (reference is not None):
            raise ValueError("this loss compares with" + ("" if self.needs_reference else "out") + " a reference")
        lengths = lengths.to(log_probs.dtype).clamp_min(1)
        ratios = log_probs if reference is None else log_probs - reference.to(log_probs.dtype)
        if self.length_normalized:
            ratios = ratios / lengths
        difference = ratios[:, 0] - ratios[:, 1]
        if self.squared:
            preference = (difference - 1 / (2 * self.beta)).square()
        else:
            h, s = self.beta * difference - self.gamma, self.label_smoothing
            preference = -(1 - s) * F.logsigmoid(h) - s * F.logsigmoid(-h)
        objective = preference
        if self.sft_weight:
            objective = objective - self.sft_weight * log_probs[:, 0] / lengths[:, 0]
        return PairLosses(objective, preference.detach(), *(self.beta * ratios.detach()).unbind(1))


@dataclass(frozen=True)
class ContrastiveLoss:
    """What the vectors of texts are trained by; `training/contrastive.py` says over which of them.

    info_nce   each text must find what belongs to it among all texts of the step (`ops/contrastive.py`)
    pairwise   what belongs together is drawn close, the rest is pushed apart
    cosine     (cosine - score)^2, for pairs that somebody graded
    """

    kind: Literal["info_nce", "pairwise", "cosine"]
    temperature: float = 0.05
    learned_temperature: bool = False
    symmetric: bool = True  # right answers must find their anchor, too
    inside: bool = False
    margin: float = 2.0
    mask_equal: bool = True  # texts known to mean the same are no wrong answers
    positive_score: float = 0.5  # a graded pair is a right answer from here on

    @property
    def scale(self) -> float:
        return 1 / self.temperature


def _plain(z_weight: float = 0.0) -> Loss:
    return Loss(Objective(z=z_weight))


def _focal(gamma: float = 2.0, z_weight: float = 0.0) -> Loss:
    _at_least(0, gamma=gamma)
    return Loss(Objective(cross_entropy=0, focal=1, gamma=gamma, z=z_weight))


def _smoothed(smoothing: float = 0.1, z_weight: float = 0.0) -> Loss:
    _at_least(0, smoothing=smoothing)
    return Loss(Objective(cross_entropy=0, smoothed=1, smoothing=smoothing, z=z_weight))


def _multi_objective(
    ce_weight: float = 0.6,
    focal_weight: float = 0.3,
    smooth_weight: float = 0.1,
    focal_gamma: float = 2.0,
    smoothing: float = 0.1,
    z_weight: float = 0.0,
) -> Loss:
    _at_least(0, focal_gamma=focal_gamma, smoothing=smoothing)
    return Loss(Objective(ce_weight, focal_weight, smooth_weight, z_weight, focal_gamma, smoothing))


def _distillation(
    temperature: float = 1.0, kl_weight: float = 1.0, reverse_kl_weight: float = 0.0, ce_weight: float = 0.0
) -> DistillationLoss:
    _above_zero(temperature=temperature)
    return DistillationLoss(DistillationTerms(ce_weight, kl_weight, reverse_kl_weight, temperature))


def _dpo(
    beta: float = 0.1, label_smoothing: float = 0.0, sft_weight: float = 0.0, length_normalized: bool = False
) -> PreferenceLoss:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing}: the share of wrong labels is from 0 to below 0.5")
    _above_zero(beta=beta)
    return PreferenceLoss(beta, label_smoothing, sft_weight, bool(length_normalized))


def _ipo(beta: float = 0.1, sft_weight: float = 0.0, length_normalized: bool = True) -> PreferenceLoss:
    _above_zero(beta=beta)
    return PreferenceLoss(beta, 0.0, sft_weight, bool(length_normalized), squared=True)


def _simpo(beta: float = 2.0, gamma: float = 1.0, sft_weight: float = 0.0) -> PreferenceLoss:
    _above_zero(beta=beta)
    return PreferenceLoss(beta, 0.0, sft_weight, True, gamma, needs_reference=False)


def _info_nce(
    temperature: float = 0.05,
    learned_temperature: bool = False,
    symmetric: bool = True,
    positives_inside: bool = False,
    false_negative_margin: float = 2.0,
    mask_equal_texts: bool = True,
    positive_score: float = 0.5,
) -> ContrastiveLoss:
    _above_zero(temperature=temperature)
    _at_least(0, false_negative_margin=false_negative_margin)
    if temperature < 0.01:
        raise ValueError(f"temperature {temperature} is below 0.01, where a loss of cosines is all or nothing")
    return ContrastiveLoss(
        "info_nce", temperature, bool(learned_temperature), bool(symmetric), bool(positives_inside),
        false_negative_margin, bool(mask_equal_texts), positive_score,
    )  # fmt: skip


def _pairwise(margin: float = 0.5) -> ContrastiveLoss:
    _above_zero(margin=margin)
    return ContrastiveLoss("pairwise", margin=margin)


def _cosine() -> ContrastiveLoss:
    return ContrastiveLoss("cosine")


def _at_least(least: float, **values: float) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} {value} is below {least}")


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} {value} is not above 0")


AnyLoss = Loss | DistillationLoss | PreferenceLoss | ContrastiveLoss
LOSSES: dict[str, Callable[..., AnyLoss]] = {
    "cross_entropy": _plain,
    "focal": _focal,
    "label_smoothing": _smoothed,
    "multi_objective": _multi_objective,
    "distillation": _distillation,
    "dpo": _dpo,
    "ipo": _ipo,
    "simpo": _simpo,
    "info_nce": _info_nce,
    "pairwise": _pairwise,
    "cosine": _cosine,
}


def create_loss_function(config: dict[str, Any]) -> AnyLoss:
    """{"type": "multi_objective", "params": {"ce_weight": 0.6, ...}} -> Loss.

    Types: cross_entropy, focal, label_smoothing and multi_objective make a `Loss`, distillation a `DistillationLoss`,
    dpo, ipo and simpo a `PreferenceLoss`, info_nce, pairwise and cosine a `ContrastiveLoss`.

    Raises:
        ValueError: an unknown type or parameter, or a value out of range.
    """
    unknown = sorted(set(config) - {"type", "params"})
    if unknown:
        raise ValueError(f"loss: unknown keys {unknown}; a loss has `type` and `params`")
    kind = config.get("type", "cross_entropy")
    if kind not in LOSSES:
        raise ValueError(f"loss type {kind!r} is unknown; there are {', '.join(LOSSES)}")
    try:
        return LOSSES[kind](**(config.get("params") or {}))
    except (TypeError, ValueError) as error:
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
