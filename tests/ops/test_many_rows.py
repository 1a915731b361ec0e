"""Many rows of bf16 without gradients on a CPU that has no instructions for bf16: computed in fp32, rounded once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moai_llm.ops import dispatch
from moai_llm.ops import linear as module
from moai_llm.ops.choices import choices
from moai_llm.ops.cross_entropy import linear_cross_entropy
from moai_llm.ops.dispatch import use
from moai_llm.ops.linear import FEW_ROWS, NATIVE_ROWS, linear, linear_fp32
from moai_llm.ops.moe import Experts, experts_forward

BF16, CPU = torch.bfloat16, torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(module, "BLOCK", 7 * 77)
        monkeypatch.setattr(module, "MOST_ROWS", 13)


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, NATIVE_ROWS + 1, 67])
@pytest.mark.parametrize(("width", "out"), [(77, 45), (1, 1), (640, 131)])
@torch.no_grad()
def test_no_further_from_the_truth_than_torch(rows: int, width: int, out: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, width).to(BF16)
    whole = torch.randn(rows, width).to(BF16)
    for bias in (None, torch.randn(out).to(BF16)):
        exact = F.linear(whole.double(), weight.double(), None if bias is None else bias.double())
        for x in (whole, whole.t().contiguous().t()):
            with use(linear_many_rows="fp32"):
                got = linear(x, weight, bias)
                other = linear(x[None], weight.t().contiguous().t(), bias)
            assert got.dtype is BF16 and got.shape == (rows, out) and other.shape == (1, rows, out)
            assert error(got, exact) <= 1.001 * error(F.linear(x, weight, bias), exact) + 1e-9
            assert error(other[0], exact) <= 1.001 * error(got, exact) + 1e-9
            # one rounding: never further than that of the exact result, but for what fp32 sums lose
            assert (
                (got.double() - exact).abs() <= (exact.to(BF16).double() - exact).abs() + 2e-4
            ).float().mean() > 0.99


@torch.no_grad()
def test_control_a_sum_in_bf16_is_further_from_the_truth() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 256).to(BF16), torch.randn(9, 256).to(BF16)
    exact = F.linear(x.double(), weight.double())
    halves = F.linear(x[:, :128], weight[:, :128]) + F.linear(x[:, 128:], weight[:, 128:])
    with use(linear_many_rows="fp32"):
        assert error(halves, exact) > 1.2 * error(linear(x, weight), exact)


@torch.no_grad()
def test_wrong_shapes_are_refused() -> None:
    with use(linear_many_rows="fp32"), pytest.raises(RuntimeError):
        linear(torch.zeros(34, 8, dtype=BF16), torch.zeros(3, 16, dtype=BF16))


@pytest.mark.parametrize("fast", [True, False])
def test_the_cpu_decides(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fast bf16 products, and with gradients, autocast, or other dtypes and weights, it is torch's product."""
    monkeypatch.setattr(module, "has_fast_bf16", lambda _: fast)
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    calls = []
    monkeypatch.setitem(
        module._linear_many_rows._loaded, "fp32", lambda x, *a, **k: calls.append(1) or F.linear(x, *a, **k)
    )
    dispatch._forget()
    try:
        x, weight = torch.randn(40, 8).to(BF16), torch.randn(3, 8).to(BF16).requires_grad_()
        linear(x, weight).sum().backward()
        with torch.no_grad():
            linear(x.float(), weight.float())
            with torch.autocast("cpu", dtype=BF16):
                linear(x, weight)
            assert not calls
            linear(x, weight)
        assert len(calls) == (0 if fast else 1)
        (choice,) = (choice for choice in choices(CPU) if choice.op == "linear_many_rows")
        assert (choice.fp32, choice.bf16) == ("reference", "reference" if fast else "fp32")
        assert choice.missing == ({"fp32": "bf16 products are fast on this CPU"} if fast else {})
        assert not choice.faster_missing  # nothing for `moai doctor` to warn of
        with use(linear_many_rows="fp32"), torch.no_grad():  # forced, it runs all the same
            linear(x, weight)
        assert len(calls) == (1 if fast else 2)
    finally:
        dispatch._forget()


def test_a_loss_and_experts_take_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not call `linear`: logits in chunks, where gradients are made by hand, and the grouped product."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16).to(BF16), torch.randn(37, 16).to(BF16)
    targets = torch.randint(37, (50,))
    x, ids, weights = torch.randn(60, 16).to(BF16), torch.rand(60, 5).topk(2)[1], torch.rand(60, 2)
    ids[ids == 3] = 4  # an expert without tokens
    experts = Experts(torch.randn(5, 48, 16).to(BF16), torch.randn(5, 16, 24).to(BF16))
    found = {}
    for name in ("reference", "fp32"):
        with use(linear_many_rows=name):
            w = weight.clone().requires_grad_()
            loss = linear_cross_entropy(hidden, w, targets, chunk_rows=20).objective
            loss.backward()
            with torch.no_grad():
                found[name] = [loss.detach(), w.grad, experts_forward(x, ids, weights, experts, F.silu)]
    for got, truth in zip(found["fp32"], found["reference"]):
        assert error(got, truth.double()) < 1e-2
    calls = []
    monkeypatch.setitem(
        module._linear_many_rows._loaded, "fp32", lambda x, *a, **k: calls.append(1) or linear_fp32(x, *a, **k)
    )
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: pytest.fail("torch's grouped product was called"))
    with torch.no_grad():
        with use(linear_many_rows="fp32"):
            linear_cross_entropy(hidden, weight, targets, chunk_rows=20)
            assert len(calls) == 3  # chunks
            experts_forward(x, ids, weights, experts, F.silu)
        with use(linear_many_rows="reference"), pytest.raises(pytest.fail.Exception):  # the control
            experts_forward(x, ids, weights, experts, F.silu)
