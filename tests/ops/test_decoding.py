"""What decoding runs instead of the general ops: a linear layer of a few rows, RMSNorm, the step of a Mamba mixer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from moai_llm.ops import native
from moai_llm.ops.dispatch import Unavailable, use
from moai_llm.ops.linear import FEW_ROWS, linear
from moai_llm.ops.mamba_step import StepWeights, mamba_step, mamba_step_reference
from moai_llm.ops.norm import rms_norm
from moai_llm.ops.selective_scan import selective_scan, selective_scan_step

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def compiler():  # type: ignore[no-untyped-def]
    try:
        native._compiler()
    except Unavailable as error:
        pytest.skip(str(error))


def close(got: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> bool:
    return float((got.double() - truth.double()).norm() / truth.double().norm()) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("shape", "out"), [((1, 1), 1), ((1, 1, 65), 7), ((2, 130), 1001), ((1, 1, 2049), 1030), ((48,), 5)]
)
def test_linear(dtype: torch.dtype, threads: int, shape: tuple[int, ...], out: int) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(shape).to(dtype), torch.randn(out, shape[-1]).to(dtype), torch.randn(out).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), use(linear="native"):
            for bias in (None, b):
                got = linear(x, w, bias)
                assert got.shape == (*shape[:-1], out) and got.dtype is dtype
                assert close(got, F.linear(x.double(), w.double(), None if bias is None else bias.double()), dtype)
            assert close(linear(x, w.t().contiguous().t()), F.linear(x.double(), w.double()), dtype)
    finally:
        torch.set_num_threads(before)


@contextmanager
def recorded_teams(source: str) -> Iterator[list[int]]:
    """The number of threads of every team that a library asks for. One thread does the work of them all."""
    asked: list[int] = []
    work_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    def team(work: int, data: int, threads: int, flags: int) -> None:
        asked.append(threads)
        work_type(work)(data)

    library = native.load(source)
    library.moai_use_team(team)
    try:
        yield asked
    finally:
        library.moai_use_team(native._openmp_parallel())


def small_and_large_linear() -> None:
    for out in (200, 520, 900, 1500, 4000):  # around 1, 2, 4, 6 and 16 MB to read: as many as 1 to 8 times the least
        w = torch.full((out, 1024), 2**-10)
        assert torch.equal(linear(torch.ones(1, 1024), w), torch.ones(1, out))


def small_and_large_steps() -> None:
    for d, rank in ((64, 4), (1800, 40), (1800, 600)):
        (x, window, state), weights = step_inputs(torch.float32, 2, 500, d, 16, rank)
        mamba_step(x, window, state, weights)


def small_and_large_scans() -> None:
    for b, l, d in ((1, 3, 40), (1, 3, 4000), (3, 200, 130), (5, 1, 3000)):
        g = torch.Generator().manual_seed(0)
        x, delta, B, C = (torch.rand(b, l, size, generator=g) for size in (d, d, 16, 16))
        A = -torch.rand(d, 16, generator=g)
        with torch.enable_grad():
            selective_scan(x.clone().requires_grad_(), delta, A, B, C).sum().backward()
        selective_scan_step(torch.zeros(b, d, 16), x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0])


@pytest.mark.parametrize(
    ("source", "run"),
    [
        ("linear.cpp", small_and_large_linear),
        ("mamba_step.cpp", small_and_large_steps),
        ("selective_scan.cpp", small_and_large_scans),
    ],
)
def test_a_kernel_takes_all_threads_or_one(
    source: str, run: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A team of another size than that of torch makes the OpenMP runtime end threads, and start them at the next."""
    names = ("linear", "mamba_step", "selective_scan", "selective_scan_step")
    with torch.no_grad(), use(**dict.fromkeys(names, "native")), recorded_teams(source) as asked:
        run()
        assert not asked  # the suite has one thread
        monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
        run()
    assert set(asked) == {16}


def test_linear_leaves_the_rest_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, many rows, mixed dtypes, autocast and foreign tensor types never reach the kernel."""
    import moai_llm.ops.linear as module

    monkeypatch.setattr(module, "_linear", lambda *_: pytest.fail("the kernel was called"))
    x, w = torch.randn(1, 8), torch.randn(3, 8, requires_grad=True)
    linear(x, w).sum().backward()
    assert w.grad is not None
    with torch.no_grad():
        linear(torch.randn(FEW_ROWS + 1, 8), w)
        linear(x.double(), w.double())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, w).dtype is torch.bfloat16
        with pytest.raises(pytest.fail.Exception):
            linear(x, w)  # the control: this one does


def test_wrong_shapes_are_refused_before_any_address_is_taken() -> None:
    with torch.no_grad(), use(linear="native"):
        with pytest.raises(ValueError, match="do not fit"):
            linear(torch.randn(1, 8), torch.randn(3, 9))
        with pytest.raises(TypeError, match="float32"):
            linear(torch.randn(1, 8), torch.randn(3, 8), torch.randn(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["torch", "native"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 17), (2, 3, 64), (1, 1, 2, 13)])
def test_rms_norm_of_a_few_rows(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    wide = x.double()
    truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    with torch.no_grad(), use(rms_norm_step=name):
        got = rms_norm(x, weight, 1e-5)
        assert got.dtype is dtype and close(got, truth, dtype)
        assert close(rms_norm(x.transpose(0, 1), weight, 1e-5), truth.transpose(0, 1), dtype)


@pytest.mark.parametrize("shape", [(3, 17), (2, 5, 64), (2, 3, 4, 13)])
@pytest.mark.parametrize("name", ["torch", "saved"])
def test_rms_norm_gradients(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape) - 1, -1, -1))  # not contiguous
    results = []
    for implementation in (name, "reference"):
        with use(rms_norm=implementation):
            y = rms_norm(x, weight, 1e-5)
        results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
    for got, truth in zip(*results):
        assert (got - truth).abs().max() < 1e-12


def test_rms_norm_feeds_autocast() -> None:
    x, weight = torch.randn(4, 16, requires_grad=True), torch.ones(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = rms_norm(x, weight, 1e-6)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32


def step_inputs(
    dtype: torch.dtype, b: int = 2, width: int = 70, d: int = 300, n: int = 16, rank: int = 7, kernel: int = 4,
    norms: bool = True,
) -> tuple[list[torch.Tensor], StepWeights]:  # fmt: skip
    torch.manual_seed(0)
    shapes = ((d, width), (d, width), (d, kernel), (d,), (rank + 2 * n, d), (d, rank))
    matrices = [torch.randn(shape).to(dtype) * 0.3 for shape in shapes]
    out = torch.randn(width, d).to(dtype)
    scales = [torch.rand(size).to(dtype) + 0.5 for size in (rank, n, n)] if norms else []
    a_log = torch.log(torch.arange(1.0, n + 1)).repeat(d, 1)
    weights = StepWeights(1e-6, *matrices, torch.randn(d) - 3, a_log, torch.randn(d), out, *scales)
    return [torch.randn(b, width).to(dtype), torch.randn(b, d, kernel).to(dtype), torch.randn(b, d, n)], weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("width", "d", "n", "rank", "kernel"),
    [(70, 300, 16, 7, 4), (3, 1, 1, 1, 2), (21, 37, 5, 3, 3), (65, 513, 24, 48, 4)],
)
def test_mamba_step(dtype: torch.dtype, norms: bool, width: int, d: int, n: int, rank: int, kernel: int) -> None:
    (x, window, state), weights = step_inputs(dtype, 2, width, d, n, rank, kernel, norms)
    mine, truth = [window.clone(), state.clone()], [window.clone(), state.clone()]
    with torch.no_grad(), use(mamba_step="native"):
        got = [mamba_step(x, *mine, weights), *mine]
    with torch.no_grad():
        expected = [mamba_step_reference(x, *truth, weights), *truth]
    for a, b in zip(got, expected):
        # the reference rounds between its pieces, the kernel does not
        assert float((a.double() - b.double()).norm() / b.double().norm()) < (1e-5 if dtype is torch.float32 else 5e-2)
    assert torch.equal(mine[0][..., :-1], window[..., 1:]) and not torch.equal(mine[1], state)


def test_mamba_step_updates_states_that_are_not_contiguous() -> None:
    (x, window, state), weights = step_inputs(torch.float32)
    strided = window.transpose(1, 2).contiguous().transpose(1, 2), state.transpose(1, 2).contiguous().transpose(1, 2)
    with torch.no_grad(), use(mamba_step="native"):
        first = mamba_step(x, *strided, weights)
        second = mamba_step(x, window, state, weights)
    assert torch.equal(first, second) and torch.equal(strided[0], window) and torch.equal(strided[1], state)


def test_control_the_state_matters() -> None:
    (x, window, state), weights = step_inputs(torch.float32)
    with torch.no_grad(), use(mamba_step="native"):
        first = mamba_step(x, window, state, weights)
        assert not torch.allclose(first, mamba_step(x, window, state, weights))


def test_mamba_step_refuses_what_does_not_fit() -> None:
    (x, window, state), weights = step_inputs(torch.float32)
    with torch.no_grad(), use(mamba_step="native"):
        with pytest.raises(TypeError, match=r"needs torch.float32 \(2, 300, 4\)"):
            mamba_step(x, window[:, :5], state, weights)
