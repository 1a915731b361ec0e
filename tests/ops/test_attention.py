"""Every attention implementation against the written-out one: outputs and gradients, odd sizes, windows, packing."""

from __future__ import annotations

import pytest
import torch

from moai_llm.ops.attention import attention, document_borders, visible
from moai_llm.ops.dispatch import use

PACKED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 3], [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 5]])


def inputs(length_q: int = 13, length_k: int = 13, heads: int = 6, keys: int = 2):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    shapes = [(2, heads, length_q, 7), (2, keys, length_k, 7), (2, keys, length_k, 7)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def run(name: str, tensors, **arguments):  # type: ignore[no-untyped-def]
    with use(attention=name):
        y = attention(*tensors, **arguments)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad((y * weights).sum(), tensors)]


@pytest.mark.parametrize("name", ["sdpa", "split"])
@pytest.mark.parametrize("keys", [1, 2, 6])
@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_outputs_and_gradients(name: str, keys: int, window: int | None, packed: bool) -> None:
    tensors = inputs(keys=keys)
    arguments = {"window": window, "seq_idx": PACKED if packed else None}
    for ours, truth in zip(run(name, tensors, **arguments), run("reference", tensors, **arguments)):
        assert (ours - truth).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["sdpa", "split"])
def test_control_borders_matter(name: str) -> None:
    tensors = inputs()
    assert (run(name, tensors, seq_idx=PACKED)[0] - run(name, tensors)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["reference", "sdpa", "split"])
@pytest.mark.parametrize("window", [None, 4])
def test_queries_are_the_last_positions(name: str, window: int | None) -> None:
    q, k, v = inputs()
    whole = run(name, [q, k, v], window=window)[0]
    last = run(name, [q[:, :, 8:].detach().requires_grad_(), k, v], window=window)[0]
    assert (last - whole[:, :, 8:]).abs().max() < 1e-12
    one = run(name, [q[:, :, 12:].detach().requires_grad_(), k, v], window=window)[0]
    assert (one - whole[:, :, 12:]).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["reference", "sdpa", "split"])
def test_an_explicit_mask_says_everything(name: str) -> None:
    tensors = inputs()
    mask = visible(13, 13, PACKED, 5, torch.device("cpu"))
    expected = run("reference", tensors, seq_idx=PACKED, window=5)[0]
    assert (run(name, tensors, mask=mask)[0] - expected).abs().max() < 1e-12
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert (run(name, tensors, mask=additive)[0] - expected).abs().max() < 1e-12


def test_scale() -> None:
    tensors = inputs()
    assert (run("split", tensors, scale=0.3)[0] - run("reference", tensors, scale=0.3)[0]).abs().max() < 1e-12
    assert (run("split", tensors, scale=0.3)[0] - run("split", tensors)[0]).abs().max() > 1e-3


def test_borders() -> None:
    assert document_borders(PACKED, 2, 13) == [[0, 3, 9, 10, 13], [0, 12, 13]]
    assert document_borders(None, 2, 4) == [[0, 4], [0, 4]]


def test_seq_idx_needs_whole_rows() -> None:
    q, k, v = inputs(length_q=5)
    with pytest.raises(ValueError, match="same length"):
        attention(q, k, v, seq_idx=PACKED[:, :5])
