"""Losses by name against formulas of their own in float64, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moai_llm.losses import DistillationLoss, Loss, PreferenceLoss, create_loss_function
from moai_llm.ops.distillation import Head


def made(kind: str, **params: float):  # type: ignore[no-untyped-def]
    return create_loss_function({"type": kind, "params": params})


def focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    p = torch.softmax(logits, -1)[torch.arange(len(labels)), labels]
    return (-((1 - p) ** gamma) * p.log()).mean()


@pytest.mark.parametrize("kind", ["cross_entropy", "focal", "label_smoothing", "multi_objective"])
def test_losses_of_the_next_token(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (23,), generator=generator)
    labels[::4] = -100
    keep, z = labels != -100, 1e-3
    logits = (hidden @ weight.t())[keep]
    plain = F.cross_entropy(logits, labels[keep])
    smooth = F.cross_entropy(logits, labels[keep], label_smoothing=0.2)
    params, right = {
        "cross_entropy": ({}, plain),
        "focal": ({"gamma": 1.5}, focal(logits, labels[keep], 1.5)),
        "label_smoothing": ({"smoothing": 0.2}, smooth),
        "multi_objective": (
            {"ce_weight": 0.5, "focal_weight": 0.3, "smooth_weight": 0.2, "focal_gamma": 1.5, "smoothing": 0.2},
            0.5 * plain + 0.3 * focal(logits, labels[keep], 1.5) + 0.2 * smooth,
        ),
    }[kind]
    right = right + z * torch.logsumexp(logits, -1).square().mean()
    expected = torch.autograd.grad(right, (hidden, weight))
    loss = made(kind, z_weight=z, **params)
    sums, count = loss.sums(hidden, weight, labels), keep.sum()
    assert torch.isclose(sums.objective / count, right) and torch.isclose(sums.cross_entropy / count, plain)
    for ours, exact in zip(torch.autograd.grad(sums.objective / count, (hidden, weight)), expected):
        assert torch.allclose(ours, exact)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.isclose(loss(logits, labels), right)
    (of_plain,) = torch.autograd.grad(F.cross_entropy((hidden @ weight.t())[keep], labels[keep]), hidden)
    assert (of_plain - expected[0]).norm() > 3e-3 * of_plain.norm()  # a control: the terms matter


PAIRS = torch.tensor([[-10.0, -12.0], [-30.0, -20.0], [-5.0, -5.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-11.0, -11.0], [-25.0, -24.0], [-5.0, -5.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[5.0, 4.0], [10.0, 2.0], [1.0, 7.0]], dtype=torch.float64)


def by_hand(kind: str, pair: int, params: dict[str, float]) -> float:
    """The formulas of the papers, in Python's numbers."""
    (c, r), (rc, rr), (lc, lr) = (t[pair].tolist() for t in (PAIRS, REFERENCE, LENGTHS))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    if kind == "simpo":
        h = params["beta"] * (c / lc - r / lr) - params["gamma"]
        return -log_sigmoid(h)
    if params.get("length_normalized"):
        c, rc, r, rr = c / lc, rc / lc, r / lr, rr / lr
    if kind == "ipo":
        return ((c - rc) - (r - rr) - 1 / (2 * params["beta"])) ** 2
    h, s = params["beta"] * ((c - rc) - (r - rr)), params.get("label_smoothing", 0)
    return -(1 - s) * log_sigmoid(h) - s * log_sigmoid(-h)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("dpo", {"beta": 0.1}),
        ("dpo", {"beta": 0.5, "label_smoothing": 0.2}),
        ("dpo", {"beta": 0.5, "length_normalized": True}),
        ("dpo", {"beta": 0.1, "sft_weight": 0.7}),
        ("ipo", {"beta": 0.3, "length_normalized": True}),
        ("ipo", {"beta": 0.3, "length_normalized": False}),
        ("simpo", {"beta": 2.0, "gamma": 0.5}),
    ],
)
def test_losses_of_pairs(kind: str, params: dict[str, float]) -> None:
    loss, log_probs = made(kind, **params), PAIRS.clone().requires_grad_()
    found = loss(log_probs, LENGTHS, None if kind == "simpo" else REFERENCE)
    sft = params.get("sft_weight", 0)
    for i in range(3):
        right = by_hand(kind, i, params)
        assert math.isclose(float(found.preference[i]), right, rel_tol=1e-12)
        expected = right - sft * float(PAIRS[i, 0] / LENGTHS[i, 0])
        assert math.isclose(float(found.objective[i].detach()), expected, rel_tol=1e-12)
    assert torch.autograd.gradcheck(
        lambda t: loss(t, LENGTHS, None if kind == "simpo" else REFERENCE).objective, (log_probs,)
    )
    found.objective[1].backward()  # the pair that is ranked the wrong way
    assert log_probs.grad is not None and log_probs.grad[1, 0] < 0 < log_probs.grad[1, 1]


def test_rewards() -> None:
    found = made("dpo", beta=0.5)(PAIRS, LENGTHS, REFERENCE)
    assert found.chosen.tolist() == [0.5, -2.5, 0.0] and found.rejected.tolist() == [-0.5, 2.0, 0.0]
    assert math.isclose(float(found.objective[2]), math.log(2))  # where nothing is told apart
    with pytest.raises(ValueError, match="compares with a reference"):
        made("dpo")(PAIRS, LENGTHS)
    with pytest.raises(ValueError, match="compares without a reference"):
        made("simpo")(PAIRS, LENGTHS, REFERENCE)


def test_every_name_makes_its_kind() -> None:
    assert isinstance(made("focal"), Loss) and isinstance(made("ipo"), PreferenceLoss)
    loss = made("distillation", temperature=2.0, kl_weight=0.5, ce_weight=0.5)
    assert isinstance(loss, DistillationLoss)
    student = Head(torch.randn(5, 3), torch.randn(11, 3))
    labels = torch.tensor([1, 2, -100, 3, 4])
    sums = loss.sums(student, student, labels)
    right = F.cross_entropy(student.hidden @ student.weight.t(), labels, reduction="sum")
    assert torch.isclose(sums.objective, 0.5 * right) and torch.isclose(sums.cross_entropy, right)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("dpo", {"beta": 0}, "'dpo': beta 0 is not above 0"),
        ("dpo", {"label_smoothing": 0.5}, "from 0 to below 0.5"),
        ("dpo", {"gamma": 1}, "gamma"),
        ("distillation", {"temperature": -1}, "temperature -1 is not above 0"),
        ("focal", {"gamma": -1}, "gamma -1 is below 0"),
    ],
)
def test_values_that_make_no_sense(kind: str, params: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(kind, **params)
