"""The selective scan: every implementation against float64, and the laws that packing and decoding rest on."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moai_llm.ops import dispatch, native
from moai_llm.ops import selective_scan as ops
from moai_llm.ops.selective_scan import selective_scan, selective_scan_step

NAMES = ["y", "final state", "x", "delta", "A", "B", "C", "D", "initial state"]
SIZES = [(2, 37, 19, 5), (1, 1, 3, 1), (1, 2, 1, 4), (3, 33, 40, 8), (2, 64, 16, 16), (1, 70, 35, 21), (2, 15, 7, 32)]


def force(name: str, op: str = "selective_scan") -> dispatch.Op:
    """Skip where this implementation cannot run, with its reason."""
    chosen = dispatch.OPS[op]
    try:
        with dispatch.use(**{op: name}):
            chosen.pick("cpu")
    except RuntimeError as error:
        pytest.skip(str(error))
    return chosen


@pytest.fixture(params=["reference", "torch", "native"])
def scan(request):
    force(request.param)
    with dispatch.use(selective_scan=request.param):
        yield selective_scan


@pytest.fixture(params=["reference", "native"])
def step(request):
    force(request.param, "selective_scan_step")
    with dispatch.use(selective_scan_step=request.param):
        yield selective_scan_step


def problem(b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Inputs, a state, gradients of y and of the final state, and documents in every row that is long enough."""
    g = torch.Generator().manual_seed(seed)
    half = dtype if dtype.is_floating_point and dtype.itemsize == 2 else torch.float64
    wide = torch.float32 if half != torch.float64 else dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    seq_idx = torch.stack([torch.arange(l) // max(2, l // (3 + row)) for row in range(b)])
    return {
        "x": normal(b, l, d).to(dtype),
        "delta": torch.nn.functional.softplus(normal(b, l, d) - 1).to(wide),
        "A": -torch.arange(1, n + 1).repeat(d, 1).mul(1 + 0.1 * normal(d, n).abs()).to(wide),
        "B": normal(b, l, n).to(dtype),
        "C": normal(b, l, n).to(dtype),
        "D": normal(d).to(wide),
        "state": normal(b, d, n).to(wide),
        "gy": normal(b, l, d).to(dtype),
        "gh": normal(b, d, n).to(wide),
        "seq_idx": seq_idx,
    }


def run(scan, p: dict[str, Tensor], documents: bool = True, state: bool = True) -> list[Tensor]:
    """Output, final state and the seven gradients."""
    inputs = [p[name].clone().requires_grad_() for name in ("x", "delta", "A", "B", "C", "D", "state")]
    y, h = scan(
        *inputs[:6],
        seq_idx=p["seq_idx"] if documents else None,
        initial_state=inputs[6] if state else None,
        return_final_state=True,
    )
    grads = torch.autograd.grad([y, h], inputs if state else inputs[:6], [p["gy"].to(y.dtype), p["gh"].to(h.dtype)])
    return [y.detach(), h.detach(), *grads]


def expected(p: dict[str, Tensor], **kwargs: bool) -> list[Tensor]:
    with dispatch.use(selective_scan="reference"):
        wide = {name: t if name == "seq_idx" else t.double() for name, t in p.items()}
        return run(selective_scan, wide, **kwargs)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    errors = {name: error(g, w) for name, g, w in zip(NAMES, got, want)}
    print(errors)
    assert all(g.isfinite().all() for g in got)
    return max(errors.values())


# ---------------------------------------------------------------- every implementation against float64


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
def test_float32(scan, size, documents, state):
    p = problem(*size)
    assert worst(run(scan, p, documents, state), expected(p, documents=documents, state=state)) <= 2e-6


@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_bfloat16(scan, size):
    p = problem(*size, dtype=torch.bfloat16)
    got = run(scan, p)
    assert [t.dtype for t in got[:2]] == [torch.bfloat16, torch.float32]
    assert worst(got, expected(p)) <= 1e-2


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_torch(size):
    p = problem(*size, dtype=torch.float64)
    with dispatch.use(selective_scan="torch"):
        assert worst(run(selective_scan, p), expected(p)) <= 1e-12


def test_the_comparison_sees_ignored_documents(scan):
    p = problem(*SIZES[0])
    assert worst(run(scan, p, documents=False), expected(p, documents=True)) > 1e-2


def test_more_rows_and_channels_than_are_walked_together(scan):
    """The native kernel shares them out to threads, the torch one walks groups of rows."""
    p = problem(5, 20, 600, 16)
    assert 5 * 20 * 600 * 16 > 2**17 and ops.CACHED < 5 * 600 * 16
    assert worst(run(scan, p), expected(p)) <= 2e-6


@pytest.mark.parametrize("delta, A", [(1.0, -2000.0), (1e-3, -2e6), (1e30, -1e30), (0.0, -1.0)])
def test_extreme_decay(scan, delta, A):
    p = problem(2, 40, 17, 5)
    p["delta"][:, ::3], p["A"][:, ::2] = delta, A
    assert worst(run(scan, p), expected(p)) <= 2e-6


def test_long_memory(scan):
    """Decays a hair below 1, over many chunks: an error of every step would add up."""
    p = problem(1, 700, 17, 16)
    p["A"] *= 1e-4
    assert worst(run(scan, p, documents=False), expected(p, documents=False)) <= 5e-6


def test_inputs_of_any_strides(scan):
    p = problem(2, 37, 19, 5)
    want = run(scan, p)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in p.items()}
    assert not strided["x"].is_contiguous()
    assert worst(run(scan, strided), [t.double() for t in want]) <= 1e-6


def test_no_skip_is_a_skip_of_zero(scan, step):
    p = problem(2, 9, 19, 5)
    args = [p[k] for k in ("x", "delta", "A", "B", "C")]
    assert torch.equal(scan(*args), scan(*args, torch.zeros(19)))
    args = [p["x"][:, 0], p["delta"][:, 0], p["A"], p["B"][:, 0], p["C"][:, 0]]
    assert torch.equal(step(p["state"].clone(), *args), step(p["state"].clone(), *args, torch.zeros(19)))


def test_autocast_changes_nothing(scan):
    p = problem(2, 20, 19, 5)
    want = run(scan, p)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(g, w) for g, w in zip(run(scan, p), want))
        assert (p["gy"][0] @ p["gy"][0].T).dtype == torch.bfloat16  # it was on


# ---------------------------------------------------------------- laws


def test_a_document_does_not_see_the_one_before(scan):
    p = problem(2, 50, 19, 5)
    p["seq_idx"] = (torch.arange(50) >= 21).long().expand(2, -1)

    def second(seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
        x = p["x"].clone().requires_grad_()
        y = scan(x, p["delta"], p["A"], p["B"], p["C"], p["D"], seq_idx=seq_idx, initial_state=p["state"])
        return y[:, 21:].detach(), torch.autograd.grad(y[:, 21:].sum(), x)[0][:, :21]

    alone = scan(
        *(p[name][:, 21:] for name in ("x", "delta")), p["A"], *(p[name][:, 21:] for name in ("B", "C")), p["D"]
    )
    y, leak = second(p["seq_idx"])
    torch.testing.assert_close(y, alone)
    assert leak.eq(0).all()
    y, leak = second(None)  # the control: without borders both are seen
    assert error(y, alone.double()) > 1e-2 and leak.abs().max() > 1e-3


def test_two_halves_are_the_whole(scan):
    p = problem(2, 45, 19, 5)
    inputs = [p[name] for name in ("x", "delta", "B", "C")]

    def part(a: int, b: int, state: Tensor | None) -> tuple[Tensor, Tensor]:
        x, delta, B, C = (t[:, a:b] for t in inputs)
        return scan(x, delta, p["A"], B, C, p["D"], initial_state=state, return_final_state=True)

    y, h = part(0, 45, p["state"])
    y1, h1 = part(0, 18, p["state"])
    y2, h2 = part(18, 45, h1)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y)
    torch.testing.assert_close(h2, h)
    assert error(part(18, 45, None)[0], y2.double()) > 1e-2  # the control: the state is needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 5, 8, 16, 21, 32, 64])
def test_steps_are_the_scan(step, dtype, n):
    p = problem(2, 12, 35, n, dtype)
    with dispatch.use(selective_scan="reference"):
        y, h = selective_scan(
            *(p[k] for k in ("x", "delta", "A", "B", "C", "D")), initial_state=p["state"], return_final_state=True
        )
    state = p["state"].clone()
    steps = [step(state, p["x"][:, t], p["delta"][:, t], p["A"], p["B"][:, t], p["C"][:, t], p["D"]) for t in range(12)]
    assert steps[0].dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert error(torch.stack(steps, 1), y.double()) <= tolerance
    assert error(state, h.double()) <= 2e-6
    assert error(p["state"], h.double()) > 1e-2  # the control: it was updated in place


def test_a_large_step(step):
    """Above the size where the native step takes threads, and with a state that is not contiguous."""
    p = problem(3, 1, 3000, 16)
    with dispatch.use(selective_scan="reference"):
        y, h = selective_scan(
            *(p[k] for k in ("x", "delta", "A", "B", "C", "D")), initial_state=p["state"], return_final_state=True
        )
    state = torch.empty(3, 16, 3000).transpose(1, 2).copy_(p["state"])
    got = step(state, *(p[k][:, 0] for k in ("x", "delta")), p["A"], *(p[k][:, 0] for k in ("B", "C")), p["D"])
    assert not state.is_contiguous()
    assert error(got, y[:, 0].double()) <= 2e-6 and error(state, h.double()) <= 2e-6


def test_a_step_has_gradients(step):
    p = problem(2, 1, 19, 5)
    x = p["x"][:, 0].clone().requires_grad_()
    y = step(p["state"].clone(), x, p["delta"][:, 0], p["A"], p["B"][:, 0], p["C"][:, 0], p["D"])
    assert torch.autograd.grad(y.sum(), x)[0].abs().min() > 0


def test_shapes_that_do_not_agree(scan):
    p = problem(2, 9, 19, 5)
    with pytest.raises(ValueError, match=r"B must be \(2, 9, 5\)"):
        scan(p["x"], p["delta"], p["A"], p["B"][:, :8], p["C"], p["D"])


# ---------------------------------------------------------------- memory and threads


def test_no_result_depends_on_uninitialised_memory(scan):
    p = problem(2, 37, 19, 5)
    want = run(scan, p)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()  # what it does to every new tensor
        got = run(scan, p)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_native_is_deterministic_and_leaves_the_threads_alone():
    force("native")
    p = problem(2, 70, 100, 16)
    threads = torch.get_num_threads()
    results = {}
    with dispatch.use(selective_scan="native"):
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results[count] = run(selective_scan, p)
                for _ in range(3):
                    assert all(torch.equal(a, b) for a, b in zip(run(selective_scan, p), results[count]))
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
    assert worst(results[2], [t.double() for t in results[1]]) <= 1e-6
    assert not all(torch.equal(a, b) for a, b in zip(results[1], results[3]))  # the control: the sums were shared out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_native_runs_on_the_threads_of_torch():
    """The team of a kernel comes from the runtime beside torch, also where another library has its own."""
    force("native")
    with dispatch.use(selective_scan="native"):
        run(selective_scan, problem(2, 70, 100, 16))
    address = native._openmp_parallel()
    with open("/proc/self/maps", encoding="utf-8") as file:
        spans = [(line.split()[0].split("-"), line.split()[-1]) for line in file]
    (runtime,) = {path for (start, stop), path in spans if int(start, 16) <= address < int(stop, 16)}
    assert "omp" in os.path.basename(runtime) and "torch" in os.path.dirname(runtime)


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["torch", "native"])
def test_compiles_whole(name):
    force(name)
    torch._dynamo.reset()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    with dispatch.use(selective_scan=name):
        for length in (37, 41):
            p = problem(2, length, 19, 5)
            assert all(torch.equal(g, w) for g, w in zip(run(compiled, p), run(selective_scan, p)))
            with torch.no_grad():
                args = [p[k] for k in ("x", "delta", "A", "B", "C", "D")]
                assert torch.equal(compiled(*args), selective_scan(*args))


def test_a_compiled_step(step):
    torch._dynamo.reset()
    p = problem(2, 1, 19, 5)
    args = [p["x"][:, 0], p["delta"][:, 0], p["A"], p["B"][:, 0], p["C"][:, 0], p["D"]]
    states = [p["state"].clone() for _ in range(2)]
    with torch.no_grad():
        y = torch.compile(step, fullgraph=True, backend="aot_eager")(states[0], *args)
        assert torch.equal(y, step(states[1], *args))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], p["state"])


@pytest.mark.parametrize("name", ["torch", "native"])
def test_custom_ops_keep_their_promises(name):
    force(name)
    torch._dynamo.reset()
    p = problem(2, 40, 6, 5)
    starts = ops.document_starts(p["seq_idx"])
    leaves = [p[k].requires_grad_() for k in ("x", "delta", "A", "B", "C", "D")]
    if name == "native":
        from moai_llm.ops import selective_scan_native as native

        forward, backward = native._forward_op, native._backward_op
        step_args = [p["x"][:, 0], p["state"], p["delta"][:, 0], p["A"], p["B"][:, 0], p["C"][:, 0], p["D"]]
        torch.library.opcheck(native._step_op, [t.detach().clone() for t in step_args])
    else:
        forward, backward = ops._chunked_forward, ops._chunked_backward
    torch.library.opcheck(forward, (*leaves, starts, p["state"].requires_grad_(), True))
    torch.library.opcheck(forward, (*[t.detach() for t in leaves], None, None, False))
    with torch.no_grad():
        kept = forward(*leaves, starts, p["state"], True)[2]
    torch.library.opcheck(backward, (p["gy"], None, *[t.detach() for t in leaves], starts, kept))


# ---------------------------------------------------------------- dispatch


def test_the_self_check_finds_a_wrong_kernel(monkeypatch):
    force("native")
    from moai_llm.ops import native
    from moai_llm.ops import selective_scan_native as module

    native.self_check(module._check)
    for function in ("_scan_forward", "_scan_backward", "_scan_step"):
        with monkeypatch.context() as patch:
            patch.setattr(module, function, lambda *_: 0)  # leaves the results as they were allocated
            with pytest.raises(dispatch.Unavailable, match="wrong"):
                native.self_check(module._check)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("target", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_are_right_too(monkeypatch, tmp_path, target):
    """A CPU without AVX-512 takes other paths through native.h."""
    force("native")
    from moai_llm.ops import native
    from moai_llm.ops import selective_scan_native as module

    with open("/proc/cpuinfo", encoding="utf-8") as file:
        if target == "x86-64-v3" and " avx2 " not in file.read():
            pytest.skip("this CPU has no AVX2")
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "TARGETS", [f"-march={target}"])
    monkeypatch.setattr(module, "_library", native._load(module.__file__.replace("_native.py", ".cpp")))
    for name, sizes, arrays in (("scan_forward", 4, 11), ("scan_backward", 4, 17), ("scan_step", 3, 8)):
        monkeypatch.setattr(module, f"_{name}", module._function(f"moai_{name}", sizes, arrays))
    native.self_check(module._check)
    with dispatch.use(selective_scan="native"):
        for size in SIZES[:5]:
            p = problem(*size)
            assert worst(run(selective_scan, p), expected(p)) <= 2e-6
        p["delta"][:, ::3], p["A"][:, ::2] = 1.0, -2000.0
        assert worst(run(selective_scan, p), expected(p)) <= 2e-6
        p = problem(*SIZES[0], dtype=torch.bfloat16)
        assert worst(run(selective_scan, p), expected(p)) <= 1e-2


def test_the_self_check_runs_wherever_the_first_call_is():
    force("native")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moai_llm.ops import native
    from moai_llm.ops import selective_scan_native as module

    before = torch.get_rng_state()
    for surrounding in (torch.inference_mode(), torch.device("meta"), FakeTensorMode(), torch.autocast("cpu")):
        with surrounding:
            native.self_check(module._check)
    assert torch.equal(torch.get_rng_state(), before)


def test_native_refuses_what_it_cannot_read():
    force("native")
    from moai_llm.ops import selective_scan_native as native

    p = problem(2, 9, 19, 5)
    args = [p[k] for k in ("x", "delta", "A", "B", "C", "D")]
    with pytest.raises(TypeError, match="torch.float64"):
        native.scan_native(*args[:2], p["A"].double(), *args[3:], None, None)
    with pytest.raises(ValueError, match="step"):
        native.step_native(p["x"][:, 0], p["state"][:1], p["delta"][:, 0], p["A"], p["B"][:, 0], p["C"][:, 0], p["D"])
    with dispatch.use(selective_scan="native"), pytest.raises(RuntimeError, match="does not take torch.float64"):
        selective_scan(*(t.double() for t in args))


def test_without_a_compiler_torch_takes_over(tmp_path):
    script = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import torch
from moai_llm.ops import dispatch, native
from moai_llm.ops.selective_scan import selective_scan
args = [torch.rand(1, 3, 4), torch.rand(1, 3, 4), -torch.rand(4, 2), torch.rand(1, 3, 2), torch.rand(1, 3, 2)]
y = selective_scan(*args)
print("picked", dispatch.OPS["selective_scan"].pick("cpu"), dispatch.OPS["selective_scan_step"].pick("cpu"))
with dispatch.use(selective_scan="native"):
    try:
        selective_scan(*args)
    except RuntimeError as error:
        print("raised", error)
"""
    environment = {**os.environ, "CXX": "/bin/false", "MOAI_CACHE": str(tmp_path)}
    environment.pop("MOAI_OPS", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "picked torch reference" in done.stdout
    assert "raised the forced implementation 'native'" in done.stdout
    assert "selective_scan on cpu runs 'torch' (native: /bin/false failed with code 1)" in done.stderr
