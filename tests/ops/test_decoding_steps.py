"""One position of attention and of channel mixers as one op: against the reference, at odd sizes, for rows of different
lengths; and a row's result is the same bits whatever rows are beside it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moai_llm.ops.attention_step import AttentionWeights, attention_step
from moai_llm.ops.dispatch import use
from moai_llm.ops.linear import FEW_ROWS, linear
from moai_llm.ops.mlp_step import ACTIVATIONS, DenseWeights, dense_step, experts_step
from moai_llm.ops.moe import Experts
from moai_llm.ops.slot_attention import slot_attention

DTYPES = [torch.float32, torch.bfloat16]


def close(got: Tensor, truth: Tensor) -> bool:
    allowed = 1e-5 if got.dtype is torch.float32 else 3e-2  # the reference rounds between its pieces
    return bool((got.double() - truth.double()).norm() <= allowed * truth.double().norm())


def attention_inputs(
    dtype: torch.dtype, b: int, width: int, heads: int, shared: int, size: int, full: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, AttentionWeights]:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.3).to(dtype)

    weights = AttentionWeights(
        size, 1e-6, some(heads * size, width), some(shared * size, width), some(shared * size, width),
        some(width, heads * size), *([some(heads * size), some(shared * size), some(shared * size), some(width),
        1 + some(size), 1 + some(size)] if full else []),
    )  # fmt: skip
    angles = torch.rand(b, 1, size // 2) * 6
    rope = (angles.cos(), angles.sin()) if full else None
    return some(b, width), some(b, shared, 9, size), some(b, shared, 9, size), rope, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(
    ("width", "heads", "shared", "size", "full"),
    [(32, 4, 2, 8, True), (7, 3, 1, 5, False), (65, 6, 6, 20, True), (1, 1, 1, 1, False)],
)
def test_attention_step(
    dtype: torch.dtype, window: int | None, width: int, heads: int, shared: int, size: int, full: bool
) -> None:
    lengths = [0, 8, 3]
    x, keys, values, rope, weights = attention_inputs(dtype, 3, width, heads, shared, size, full)
    results = []
    for name in ("native", "reference"):
        cache = keys.clone(), values.clone()
        with torch.no_grad(), use(attention_step=name):
            results.append([attention_step(x, *cache, lengths, rope, window, weights), *cache])
    for got, truth in zip(*results):
        assert close(got, truth)
    written = (results[0][1] != keys).any(-1).any(1)  # one position of each row and no other
    assert written.nonzero().tolist() == [[row, length] for row, length in enumerate(lengths)]


def test_control_attention_reads_what_a_row_holds_and_no_more() -> None:
    x, keys, values, rope, weights = attention_inputs(torch.float32, 2, 32, 4, 2, 8, True)

    def run(keys: Tensor) -> Tensor:
        with torch.no_grad(), use(attention_step="native"):
            return attention_step(x, keys.clone(), values.clone(), [2, 5], rope, None, weights)

    before, past, inside = run(keys), keys.clone(), keys.clone()
    past[0, :, 3:], past[1, :, 6:] = 9, 9
    inside[0, :, 1] = 9
    assert torch.equal(run(past), before)
    assert not torch.allclose(run(inside)[0], before[0]) and torch.equal(run(inside)[1], before[1])


def test_attention_step_refuses_what_does_not_fit() -> None:
    x, keys, values, rope, weights = attention_inputs(torch.float32, 2, 32, 4, 2, 8, True)
    with torch.no_grad(), use(attention_step="native"):
        with pytest.raises(ValueError, match="do not fit"):
            attention_step(x, keys, values, [2, 9], rope, None, weights)
        with pytest.raises(ValueError, match="contiguous"):
            attention_step(x, keys.transpose(0, 1).contiguous().transpose(0, 1), values, [2, 3], rope, None, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize(("rows", "width", "inner"), [(1, 1, 1), (3, 33, 70), (7, 130, 17)])
def test_channel_mixers(dtype: torch.dtype, act: str, rows: int, width: int, inner: int) -> None:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, ids = some(rows, width), torch.stack([torch.randperm(5)[:2] for _ in range(rows)])
    for gated in (True, False):
        up, down, bias, out = some(inner, width), some(width, inner), some(inner), some(width)
        dense = DenseWeights(act, up, down, *((some(inner, width), bias, out, bias) if gated else ()))
        experts = Experts(
            some(5, inner * (1 + gated), width), some(5, width, inner),
            some(5, inner * (1 + gated)) if gated else None, some(5, width) if gated else None, gated,
        )  # fmt: skip
        weights = torch.rand(rows, 2)
        results = []
        for name in ("native", "reference"):
            with torch.no_grad(), use(dense_step=name, experts_step=name):
                results.append([dense_step(x, dense), experts_step(x, ids, weights, experts, act)])
        for got, truth in zip(*results):
            assert close(got, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    """What a request gets must not depend on who else is served: to the bit, where the products are ours."""
    torch.manual_seed(0)
    x, w = torch.randn(FEW_ROWS, 77).to(dtype), torch.randn(45, 77).to(dtype)
    dense = DenseWeights("silu", w, torch.randn(77, 45).to(dtype), w)
    stacked = Experts(torch.randn(3, 90, 77).to(dtype), torch.randn(3, 77, 45).to(dtype))
    ids, weights = torch.tensor([[0, 1], [2, 0]]).repeat(FEW_ROWS // 2, 1), torch.rand(FEW_ROWS, 2)
    with torch.no_grad():
        together = linear(x, w), dense_step(x, dense), experts_step(x, ids, weights, stacked, "silu")
        for i in range(FEW_ROWS):
            row = slice(i, i + 1)
            alone = (
                linear(x[row], w),
                dense_step(x[row], dense),
                experts_step(x[row], ids[row], weights[row], stacked, "silu"),
            )
            assert all(torch.equal(a, b[row]) for a, b in zip(alone, together))


@pytest.mark.parametrize("window", [None, 2, 4])
@pytest.mark.parametrize("new", [1, 3])
def test_slot_attention_is_each_row_alone(window: int | None, new: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, 8) for heads, length in ((4, new), (2, 11), (2, 11)))
    lengths = [3, 11, 7]
    got = slot_attention(q, k, v, lengths, window)
    for i, length in enumerate(lengths):
        row = slice(i, i + 1)
        alone = slot_attention(q[row], k[row, :, :length], v[row, :, :length], [length], window)
        assert torch.allclose(got[row], alone, atol=1e-6)
    assert not torch.allclose(got[:1], slot_attention(q[:1], k[:1], v[:1], [11], window))  # the control
