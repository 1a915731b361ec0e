"""Losses over a vocabulary from hidden states, in chunks of rows, so that the logits are never whole in memory.

Every objective here has, for one row with logits z, probabilities p = softmax(z) and target y, a gradient of the form

    dL/dz = a p - b onehot(y) - c        (a, b numbers of the row, c one number)

so one pass over a chunk gives loss and gradient together, in place; the backward only scales what the forward kept, in
place too where nobody can ask for it again.

    cross-entropy    -log p_y                                              a = b = 1
    focal            (1 - p_y)^g (-log p_y)          arXiv 1708.02002      a = b = (1 - p_y)^g - g p_y (1 - p_y)^(g-1)
    log p_y
    smoothed         (1 - s) (-log p_y) + s mean_v(-log p_v)   1512.00567  a = 1, b = 1 - s, c = s / V
    z-loss           (log sum exp z)^2               arXiv 2204.02311      a = 2 log sum exp z, b = 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.logit_chunks import blocks, compute_dtype, default_chunk_rows, over_chunks, scaled


class Objective(NamedTuple):
    """Weights of the four terms, and their two constants."""

    cross_entropy: float = 1.0
    focal: float = 0.0
    smoothed: float = 0.0
    z: float = 0.0
    gamma: float = 2.0
    smoothing: float = 0.1


PLAIN = Objective()


class LossSums(NamedTuple):
    """Sums over the rows that have a target, fp32 (fp64 for fp64 inputs)."""

    objective: Tensor  # carries the gradient
    cross_entropy: Tensor  # the plain -log p_y, for reporting


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    objective: Objective = PLAIN,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
) -> LossSums:
    """Loss sums of softmax(hidden weight^T) against targets, without ever holding all logits.

    Under autocast the products run in its dtype; loss, softmax and the weight's gradient are fp32 all the same.

    Args:
        hidden: (T, d). weight: (V, d). targets: (T,) int64; rows equal to `ignore_index` cost nothing.
        chunk_rows: rows of logits in memory at a time; by default as many as fit a budget, see `default_chunk_rows`.

    Returns:
        Sums, not means: divide by the number of targets of the whole batch, over all micro-batches and ranks.
    """
    grad_hidden, grad_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    hidden = hidden.to(compute_dtype(hidden))
    sums, _, _ = _forward(
        hidden, weight, targets, list(objective), ignore_index, chunk_rows or 0, grad_hidden, grad_weight
    )
    return LossSums(sums[0], sums[1].detach())


def row_losses(logits: Tensor, targets: Tensor, objective: Objective, gradient: Tensor | None) -> Tensor:
    """(2,) sums of objective and cross-entropy over rows of logits (R, V), in fp32 or wider.

    Args:
        gradient: (R, V) gets dL/dlogits; may be the logits themselves.
    """
    sums = torch.zeros(2, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    for part in blocks(logits):
        sums += _block_losses(logits[part], targets[part], objective, None if gradient is None else gradient[part])
    return sums


def _block_losses(logits: Tensor, targets: Tensor, objective: Objective, gradient: Tensor | None) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    at_target = targets[:, None]
    target_logit = logits.gather(1, at_target).squeeze(1).to(dtype)
    mean_logit = logits.mean(-1, dtype=dtype) if objective.smoothed else None
    log_p = torch.log_softmax(logits, -1, dtype=dtype)
    nll = -log_p.gather(1, at_target).squeeze(1)
    log_total = target_logit + nll
    loss = objective.cross_entropy * nll
    a = torch.full_like(nll, objective.cross_entropy)
    b, c = a.clone(), 0.0
    if objective.focal:
        p, g = (-nll).exp(), objective.gamma
        miss = 1 - p
        loss = loss + objective.focal * miss.pow(g) * nll
        # p log p (1-p)^(g-1) tends to 0 with 1-p for every g > 0, which the power alone would not show for g < 1
        slope = torch.where(miss > 0, g * p * nll * miss.clamp_min(torch.finfo(miss.dtype).tiny).pow(g - 1), 0)
        coefficient = objective.focal * (miss.pow(g) + slope)
        a, b = a + coefficient, b + coefficient
    if objective.smoothed:
        s = objective.smoothing
        assert mean_logit is not None
        loss = loss + objective.smoothed * ((1 - s) * nll + s * (log_total - mean_logit))
        a, b, c = a + objective.smoothed, b + objective.smoothed * (1 - s), objective.smoothed * s / logits.shape[1]
    if objective.z:
        loss = loss + objective.z * log_total.square()
        a = a + 2 * objective.z * log_total
    if gradient is not None:
        direct = gradient.dtype == dtype
        slopes = torch.exp(log_p, out=gradient) if direct else log_p.exp_()
        if objective.cross_entropy != 1 or objective.focal or objective.smoothed or objective.z:
            slopes.mul_(a[:, None])
        slopes.scatter_add_(1, at_target, -b[:, None])
        if c:
            slopes.sub_(c)
        if not direct:
            gradient.copy_(slopes)
    return torch.stack([loss.sum(), nll.sum()])


@torch.library.custom_op("moai::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: list[float],
    ignore_index: int,
    chunk_rows: int,  # 0: by default_chunk_rows
    grad_hidden: bool,
    grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> sums (2,), dL/dhidden (T, d), dL/dweight (V, d); the gradients are empty where they are not wanted."""
    terms = Objective(*objective)
    valid = (targets != ignore_index).nonzero().squeeze(1)
    wanted = targets[valid]
    sums = torch.zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)

    def visit(logits: Tensor, part: slice) -> None:
        sums.add_(row_losses(logits, wanted[part], terms, logits if grad_hidden or grad_weight else None))

    rows = chunk_rows or default_chunk_rows(weight.shape[0], hidden.device.type)
    gradients = over_chunks(hidden, weight, valid, visit, rows, grad_hidden=grad_hidden, grad_weight=grad_weight)
    return (sums, *gradients)


@_forward.register_fake
def _(hidden, weight, targets, objective, ignore_index, chunk_rows, grad_hidden, grad_weight):
    return (
        hidden.new_empty(2, dtype=torch.promote_types(hidden.dtype, torch.float32)),
        torch.empty_like(hidden) if grad_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if grad_weight else weight.new_empty(0),
    )


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # else the gradients, as outputs that nobody uses, get gradients of zeros
    ctx.wants = inputs[6:8]
    ctx.save_for_backward(*output[1:])


def _gradients(ctx, grad_sums, *_):
    if grad_sums is None:  # the gradients themselves are asked for theirs
        raise RuntimeError("the loss from hidden states has no second derivatives")
    grads = [scaled(t, grad_sums[0]) if wanted else None for t, wanted in zip(ctx.saved_tensors, ctx.wants)]
    return (*grads, *[None] * 6)


_forward.register_autograd(_gradients, setup_context=_save)


class _ChunkedFromLogits(torch.autograd.Function):
    """The same losses from logits that exist already: the gradient is made chunk by chunk, in the logits' own dtype."""

    @staticmethod
    def forward(ctx, logits, targets, objective, ignore_index, chunk_rows):
        loss_dtype = torch.promote_types(logits.dtype, torch.float32)
        sums = torch.zeros(2, dtype=loss_dtype, device=logits.device)
        gradient = torch.zeros_like(logits) if logits.requires_grad else None
        for start in range(0, logits.shape[0], chunk_rows):
            part = slice(start, start + chunk_rows)
            valid = (targets[part] != ignore_index).nonzero().squeeze(1)
            rows = logits[part][valid]
            sums += row_losses(rows, targets[part][valid], objective, None if gradient is None else rows)
            if gradient is not None:
                gradient[part][valid] = rows
        ctx.save_for_backward(gradient)
        return sums

    @staticmethod
    def backward(ctx, grad_sums):
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, grad_sums[0]), None, None, None, None


def chunked_cross_entropy(
    logits: Tensor, targets: Tensor, *, objective: Objective, ignore_index: int, chunk_rows: int
) -> LossSums:
    """Loss sums from logits (T, V) and targets (T,), `chunk_rows` rows in fp32 at a time."""
    sums = _ChunkedFromLogits.apply(logits, targets, objective, ignore_index, chunk_rows)
    return LossSums(sums[0], sums[1].detach())


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, objective: Objective, ignore_index: int = -100
) -> LossSums:
    """The definition, with all logits in memory and autograd's gradients."""
    keep = targets != ignore_index
    log_p = F.log_softmax(hidden[keep] @ weight.t(), -1)
    nll = -log_p.gather(1, targets[keep][:, None]).squeeze(1)
    log_total = torch.logsumexp(hidden[keep] @ weight.t(), -1)
    s = objective.smoothing
    loss = (
        objective.cross_entropy * nll
        + objective.focal * (1 - (-nll).exp()) ** objective.gamma * nll
        + objective.smoothed * ((1 - s) * nll - s * log_p.mean(-1))
        + objective.z * log_total**2
    )
    return LossSums(loss.sum(), nll.sum())
