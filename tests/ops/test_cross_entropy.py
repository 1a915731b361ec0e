"""Chunked losses against the definition in float64: sums, gradients, ignored rows, dtypes, memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import peak_memory
from moai_llm.losses import chunked_cross_entropy_loss, create_loss_function, shift_labels
from moai_llm.ops.cross_entropy import (
    LossSums,
    Objective,
    chunked_cross_entropy,
    default_chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

OBJECTIVES = {
    "cross_entropy": Objective(),
    "focal": Objective(cross_entropy=0, focal=1),
    "focal, small gamma": Objective(cross_entropy=0, focal=1, gamma=0.5),
    "smoothed": Objective(cross_entropy=0, smoothed=1, smoothing=0.2),
    "z": Objective(z=1e-2),
    "all": Objective(0.6, 0.3, 0.1, 1e-3, 1.5, 0.1),
}


def problem(dtype: torch.dtype = torch.float64, rows: int = 37, ignored: bool = True):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    hidden = (2 * torch.randn(rows, 12, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(101, 12, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, 101, (rows,))
    if ignored:
        targets[::5] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("ignored", [True, False])
def test_from_hidden_states(name: str, chunk_rows: int, ignored: bool) -> None:
    hidden, weight, targets = problem(ignored=ignored)
    truth = linear_cross_entropy_reference(hidden, weight, targets, OBJECTIVES[name])
    expected = torch.autograd.grad(0.3 * truth.objective, (hidden, weight))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        sums = linear_cross_entropy(h, w, targets, objective=OBJECTIVES[name], chunk_rows=chunk_rows)
        assert torch.isclose(sums.objective.double(), truth.objective, rtol=tolerance)
        assert torch.isclose(sums.cross_entropy.double(), truth.cross_entropy, rtol=tolerance)
        for ours, right in zip(torch.autograd.grad(0.3 * sums.objective, (h, w)), expected):
            assert (ours - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_from_logits(name: str) -> None:
    hidden, weight, targets = problem()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    truth = linear_cross_entropy_reference(logits, torch.eye(101).double(), targets, OBJECTIVES[name])
    sums = chunked_cross_entropy(logits, targets, objective=OBJECTIVES[name], ignore_index=-100, chunk_rows=5)
    assert torch.isclose(sums.objective, truth.objective)
    ours, right = (torch.autograd.grad(s.objective, logits)[0] for s in (sums, truth))
    assert (ours - right).abs().max() < 1e-12


def test_a_certain_prediction_has_finite_gradients() -> None:
    hidden = torch.tensor([[60.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    for objective in OBJECTIVES.values():
        sums = linear_cross_entropy(hidden, weight, torch.tensor([0]), objective=objective)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(sums.objective, (hidden, weight)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_target_at_all(name: str) -> None:
    hidden, weight, _ = problem()
    nothing = torch.full((37,), -100)
    sums = linear_cross_entropy(hidden, weight, nothing, objective=OBJECTIVES[name])
    assert sums.objective == 0 and sums.cross_entropy == 0
    assert not any(g.any() for g in torch.autograd.grad(sums.objective, (hidden, weight)))
    logits = torch.randn(4, 5, requires_grad=True)
    loss = chunked_cross_entropy_loss(logits, torch.full((4,), -100))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


def test_half_precision_logits_keep_an_fp32_loss() -> None:
    hidden, weight, targets = problem(torch.float32, rows=512)
    truth = linear_cross_entropy_reference(hidden.double(), weight.double(), targets, Objective()).objective
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = linear_cross_entropy(hidden, weight, targets, chunk_rows=16)
    assert sums.objective.dtype == torch.float32
    assert abs(float(sums.objective.detach() / truth.detach()) - 1) < 3e-3
    gradient = torch.autograd.grad(sums.objective, weight)[0]
    assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()


def test_only_wanted_gradients_are_made() -> None:
    hidden, weight, targets = problem()
    frozen = weight.detach()
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, frozen, targets).objective, (hidden,))
    assert gradient.shape == hidden.shape
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).objective.requires_grad


def from_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> LossSums:
    return chunked_cross_entropy(
        hidden @ weight.t(), targets, objective=Objective(), ignore_index=-100, chunk_rows=1000
    )


@pytest.mark.parametrize("function", [linear_cross_entropy, from_logits])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_graph_that_is_kept_can_be_used_again(function: Callable[..., LossSums], scale: float) -> None:
    """The last backward scales the gradients in the memory of the forward: no other may."""
    hidden, weight, targets = problem()
    truth = linear_cross_entropy_reference(hidden, weight, targets, Objective()).objective
    right = torch.autograd.grad(scale * truth, (hidden, weight))
    sums = function(hidden, weight, targets)
    loss = 0.5 * scale * sums.objective + 0.5 * scale * sums.objective
    for _ in range(3):  # into gradients that may not share memory with what is kept
        loss.backward(retain_graph=True)
    assert hidden.grad is not None and weight.grad is not None
    for t, gradient in zip((hidden, weight), right):
        assert torch.allclose(t.grad, 3 * gradient)
        t.grad.zero_()
    first = torch.autograd.grad(sums.objective, (hidden, weight), retain_graph=True)
    loss.backward()
    for t, before, gradient in zip((hidden, weight), first, right):
        assert torch.allclose(t.grad, gradient) and torch.allclose(scale * before, gradient)
        assert not t.grad.requires_grad
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("function", [linear_cross_entropy, from_logits])
def test_other_ways_backward(function: Callable[..., LossSums]) -> None:
    hidden, weight, targets = problem()
    truth = linear_cross_entropy_reference(hidden, weight, targets, Objective()).objective
    (right,) = torch.autograd.grad(truth, weight)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale * function(hidden, weight, targets).objective, weight, create_graph=True)
    assert torch.allclose(gradient, 0.3 * right)
    assert torch.allclose(torch.autograd.grad(gradient.square().sum(), scale)[0], 0.6 * right.square().sum())
    scales = torch.tensor([1.0, 0.3]).double()
    loss = function(hidden, weight, targets).objective
    (several,) = torch.autograd.grad(loss, weight, scales, is_grads_batched=True)
    assert torch.allclose(several, torch.stack([right, 0.3 * right]))
    loss = function(hidden, weight, targets).objective
    several = torch.func.vmap(lambda one: torch.autograd.grad(loss, weight, one)[0])(scales)
    assert torch.allclose(several, torch.stack([right, 0.3 * right]))

    def loss_of(h: Tensor, w: Tensor) -> Tensor:
        return function(h, w, targets).objective

    recomputed = checkpoint(loss_of, hidden, weight, use_reentrant=False)
    assert torch.allclose(torch.autograd.grad(0.3 * recomputed, weight)[0], 0.3 * right)
    with FlopCounterMode(display=False):
        assert torch.allclose(torch.autograd.grad(0.3 * loss_of(hidden, weight), weight)[0], 0.3 * right)


def test_second_derivatives_are_refused() -> None:
    hidden, weight, targets = problem()
    for keep in (True, False):
        loss = linear_cross_entropy(hidden, weight, targets).objective
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True, retain_graph=keep)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(gradient.sum(), hidden)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_backward_needs_no_second_copy_of_the_gradients() -> None:
    hidden, weight, targets = torch.randn(64, 512), torch.randn(16384, 512), torch.randint(0, 16384, (64,))
    copy = weight.numel() * weight.element_size()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()

    def forward() -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, chunk_rows=32).objective / 64

    forward().backward()  # what is loaded at the first use is no part of it
    hidden.grad = weight.grad = None
    alone, last, kept = map(
        peak_memory, (forward, lambda: forward().backward(), lambda: forward().backward(retain_graph=True))
    )
    assert last < alone + copy / 4
    assert alone + 0.9 * copy < kept < alone + 1.25 * copy  # the control: a graph that is kept needs one


@pytest.mark.filterwarnings("ignore")
def test_it_traces_without_a_graph_break() -> None:
    hidden, weight, targets = problem(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w: linear_cross_entropy(h, w, targets).objective, fullgraph=True, backend="aot_eager"
    )
    right = torch.autograd.grad(0.3 * linear_cross_entropy(hidden, weight, targets).objective, (hidden, weight))
    loss = 0.3 * compiled(hidden, weight)
    for keep in (True, False):
        ours = torch.autograd.grad(loss, (hidden, weight), retain_graph=keep)
        assert all(torch.allclose(a, b) for a, b in zip(ours, right))


def test_chunks_fit_a_budget() -> None:
    large, small = 2**40, 2**33
    assert default_chunk_rows(128_000, "cpu", large) * 128_000 * 4 <= 2**28
    assert default_chunk_rows(100, "cpu", large) == 1024
    assert default_chunk_rows(10**8, "cuda", large) == 64
    assert default_chunk_rows(100_000, "cuda", large) == 2**30 // 400_000
    assert default_chunk_rows(100_000, "cuda", small) == 2**28 // 400_000  # a GPU of 8 GiB
    assert default_chunk_rows(100_000, "cpu", small) == 2**27 // 400_000
    assert default_chunk_rows(100_000, "cpu") >= 64  # of this machine


def test_the_documented_calls() -> None:
    logits, labels = torch.randn(2, 9, 31), torch.randint(0, 31, (2, 9))
    labels[0, :3] = -100
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.isclose(chunked_cross_entropy_loss(logits, labels, chunk_size=4, ignore_index=-100), plain)
    summed = chunked_cross_entropy_loss(logits, labels, reduction="sum")
    assert torch.isclose(summed, plain * (labels != -100).sum())
    params = {"ce_weight": 0.6, "focal_weight": 0.3, "smooth_weight": 0.1, "focal_gamma": 2.0, "smoothing": 0.1}
    assert create_loss_function({"type": "multi_objective", "params": params})(logits, labels) > 0
    assert create_loss_function({"type": "focal", "params": {"gamma": 0.0}})(logits, labels).isclose(plain)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "focall"}, "'focall' is unknown; there are cross_entropy"),
        ({"type": "focal", "params": {"gama": 1}}, "gama"),
        ({"typ": "focal"}, "unknown keys"),
    ],
)
def test_wrong_losses(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_loss_function(config)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="do not match"):
        chunked_cross_entropy_loss(torch.randn(3, 5), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="mean or sum"):
        chunked_cross_entropy_loss(torch.randn(3, 5), torch.zeros(3, dtype=torch.long), reduction="none")


def test_a_uniform_model_loses_ln_v() -> None:
    assert math.isclose(
        float(chunked_cross_entropy_loss(torch.zeros(5, 77), torch.arange(5))), math.log(77), rel_tol=1e-6
    )


def test_shift() -> None:
    assert shift_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, -100]]
