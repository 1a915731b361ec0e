"""Chunked distillation against the definition in float64: sums, gradients, vocabularies padded differently."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import peak_memory
from moai_llm.ops.distillation import DistillationTerms, Head, linear_distillation, linear_distillation_reference

TERMS = {
    "forward": DistillationTerms(),
    "warm": DistillationTerms(temperature=2.5),
    "reverse": DistillationTerms(forward=0, reverse=1, temperature=1.5),
    "cross-entropy": DistillationTerms(cross_entropy=1, forward=0),
    "all": DistillationTerms(0.3, 0.5, 0.2, 0.7),
}
TOKENS = 89


def problem(rows: int = 37, student_rows: int = 101, teacher_rows: int = 97):  # type: ignore[no-untyped-def]
    """Widths differ, and so does the padding of the vocabulary of 89 tokens."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = Head(2 * normal(rows, 12).requires_grad_(), normal(student_rows, 12).requires_grad_())
    student = Head(*(t.detach().requires_grad_() for t in student))
    teacher = Head(normal(rows, 20), normal(teacher_rows, 20))
    targets = torch.randint(0, TOKENS, (rows,), generator=generator)
    targets[::5] = -100
    return student, teacher, targets


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("rows", [3, 37])
def test_against_the_definition(name: str, chunk_rows: int, rows: int) -> None:
    student, teacher, targets = problem(rows)
    truth = linear_distillation_reference(student, teacher, targets, TERMS[name], TOKENS)
    expected = torch.autograd.grad(0.3 * truth.objective, tuple(student))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        mine = Head(*(t.detach().to(dtype).requires_grad_() for t in student))
        theirs = Head(*(t.to(dtype) for t in teacher))
        found = linear_distillation(mine, theirs, targets, TERMS[name], tokens=TOKENS, chunk_rows=chunk_rows)
        for key in ("objective", "cross_entropy", "forward"):
            assert torch.isclose(getattr(found, key).double(), getattr(truth, key), rtol=5 * tolerance), key
        if TERMS[name].reverse:
            assert torch.isclose(found.reverse.double(), truth.reverse, rtol=5 * tolerance)
        for ours, right in zip(torch.autograd.grad(0.3 * found.objective, tuple(mine)), expected):
            assert ours.dtype == dtype and (ours - right).norm() <= 2 * tolerance * right.norm()


def test_the_padding_of_the_teacher_says_nothing() -> None:
    student, teacher, targets = problem()
    other = Head(teacher.hidden, torch.cat([teacher.weight[:TOKENS], 50 * torch.randn(40, 20).double()]))
    for terms in TERMS.values():
        one, two = (linear_distillation(student, t, targets, terms, tokens=TOKENS) for t in (teacher, other))
        assert torch.equal(one.objective, two.objective)
    everything = linear_distillation(student, other, targets, TERMS["forward"])  # control: all rows are tokens
    assert not torch.isclose(everything.objective, one.objective, rtol=1e-2)


def test_the_padding_of_the_student_is_unlearned() -> None:
    student, teacher, targets = problem()
    found = linear_distillation(student, teacher, targets, TERMS["forward"], tokens=TOKENS)
    (gradient,) = torch.autograd.grad(found.objective, student.weight)
    learned = (targets != -100).nonzero().squeeze(1)
    step = student.weight - 0.01 * gradient
    before, after = (
        torch.softmax(student.hidden[learned] @ w.t(), -1)[:, TOKENS:].sum() for w in (student.weight, step)
    )
    assert after < before


def test_a_model_is_at_no_distance_from_itself() -> None:
    student, _, targets = problem()
    same = Head(student.hidden.detach(), student.weight.detach())
    for name in ("forward", "warm", "reverse"):
        found = linear_distillation(student, same, targets, TERMS[name])
        assert abs(float(found.objective.detach())) < 1e-12
        assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(found.objective, tuple(student)))
        other = problem(37)[1]
        assert float(linear_distillation(student, other, targets, TERMS[name]).objective.detach()) > 1  # control


def test_nothing_to_learn() -> None:
    student, teacher, targets = problem()
    found = linear_distillation(student, teacher, torch.full_like(targets, -100), TERMS["all"], tokens=TOKENS)
    assert not any(float(value.detach()) for value in found)
    assert not any(g.any() for g in torch.autograd.grad(found.objective, tuple(student)))


def test_half_precision_and_a_graph_that_is_kept() -> None:
    student, teacher, targets = problem(256)
    truth = linear_distillation_reference(student, teacher, targets, TERMS["all"], TOKENS)
    right = torch.autograd.grad(truth.objective, tuple(student))
    mine = Head(*(t.detach().float().requires_grad_() for t in student))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_distillation(
            mine, Head(*(t.float() for t in teacher)), targets, TERMS["all"], tokens=TOKENS, chunk_rows=50
        )
    assert found.objective.dtype == torch.float32
    assert torch.isclose(found.objective.double(), truth.objective, rtol=1e-2)
    for _ in range(2):
        for ours, exact in zip(torch.autograd.grad(found.objective, tuple(mine), retain_graph=True), right):
            assert ours.dtype == torch.float32 and (ours - exact).norm() < 2e-2 * exact.norm()
    (first,) = torch.autograd.grad(found.objective, mine.hidden)
    assert (first - right[0]).norm() < 2e-2 * right[0].norm()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    weights = torch.randn(4096, 16).requires_grad_(), torch.randn(4096, 24)

    def run(rows: int, whole: bool = False) -> int:
        student = Head(torch.randn(rows, 16).requires_grad_(), weights[0])
        teacher = Head(torch.randn(rows, 24), weights[1])
        targets = torch.randint(0, 4096, (rows,))

        def step() -> None:
            if whole:
                found = linear_distillation_reference(student, teacher, targets, TERMS["all"], 4096)
            else:
                found = linear_distillation(student, teacher, targets, TERMS["all"], chunk_rows=64)
            found.objective.backward()

        step()  # what is loaded at the first use is no part of it
        return peak_memory(step)

    logits = 2048 * 4096 * 4
    assert run(2048) < run(256) + logits / 3
    assert run(2048, whole=True) > run(256, whole=True) + 2 * logits  # the control holds them
