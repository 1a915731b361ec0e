"""Log-probabilities of given tokens, and their sums over documents, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import peak_memory
from moai_llm.ops.log_probs import document_sums, linear_log_probs, linear_log_probs_reference
from tests.ops.test_cross_entropy import problem


def loss_of(log_probs: Tensor) -> Tensor:
    """Four documents of a packed row, as pairs: the slope of each row depends on the others."""
    documents = torch.arange(len(log_probs)) * 4 // len(log_probs)
    sums = document_sums(log_probs, documents, 4)
    return torch.nn.functional.softplus(0.1 * (sums[1::2] - sums[::2])).sum()


@pytest.mark.parametrize("rows", [1, 4, 37])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("ignored", [True, False])
def test_against_the_definition(rows: int, chunk_rows: int, ignored: bool) -> None:
    hidden, weight, targets = problem(rows=rows, ignored=ignored)
    truth = linear_log_probs_reference(hidden, weight, targets)
    expected = torch.autograd.grad(loss_of(truth), (hidden, weight))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        h, w = (t.detach().to(dtype).requires_grad_() for t in (hidden, weight))
        found = linear_log_probs(h, w, targets, chunk_rows=chunk_rows)
        assert found.dtype == dtype and (found - truth).norm() <= tolerance * truth.norm()
        assert not found[targets == -100].any()
        for ours, right in zip(torch.autograd.grad(loss_of(found), (h, w)), expected):
            assert ours.dtype == dtype and (ours - right).norm() <= tolerance * right.norm()


def test_control_the_slope_of_each_row_matters() -> None:
    """The gradient of the plain sum, which a loss over tokens has, is another one."""
    hidden, weight, targets = problem()
    (right,) = torch.autograd.grad(loss_of(linear_log_probs_reference(hidden, weight, targets)), hidden)
    (summed,) = torch.autograd.grad(linear_log_probs(hidden, weight, targets).sum(), hidden)
    scale = (right * summed).sum() / summed.square().sum()
    assert (right - scale * summed).norm() > 0.5 * right.norm()


def test_nothing_to_predict() -> None:
    hidden, weight, _ = problem()
    found = linear_log_probs(hidden, weight, torch.full((37,), -100))
    assert not found.any()
    assert not any(g.any() for g in torch.autograd.grad(found.sum(), (hidden, weight)))


def test_only_wanted_gradients_are_made_and_no_second_ones() -> None:
    hidden, weight, targets = problem()
    (right,) = torch.autograd.grad(linear_log_probs_reference(hidden, weight, targets).sum(), hidden)
    (gradient,) = torch.autograd.grad(linear_log_probs(hidden, weight.detach(), targets).sum(), hidden)
    assert torch.allclose(gradient, right)
    with torch.no_grad():
        assert not linear_log_probs(hidden, weight, targets).requires_grad
    (first,) = torch.autograd.grad(linear_log_probs(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), weight)
    again = checkpoint(lambda h: linear_log_probs(h, weight, targets), hidden, use_reentrant=False)
    assert torch.allclose(torch.autograd.grad(again.sum(), hidden)[0], right)


def test_half_precision() -> None:
    hidden, weight, targets = problem(torch.float32, rows=512)
    truth = linear_log_probs_reference(hidden.double(), weight.double(), targets)
    expected = torch.autograd.grad(loss_of(truth), weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_log_probs(hidden, weight, targets, chunk_rows=16)
    assert found.dtype == torch.float32 and (found - truth).norm() < 1e-2 * truth.norm()
    gradient = torch.autograd.grad(loss_of(found), weight)[0]
    assert gradient.dtype == torch.float32 and (gradient - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    weight = torch.randn(8192, 16).requires_grad_()

    def run(rows: int, whole: bool = False) -> int:
        hidden, targets = torch.randn(rows, 16).requires_grad_(), torch.randint(0, 8192, (rows,))

        def step() -> None:
            if whole:
                linear_log_probs_reference(hidden, weight, targets).sum().backward()
            else:
                linear_log_probs(hidden, weight, targets, chunk_rows=64).sum().backward()

        step()  # what is loaded at the first use is no part of it
        return peak_memory(step)

    logits = 1024 * 8192 * 4
    assert run(1024) < run(256) + logits / 3
    assert run(1024, whole=True) > run(256, whole=True) + logits / 2  # the control holds them


def test_document_sums() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = document_sums(values, torch.tensor([0, 2, 2, 0]), 4)
    assert sums.tolist() == [9.0, 0.0, 6.0, 0.0] and sums.dtype == torch.float32
    (sums * torch.tensor([1.0, 5.0, 3.0, 7.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 3.0, 3.0, 1.0]
