"""Routing by hand-worked values; experts against the dense definition, outputs and gradients; noise that is a pure
function.
"""

from __future__ import annotations

import math

import pytest
import torch

from moai_llm.modeling.moe import router_sums
from moai_llm.ops.dispatch import use
from moai_llm.ops.moe import Experts, counter_normal, experts_forward, experts_per_slot, switch_loss, top_k

SILU = torch.nn.functional.silu


def problem(tokens: int, experts: int, k: int, gated: bool, bias: bool, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    d, f = 16, 24
    up = f * (2 if gated else 1)
    shapes = [(tokens, d), (experts, up, d), (experts, d, f), *([(experts, up), (experts, d)] if bias else [])]
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    logits = torch.randn(tokens, experts, requires_grad=True)
    return leaves, logits, Experts(*leaves[1:3], *(leaves[3:] or (None, None)), gated=gated)


def run(name: str, leaves, logits, experts: Experts, k: int):  # type: ignore[no-untyped-def]
    weights, ids, _ = top_k(logits, k, normalise=k > 1)  # one normalised weight is always 1 and has no gradient
    with use(experts=name):
        y = experts_forward(leaves[0], ids, weights, experts, SILU)
    target = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return [y, *torch.autograd.grad((y.double() * target).sum(), [*leaves, logits])]


@pytest.mark.parametrize("name", ["loop", "grouped"])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(13, 5, 2), (1, 3, 3), (40, 8, 1), (7, 16, 4)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients(name: str, tokens: int, experts: int, k: int, gated: bool, bias: bool) -> None:
    truth = run("reference", *problem(tokens, experts, k, gated, bias, torch.float64), k)
    for ours, expected in zip(run(name, *problem(tokens, experts, k, gated, bias, torch.float32), k), truth):
        assert (ours - expected).norm() <= 2e-6 * expected.norm().clamp_min(1e-3)


def test_all_tokens_to_one_expert_and_none_to_the_others() -> None:
    leaves, _, experts = problem(9, 4, 1, True, False, torch.float32)
    ids, weights = torch.full((9, 1), 2), torch.ones(9, 1)
    with use(experts="reference"):
        expected = experts_forward(leaves[0], ids, weights, experts, SILU)
    for name in ("loop", "grouped"):
        with use(experts=name):
            assert (experts_forward(leaves[0], ids, weights, experts, SILU) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_decoding_path() -> None:
    leaves, logits, experts = problem(2, 5, 2, True, True, torch.float64)
    weights, ids, _ = top_k(logits, 2, True)
    with use(experts="reference"):
        expected = experts_forward(leaves[0].float(), ids, weights, Experts(*(t.float() for t in experts[:4])), SILU)
    assert (experts_per_slot(leaves[0], ids, weights, experts, SILU) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_trace_without_a_graph_break(dtype: torch.dtype) -> None:
    leaves, logits, experts = problem(13, 5, 2, True, False, dtype)
    weights, ids, _ = top_k(logits.detach(), 2, True)
    torch._dynamo.reset()
    compiled = torch.compile(experts_forward, fullgraph=True, backend="aot_eager")
    y = compiled(leaves[0], ids, weights, experts, SILU)
    assert (y - experts_forward(leaves[0], ids, weights, experts, SILU)).abs().max() < 1e-2
    y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


def test_routing() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, ids, probabilities = top_k(logits, 2, True)
    assert ids.tolist() == [[0, 1]] and torch.isclose(weights.sum(), torch.tensor(1.0))
    raw, _, _ = top_k(logits, 2, False)
    assert torch.allclose(raw, probabilities[:, :2])
    _, noisy, _ = top_k(logits, 2, True, torch.tensor([[0.0, 0.0, 9.0, 0.0]]))
    assert noisy[0, 0] == 2


def test_switch_loss_by_hand() -> None:
    uniform = torch.full((8,), 1 / 8)
    assert switch_loss(uniform, uniform) == 1  # so the added term is exactly the coefficient
    assert switch_loss(torch.tensor([0.5, 0.5, 0, 0]), torch.tensor([1.0, 0, 0, 0])) == 2  # top-2 on {0, 1}, gate on 0
    assert switch_loss(torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, 0, 0, 0])) == 4  # top-1 collapse
    p = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.5, 0.3, 0.1]])
    sums = router_sums(p.topk(2).indices, p, p.log(), None)
    assert sums.selected.tolist() == [1, 2, 1, 0]
    assert math.isclose(float(switch_loss(sums.selected / 4, sums.probability / 2)), 1.3, rel_tol=1e-6)


def test_z_sums_by_hand_and_masked_tokens_do_not_count() -> None:
    logits = torch.stack([torch.zeros(8), torch.full((8,), 2.0)])
    p, ids = logits.softmax(-1), torch.tensor([[0, 1], [2, 3]])
    sums = router_sums(ids, p, logits, None)
    assert math.isclose(float(sums.z), math.log(8) ** 2 + (2 + math.log(8)) ** 2, rel_tol=1e-6)
    masked = router_sums(ids, p, logits, torch.tensor([[True, False]]))
    assert math.isclose(float(masked.z), math.log(8) ** 2, rel_tol=1e-6)
    assert masked.selected.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]


def test_counter_noise_is_normal_and_a_pure_function() -> None:
    a = counter_normal(torch.tensor(123), (2000, 64))
    assert torch.equal(a, counter_normal(torch.tensor(123), (2000, 64)))
    assert abs(float(a.mean())) < 0.01 and abs(float(a.std()) - 1) < 0.01
    assert abs(float((a**4).mean()) - 3) < 0.1
    b = counter_normal(torch.tensor(124), (2000, 64))
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.02
    assert torch.equal(a[:10], counter_normal(torch.tensor(123), (10, 64)))
