"""Distillation from hidden states of two models, in chunks of rows: neither's logits are whole in memory.

With a row's logits z of the student (V) and t of the teacher (N <= V), T the temperature, q = softmax(z / T),
p = softmax(t / T), and q' the softmax over the N tokens that both have:

    cross-entropy    -log softmax(z)_y                                       dL/dz = softmax(z) - onehot(y)
    forward KL       T^2 sum_v p_v (log p_v - log q_v)     arXiv 1503.02531  dL/dz = T (q - p)
    reverse KL       T^2 sum_v q'_v (log q'_v - log p_v)   arXiv 2306.08543  dL/dz = T q' (log q' - log p - sum of it)

A row of the student's vocabulary that the teacher has not (padding of the embedding) has p = 0 in the forward KL, which
moves the student away from it, and is left out of the reverse KL, where it would cost infinitely much.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moai_llm.ops.logit_chunks import blocks, compute_dtype, default_chunk_rows, over_chunks, scaled


class DistillationTerms(NamedTuple):
    """Weights of the three terms, and the temperature of the two KL divergences."""

    cross_entropy: float = 0.0
    forward: float = 1.0
    reverse: float = 0.0
    temperature: float = 1.0


class DistillationSums(NamedTuple):
    """Sums over the rows that have a target, fp32 (fp64 for fp64 inputs)."""

    objective: Tensor  # carries the gradient
    cross_entropy: Tensor  # the plain -log p_y of the student, for reporting
    forward: Tensor  # the divergences at the temperature, without the factor T^2
    reverse: Tensor  # 0 where the objective does not have it


class Head(NamedTuple):
    """What makes logits: hidden states (T, d) and the weight (V, d) of an output layer."""

    hidden: Tensor
    weight: Tensor


def linear_distillation(
    student: Head,
    teacher: Head,
    targets: Tensor,
    terms: DistillationTerms,
    *,
    tokens: int | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> DistillationSums:
    """Loss sums of the student against the teacher at the rows that have a target.

    Under autocast the products run in its dtype. The teacher gets no gradient.

    Args:
        student, teacher: for the same T tokens; widths and vocabularies may differ.
        targets: (T,) int64; rows equal to `ignore_index` cost nothing.
        tokens: both models' first so many rows of vocabulary are tokens; by default those that both have.
        chunk_rows: rows of logits in memory at a time; by default as many as fit a budget.
    """
    dtype = compute_dtype(student.hidden)
    both = min(student.weight.shape[0], teacher.weight.shape[0])
    tokens = both if tokens is None else tokens
    assert tokens <= both
    # two buffers of logits, and on a GPU as many again for what is computed from them
    rows = chunk_rows or max(16, default_chunk_rows(student.weight.shape[0], student.hidden.device.type) // 4)
    sums: Tensor = _Distillation.apply(
        student.hidden.to(dtype), student.weight, teacher.hidden.detach().to(dtype),
        teacher.weight.detach()[:tokens].to(dtype), targets, terms, ignore_index, rows,
    )  # fmt: skip
    return DistillationSums(sums[0], *sums[1:].detach().unbind())


class _Distillation(torch.autograd.Function):
    """The gradients are made in the forward; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        terms: DistillationTerms,
        ignore_index: int,
        chunk_rows: int,
    ) -> Tensor:
        valid = (targets != ignore_index).nonzero().squeeze(1)
        wanted = targets[valid]
        sums = torch.zeros(4, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        grad_hidden, grad_weight = ctx.needs_input_grad[:2]
        of_teacher = hidden.new_empty(min(chunk_rows, len(valid)), teacher_weight.shape[0])

        def visit(logits: Tensor, part: slice) -> None:
            theirs = torch.mm(teacher_hidden[valid[part]], teacher_weight.t(), out=of_teacher[: len(logits)])
            for block in blocks(logits):
                gradient = logits[block] if grad_hidden or grad_weight else None
                sums.add_(_block(logits[block], theirs[block], wanted[part][block], terms, gradient))

        d_hidden, d_weight = over_chunks(
            hidden, weight, valid, visit, chunk_rows, grad_hidden=grad_hidden, grad_weight=grad_weight
        )
        ctx.save_for_backward(d_hidden, d_weight)
        return sums

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and grad_sums.requires_grad:
            raise RuntimeError("the loss from hidden states has no second derivatives")
        wants = ctx.needs_input_grad[:2]
        return (*(scaled(t, grad_sums[0]) if w else None for t, w in zip(ctx.saved_tensors, wants)), *[None] * 6)


def _block(
    logits: Tensor, theirs: Tensor, targets: Tensor, terms: DistillationTerms, gradient: Tensor | None
) -> Tensor:
    """(4,) sums over the rows of student logits (R, V) and teacher logits (R, N); `gradient` may be the logits."""
    dtype, count, t = torch.promote_types(logits.dtype, torch.float32), theirs.shape[1], terms.temperature
    at_target = targets[:, None]
    log_p, log_q = (_log_softmax(x, t, dtype) for x in (theirs, logits))
    log_s = log_q if t == 1 else _log_softmax(logits, 1, dtype)
    nll = -log_s.gather(1, at_target).sum()
    p = log_p.exp()
    forward = (log_p - log_q[:, :count]).mul_(p).sum()
    reverse, of_reverse = torch.zeros_like(forward), None
    if terms.reverse:
        log_q_tokens = log_q[:, :count] - torch.logsumexp(log_q[:, :count], -1, keepdim=True)
        q, ratio = log_q_tokens.exp(), log_q_tokens.sub_(log_p)
        divergence = (q * ratio).sum(-1, keepdim=True)
        reverse, of_reverse = divergence.sum(), q.mul_(ratio.sub_(divergence))
    if gradient is not None:  # from here on the logits are gone
        a, weight = terms.cross_entropy, terms.forward * t
        direct = gradient.dtype == dtype
        slopes = torch.exp(log_q, out=gradient) if direct else log_q.exp()
        if weight + (a if t == 1 else 0) != 1:
            slopes.mul_(weight + (a if t == 1 else 0))
        if a and t != 1:
            slopes.add_(log_s.exp_(), alpha=a)
        if a:
            slopes.scatter_add_(1, at_target, slopes.new_full(at_target.shape, -a))
        if weight:
            slopes[:, :count].sub_(p, alpha=weight)
        if of_reverse is not None:
            slopes[:, :count].add_(of_reverse, alpha=terms.reverse * t)
        if not direct:
            gradient.copy_(slopes)
    objective = terms.cross_entropy * nll + t * t * (terms.forward * forward + terms.reverse * reverse)
    return torch.stack([objective, nll, forward, reverse])


def _log_softmax(logits: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    return torch.log_softmax(logits if temperature == 1 else logits.to(dtype) / temperature, -1, dtype=dtype)


def linear_distillation_reference(
    student: Head, teacher: Head, targets: Tensor, terms: DistillationTerms, tokens: int, ignore_index: int = -100
) -> DistillationSums:
    """The definition, with all logits in memory and autograd's gradients."""
    keep, t = targets != ignore_index, terms.temperature
    z = student.hidden[keep] @ student.weight.t()
    log_p = torch.log_softmax(teacher.hidden[keep] @ teacher.weight[:tokens].t() / t, -1)
    log_q, log_q_tokens = torch.log_softmax(z / t, -1)[:, :tokens], torch.log_softmax(z[:, :tokens] / t, -1)
    nll = -torch.log_softmax(z, -1).gather(1, targets[keep][:, None]).sum()
    forward = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q_tokens.exp() * (log_q_tokens - log_p)).sum()
    objective = terms.cross_entropy * nll + t**2 * (terms.forward * forward + terms.reverse * reverse)
    return DistillationSums(objective, nll, forward, reverse)
