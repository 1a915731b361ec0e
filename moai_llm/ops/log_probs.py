"""Log-probabilities of given tokens from hidden states, in chunks of rows: the logits are never whole in memory.

For losses that are no sum over tokens, such as those that compare two answers: how much a token counts is known only
after all of them. So the backward computes the logits of a chunk once more. All it needs from the forward is one number
a row, log sum exp z: with the incoming gradient g of a row

    d log p_y / dz = onehot(y) - exp(z - log sum exp z)          dL/dz = g (onehot(y) - p)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moai_llm.ops.logit_chunks import blocks, compute_dtype, default_chunk_rows, over_chunks


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, chunk_rows: int | None = None
) -> Tensor:
    """(T,) log softmax(hidden weight^T) at the target of each row, fp32 (fp64 for fp64 inputs); 0 where there is none.

    Under autocast the products run in its dtype.

    Args:
        hidden: (T, d). weight: (V, d). targets: (T,) int64.
        chunk_rows: rows of logits in memory at a time; by default as many as fit a budget.
    """
    rows = chunk_rows or default_chunk_rows(weight.shape[0], hidden.device.type)
    log_probs: Tensor = _LogProbs.apply(hidden.to(compute_dtype(hidden)), weight, targets, ignore_index, rows)
    return log_probs


def document_sums(values: Tensor, documents: Tensor, count: int) -> Tensor:
    """(count,) sums of values (T,) over the rows of each document (T,), numbered from 0 to count - 1.

    Added up in fp64: rounded back, the sum does not depend on the order in which a GPU adds.
    """
    total = torch.zeros(count, dtype=torch.float64, device=values.device)
    return total.index_add(0, documents, values.double()).to(values.dtype)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, chunk_rows: int
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        valid = (targets != ignore_index).nonzero().squeeze(1)
        wanted = targets[valid][:, None]
        found, log_total = (torch.empty(len(valid), 1, dtype=dtype, device=hidden.device) for _ in range(2))

        def visit(logits: Tensor, part: slice) -> None:
            for block in blocks(logits):
                here = wanted[part][block]  # log_softmax is one pass where log sum exp is several
                log_p = torch.log_softmax(logits[block], -1, dtype=dtype).gather(1, here)
                found[part][block] = log_p
                log_total[part][block] = logits[block].gather(1, here).to(dtype) - log_p

        over_chunks(hidden, weight, valid, visit, chunk_rows)
        ctx.save_for_backward(hidden, weight, wanted, valid, log_total)
        ctx.chunk_rows = chunk_rows
        return torch.zeros(len(targets), dtype=dtype, device=hidden.device).index_copy(0, valid, found.squeeze(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, wanted, valid, log_total = ctx.saved_tensors
        scale = gradient[valid][:, None]

        def visit(logits: Tensor, part: slice) -> None:
            for block in blocks(logits):
                g, mine = scale[part][block], logits[block]
                slopes = mine if mine.dtype == g.dtype else mine.to(g.dtype)
                slopes.sub_(log_total[part][block]).exp_().mul_(-g).scatter_add_(1, wanted[part][block], g)
                if slopes is not mine:
                    mine.copy_(slopes)

        grad_hidden, grad_weight = ctx.needs_input_grad[:2]
        d_hidden, d_weight = over_chunks(
            hidden, weight, valid, visit, ctx.chunk_rows, grad_hidden=grad_hidden, grad_weight=grad_weight
        )
        return d_hidden if grad_hidden else None, d_weight if grad_weight else None, None, None, None


def linear_log_probs_reference(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The definition, with all logits in memory and autograd's gradients."""
    log_p = torch.log_softmax(hidden @ weight.t(), -1)
    found = log_p.gather(1, targets.clamp_min(0)[:, None]).squeeze(1)
    return torch.where(targets != ignore_index, found, 0)
