"""NF4: nearest levels, both ways of unpacking to the bit, and a weight that behaves like the one it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moai_llm.ops import nf4
from moai_llm.ops.dispatch import use
from moai_llm.ops.moe import Experts, experts_forward, experts_reference
from moai_llm.ops.nf4_weight import NF4Weight, stored_bytes

SHAPES = [(1,), (63,), (64,), (65, 3), (7, 11, 13), (4, 64, 128), (300, 200)]


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_becomes_the_nearest_level_of_its_block(shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    found = nf4.unpack(nf4.pack(w, double=False), w.shape).flatten()
    for start in range(0, w.numel(), 64):
        block = w.flatten()[start : start + 64].double()
        levels = block.abs().max() * torch.tensor(nf4.LEVELS, dtype=torch.float64)
        nearest = (block[:, None] - levels).abs().amin(1)
        assert ((block - found[start : start + 64].double()).abs() - nearest).abs().max() < 1e-6


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Appendix E: 8 steps of probability up and 7 down, between a half and an offset, over the largest."""
    levels, offset = torch.tensor(nf4.LEVELS, dtype=torch.float64), 0.5 * (1 / 32 + 1 / 30)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    up = normal.icdf(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([up, down, torch.zeros(1)]).sort().values / up.max()
    assert (levels - expected).abs().max() < 2e-3  # the published ones were made with other steps at the ends


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_unpacks_to_the_same_bits(shape: tuple[int, ...], dtype: torch.dtype, double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    packed = nf4.pack(weight(*shape), double=double)
    found = []
    for name in ("reference", "bitsandbytes"):
        with use(nf4=name):
            found.append(nf4.unpack(packed, shape, dtype))
    assert found[0].shape == shape and found[0].dtype == dtype and torch.equal(*found)


def test_bitsandbytes_packs_to_the_same_bytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(48, 100)
    codes, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    packed = nf4.pack(w, double=False)
    assert torch.equal(codes.flatten(), packed.codes) and torch.equal(state.absmax, packed.scales)


def test_double_quantisation_costs_little_and_saves_what_it_says() -> None:
    w = weight(512, 512)
    single, double = (NF4Weight.of(w, double=double) for double in (False, True))
    assert stored_bytes(single) * 8 / w.numel() == 4.5
    assert stored_bytes(double) * 8 / w.numel() == pytest.approx(4.127, abs=1e-3)  # section 3
    errors = [float((each.unpacked() - w).norm() / w.norm()) for each in (single, double)]
    assert errors[0] < errors[1] < errors[0] * 1.01 and 0.07 < errors[0] < 0.1
    assert torch.equal(NF4Weight.of(torch.zeros(100)).unpacked(), torch.zeros(100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "bias"), [*itertools.product([1, 3, 65], [False, True])])
def test_linear_with_gradients(rows: int, bias: bool, dtype: torch.dtype) -> None:
    frozen = NF4Weight.of(weight(37, 70)).to(dtype)
    assert isinstance(frozen, NF4Weight) and frozen.dtype == dtype
    of_bias = weight(37, seed=1).to(dtype).requires_grad_() if bias else None
    x = weight(2, rows, 70, seed=2).to(dtype).requires_grad_()
    found = []
    for w in (frozen, frozen.unpacked()):
        y = F.linear(x, w, of_bias)
        wanted = [x] + ([of_bias] if of_bias is not None else [])
        found.append([y, *torch.autograd.grad(y, wanted, torch.ones_like(y))])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_nothing_unpacked_waits_for_the_backward() -> None:
    saved: list[Tensor] = []
    x, w = weight(3, 128).requires_grad_(), weight(64, 128)
    experts = (NF4Weight.of(weight(4, 64, 128)), NF4Weight.of(weight(4, 128, 64)))
    ids, shares = torch.tensor([[0], [3], [1]]), torch.ones(3, 1)

    def run(linear: Tensor, stacked: tuple[Tensor, Tensor]) -> list[Tensor]:
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            F.linear(x, linear)
            experts_forward(x, ids, shares, Experts(*stacked, gated=False), torch.relu)
        return [t for t in saved if not isinstance(t, NF4Weight) and t.numel() >= w.numel()]

    assert not run(NF4Weight.of(w), experts)
    plain = tuple(each.unpacked().requires_grad_() for each in experts)
    assert run(w, plain)  # type: ignore[arg-type]  # control: an ordinary weight is kept


@pytest.mark.parametrize("width", [64, 40])  # blocks that end with an expert, and that do not
@pytest.mark.parametrize("name", ["grouped", "loop"])
def test_experts_in_4_bits(width: int, name: str) -> None:
    x = weight(9, 48, seed=3).requires_grad_()
    ids, shares = torch.randint(0, 4, (9, 2), generator=torch.Generator().manual_seed(0)), weight(9, 2, seed=4).abs()
    frozen = [NF4Weight.of(weight(4, 2 * width, 48)), NF4Weight.of(weight(4, 48, width, seed=1))]
    with use(experts=name):
        y = experts_forward(x, ids, shares, Experts(*frozen), F.silu)
    plain = experts_reference(x, ids, shares, Experts(*(each.unpacked() for each in frozen)), F.silu)
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in (y, plain)), atol=1e-3, rtol=1e-4)
    with torch.no_grad():  # as in decoding, expert by expert
        one = experts_forward(x[:1], ids[:1], shares[:1], Experts(*frozen), F.silu)
    torch.testing.assert_close(one, plain[:1], atol=1e-4, rtol=1e-4)


def test_nothing_writes_to_it() -> None:
    frozen = torch.nn.Parameter(NF4Weight.of(weight(8, 64)), requires_grad=False)
    for write in (lambda: frozen.add_(1), lambda: frozen.copy_(torch.zeros(8, 64)), lambda: frozen.zero_()):
        with pytest.raises(TypeError, match="stays as it is"):
            write()
    assert torch.equal(frozen.detach() + 0, frozen.unpacked()) and "NF4Weight((8, 64)" in repr(frozen)
