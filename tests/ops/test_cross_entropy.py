"""Chunked losses against the definition in float64: sums, gradients, ignored rows, dtypes, memory."""

from __future__ import annotations

import math

import pytest
import torch

from moai_llm.losses import LOSSES, chunked_cross_entropy_loss, create_loss_function, shift_labels
from moai_llm.ops.cross_entropy import (
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


def test_no_target_at_all() -> None:
    hidden, weight, _ = problem()
    nothing = torch.full((37,), -100)
    sums = linear_cross_entropy(hidden, weight, nothing)
    assert sums.objective == 0
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


@pytest.mark.filterwarnings("ignore")
def test_it_traces_without_a_graph_break() -> None:
    hidden, weight, targets = problem(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda h, w: linear_cross_entropy(h, w, targets).objective, fullgraph=True, backend="aot_eager"
    )
    ours = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    right = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets).objective, (hidden, weight))
    assert all(torch.allclose(a, b) for a, b in zip(ours, right))


def test_chunks_fit_a_budget() -> None:
    assert default_chunk_rows(128_000, "cpu") * 128_000 * 4 <= 2**28
    assert default_chunk_rows(100, "cpu") == 1024
    assert default_chunk_rows(10**8, "cuda") == 64


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_by_name(kind: str) -> None:
    logits, labels = torch.randn(2, 9, 31, requires_grad=True), torch.randint(0, 31, (2, 9))
    loss = create_loss_function({"type": kind, "params": {}})(logits, labels)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(logits.grad).all()


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
