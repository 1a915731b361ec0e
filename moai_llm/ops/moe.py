"""Mixture of experts: choosing experts, running them on the tokens that chose them, and the two router losses.

Letters: T tokens, E experts, K chosen per token, d width of the model, f width of an expert, R = T K rows sorted by
expert. Everything about the choice is fp32. Routing is dropless: there is no capacity, every chosen expert sees its
token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops.dispatch import Implementation, define
from moai_llm.ops.linear import linear, many_rows_in_fp32

Activation = Callable[[Tensor], Tensor]


class Experts(NamedTuple):
    """The stacked weights of E experts. `up` holds gate and up one after the other when gated."""

    up: Tensor  # (E, f or 2f, d)
    down: Tensor  # (E, d, f)
    up_bias: Tensor | None = None  # (E, f or 2f)
    down_bias: Tensor | None = None  # (E, d)
    gated: bool = True


# ---------------------------------------------------------------- the choice


def top_k(logits: Tensor, k: int, normalise: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax routing of fp32 logits (T, E) -> weights (T, K), ids (T, K), probabilities (T, E).

    With `noise` (T, E) the choice is made on logits + noise (arXiv 1701.06538, section 2.1); weights and
    probabilities follow it. `normalise` makes the K weights of a token sum to one.
    """
    if noise is not None:
        logits = logits + noise
    probabilities = logits.softmax(-1)
    weights, ids = probabilities.topk(k, -1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids, probabilities


def counter_normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers (fp32) that are a pure function of an int64 key and of their place, on every device.

    With keys (B,) the first dimension is B parts of equal size, one for each key: a row then draws the same numbers
    whatever rows are beside it.
    Recomputing a layer, resuming a run or another rank draws the same numbers. Mixing function: the finaliser of
    MurmurHash3 on (key, place), applied twice; then Box-Muller.
    """
    key = key.reshape(-1, 1)
    place = torch.arange(math.prod(shape) // key.shape[0], device=key.device, dtype=torch.int64)
    first = _mix(_mix(place * 2 + key) ^ key)
    second = _mix(_mix(place * 2 + 1 + key) ^ key)
    u1, u2 = ((bits & 0xFFFFFF).to(torch.float32) for bits in (first, second))
    radius = torch.sqrt(-2 * torch.log((u1 + 1) / 2**24))
    return (radius * torch.cos(u2 * (2 * math.pi / 2**24))).view(shape)


def counter_uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Numbers (fp32) from 0 to below 1, made like those of `counter_normal`."""
    key = key.reshape(-1, 1)
    place = torch.arange(math.prod(shape) // key.shape[0], device=key.device, dtype=torch.int64)
    return ((_mix(_mix(place + key) ^ key) & 0xFFFFFF).to(torch.float32) / 2**24).view(shape)


def _mix(x: Tensor) -> Tensor:
    for shift, factor in ((33, -49064778989728563), (33, -4265267296055464877)):
        x = (x ^ ((x >> shift) & 0x7FFFFFFF)) * factor  # the mask makes the arithmetic shift a logical one
    return x ^ ((x >> 33) & 0x7FFFFFFF)


def switch_loss(load: Tensor, probability: Tensor) -> Tensor:
    """E sum_i f_i P_i (arXiv 2101.03961, eq. 4): f the share of all K selections, P the mean probability, both (E,).

    Uniform routing gives exactly 1. transformers counts f per token instead, so its value is K times this one.
    """
    return load.shape[0] * (load * probability).sum()


# ---------------------------------------------------------------- the experts


def experts_forward(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Sum over the K chosen experts of weight x expert(x).

    Args:
        x: (T, d). ids: (T, K) int64. weights: (T, K) fp32.

    Returns:
        (T, d) in the dtype of x.
    """
    if x.shape[0] <= 2 and x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return experts_per_slot(x, ids, weights, experts, act)
    return _experts(x, ids, weights, experts, act)


def expert(x: Tensor, weights: tuple[Any, ...], gated: bool, act: Activation) -> Tensor:
    """One expert on (R, d); its weights are up, down and their biases or None."""
    up, down, up_bias, down_bias = weights
    return linear(_activate(linear(x, up, up_bias), gated, act), down, down_bias)


def _activate(h: Tensor, gated: bool, act: Activation) -> Tensor:
    if not gated:
        return act(h)
    gate, up = h.chunk(2, -1)
    return act(gate) * up


def _unbind(experts: Experts) -> list[tuple[Any, ...]]:
    """Per expert its four tensors. `unbind`, not `w[e]`: the backward of a select fills a whole (E, f, d) with zeros
    each time.
    """
    count = experts.up.shape[0]
    columns = [[None] * count if t is None else t.unbind(0) for t in experts[:4]]
    return list(zip(*columns))


def experts_reference(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Every expert on every token, weighted by zero where it was not chosen."""
    y = torch.zeros_like(x)
    for e, tensors in enumerate(_unbind(experts)):
        weight = (weights * (ids == e)).sum(-1, keepdim=True)
        y = y + (weight * expert(x, tensors, experts.gated, act)).to(x.dtype)
    return y


def experts_per_slot(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: Activation) -> Tensor:
    """For one or two tokens: one matrix-vector product per chosen expert, on views; gathering weights would copy
    them.
    """
    rows = []
    for token, chosen, weight in zip(x.unbind(0), ids.tolist(), weights.unbind(0)):
        parts = [
            w * expert(token, tuple(None if t is None else t[e] for t in experts[:4]), experts.gated, act)
            for e, w in zip(chosen, weight.unbind(0))
        ]
        rows.append(torch.stack(parts).sum(0).to(x.dtype))
    return torch.stack(rows)


class _ToExperts(torch.autograd.Function):
    """Rows sorted by expert: x[order // K]. Its backward gathers and sums K rows a token, in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, torch.div(order, k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grads[0].index_select(0, inverse)
        return rows.view(-1, ctx.k, rows.shape[-1]).sum(1), None, None, None


class _FromExperts(torch.autograd.Function):
    """Undo the sort: rows[inverse]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


def _sorted(
    x: Tensor, ids: Tensor, weights: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor], experts: int
) -> Tensor:
    """Sort the rows by expert, `run(rows_Rd, expert_of_row_R, ends_E)`, put them back and sum the K of each token."""
    k = ids.shape[1]
    expert_of_row, order = ids.flatten().sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    ends = torch.searchsorted(expert_of_row, torch.arange(experts, device=ids.device), right=True)
    rows = run(_ToExperts.apply(x, order, inverse, k), expert_of_row, ends)
    rows = _FromExperts.apply(rows, order, inverse).view(*ids.shape, -1)
    return (rows * weights[..., None].to(rows.dtype)).sum(1).to(x.dtype)


def experts_loop(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Sorted rows, one expert after the other."""

    def run(rows: Tensor, expert_of_row: Tensor, ends: Tensor) -> Tensor:
        stops = ends.tolist()
        pieces = zip([0, *stops], stops, _unbind(experts))
        return torch.cat([expert(rows[a:b], tensors, experts.gated, act) for a, b, tensors in pieces])

    return _sorted(x, ids, weights, run, experts.up.shape[0])


# F.grouped_mm as an op of our own: under torch.compile its shape function takes bf16 only, while the kernel takes
# fp32 too
@torch.library.custom_op("moai::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows (R, d) sorted by expert, weight (E, f, d), ends (E,) int32 -> (R, f): each row times its expert's weight."""
    if not many_rows_in_fp32(rows, weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    with torch.no_grad():
        pieces = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([linear(*pair) for pair in zip(pieces, weight.unbind(0))])


@grouped_mm.register_fake
def _(rows, weight, ends):
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("moai::grouped_mm_of_rows", mutates_args=())
def _gradient_of_rows(grad: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(grad.contiguous(), weight, offs=ends)  # the kernel refuses expanded gradients


@_gradient_of_rows.register_fake
def _(grad, weight, ends):
    return grad.new_empty(grad.shape[0], weight.shape[2])


@torch.library.custom_op("moai::grouped_mm_of_weight", mutates_args=())
def _gradient_of_weight(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(grad.contiguous().t(), rows, offs=ends)


@_gradient_of_weight.register_fake
def _(grad, rows, ends):
    return grad.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])


def _grouped_mm_save(ctx, inputs, output):
    """A frozen weight needs no rows for its gradient."""
    rows, weight, ends = inputs
    ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight, ends)


def _grouped_mm_gradients(ctx, grad):
    rows, weight, ends = ctx.saved_tensors
    of_rows, of_weight, _ = ctx.needs_input_grad
    return (
        _gradient_of_rows(grad, weight, ends) if of_rows else None,
        _gradient_of_weight(grad, rows, ends) if of_weight else None,
        None,
    )


grouped_mm.register_autograd(_grouped_mm_gradients, setup_context=_grouped_mm_save)


def experts_grouped(x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, act: Activation) -> Tensor:
    """Sorted rows, all experts in two grouped matrix products."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def product(rows: Tensor, weight: Tensor, bias: Tensor | None, expert_of_row: Tensor, ends: Tensor) -> Tensor:
        y = grouped_mm(rows.to(dtype), weight.to(dtype), ends)
        return y if bias is None else y + bias.to(dtype)[expert_of_row]

    def run(rows: Tensor, expert_of_row: Tensor, ends: Tensor) -> Tensor:
        ends = ends.to(torch.int32)
        h = product(rows, experts.up, experts.up_bias, expert_of_row, ends)
        return product(_activate(h, experts.gated, act), experts.down, experts.down_bias, expert_of_row, ends)

    return _sorted(x, ids, weights, run, experts.up.shape[0])


_experts = define(
    "experts",
    {
        "reference": Implementation(experts_reference),
        "loop": Implementation(experts_loop),
        "grouped": Implementation(experts_grouped, dtypes=(torch.float32, torch.bfloat16)),
    },
    order={"any": ["grouped", "loop"] if hasattr(F, "grouped_mm") else ["loop"]},
)
