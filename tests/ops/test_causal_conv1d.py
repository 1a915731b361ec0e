"""The causal convolution against its loop: outputs and gradients, borders, a state from before."""

from __future__ import annotations

import pytest
import torch

from moai_llm.ops.causal_conv1d import causal_conv1d, conv_tail
from moai_llm.ops.dispatch import OPS, use

PACKED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 3], [4, 4, 4, 4, 4, 4, 4, 4, 9]])
FAST = [name for name in OPS["causal_conv1d"].implementations if name != "reference"]


def run(name: str, dtype: torch.dtype, kernel: int, packed: bool, state: bool, bias: bool, length: int = 9):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    shapes = {"x": (2, length, 5), "weight": (5, kernel), "bias": (5,), "state": (2, kernel - 1, 5)}
    tensors = {key: torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for key, shape in shapes.items()}
    wanted = [
        tensors["x"],
        tensors["weight"],
        *([tensors["bias"]] if bias else []),
        *([tensors["state"]] if state else []),
    ]
    with use(causal_conv1d=name):
        y = causal_conv1d(
            tensors["x"], tensors["weight"], tensors["bias"] if bias else None,
            seq_idx=PACKED[:, :length] if packed else None, state=tensors["state"] if state else None,
        )  # fmt: skip
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    return [y, *torch.autograd.grad((y.double() * weights).sum(), wanted)]


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kernel", [2, 4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients(name: str, kernel: int, packed: bool, state: bool, bias: bool) -> None:
    truth = run("reference", torch.float64, kernel, packed, state, bias)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        with use(causal_conv1d=name):
            if name == "native" and dtype == torch.float64:
                continue
        for ours, expected in zip(run(name, dtype, kernel, packed, state, bias), truth):
            assert (ours - expected).abs().max() < tolerance


@pytest.mark.parametrize("name", FAST)
def test_shorter_than_the_kernel(name: str) -> None:
    truth = run("reference", torch.float64, 4, False, True, True, length=2)
    for ours, expected in zip(run(name, torch.float32, 4, False, True, True, length=2), truth):
        assert (ours - expected).abs().max() < 1e-5


def test_control_borders_matter() -> None:
    for name in FAST:
        packed, leaking = (run(name, torch.float32, 4, p, False, True)[0] for p in (True, False))
        assert (packed - leaking).abs().max() > 1e-2


def test_going_on_from_the_tail_is_the_whole() -> None:
    x, weight = torch.randn(2, 12, 5), torch.randn(5, 4)
    whole = causal_conv1d(x, weight)
    rest = causal_conv1d(x[:, 7:], weight, state=conv_tail(x[:, :7], 3))
    assert (rest - whole[:, 7:]).abs().max() < 1e-6


def test_the_tail_holds_one_document_only() -> None:
    x = torch.randn(1, 6, 2)
    tail = conv_tail(x, 3, torch.tensor([[0, 0, 0, 0, 1, 1]]))
    assert torch.equal(tail[:, 1:], x[:, 4:]) and not tail[:, 0].any()
    assert conv_tail(x[:, :2], 3).shape == (1, 2, 2)
