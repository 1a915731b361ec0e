"""The `native` selective scan: selective_scan.cpp, built for this CPU, as torch ops for float32 and bfloat16.

Importing this module builds the library, or takes it from the cache, and compares it with the reference; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops import native
from moai_llm.ops.selective_scan import check_shapes, needs_backward, register_scan, scan_reference, step_reference

_library = native.load("selective_scan.cpp")


def _function(name: str, sizes: int, arrays: int) -> Any:
    """A function (sizes..., half precision, threads, arrays...) of the library."""
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * sizes + [ctypes.c_int] * 2 + [ctypes.c_void_p] * arrays
    function.errcheck = native.raise_if_failed
    return function


_scan_forward = _function("moai_scan_forward", 4, 11)
_scan_backward = _function("moai_scan_backward", 4, 17)
_scan_step = _function("moai_scan_step", 3, 8)
_CHUNK: int = _library.moai_scan_chunk()


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor | None,
    h0: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, final state (B, D, N), and with `save` the state before each chunk (chunks, B, N, D)."""
    check_shapes(x, delta, A, B, C, D, starts, h0)
    x, B, C = (native.ready(t, x.dtype) for t in (x, B, C))
    delta, A, D = (native.ready(t, torch.float32) for t in (delta, A, D))
    h0, starts = native.ready(h0, torch.float32), native.ready(starts, torch.bool)
    (b, l, d), n = x.shape, A.shape[1]
    y, h = torch.empty_like(x), delta.new_empty(b, d, n)
    kept = delta.new_empty(-(-l // _CHUNK) if save else 0, b, n, d)
    arrays = native.addresses(x, delta, A, B, C, D, starts, h0, y, h, kept if save else None)
    _scan_forward(b, l, d, n, x.dtype is torch.bfloat16, torch.get_num_threads(), *arrays)
    return y, h, kept


def _backward(
    gy: Tensor, gh: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
    starts: Tensor | None, kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, delta, A, B, C, D and of the initial state, from those of y and of the final state."""
    (b, l, d), n = x.shape, A.shape[1]
    check_shapes(x, delta, A, B, C, D, starts, gh)
    if gy.shape != x.shape or kept.shape != (-(-l // _CHUNK), b, n, d):
        raise ValueError(f"gradient {tuple(gy.shape)} or kept states {tuple(kept.shape)} do not fit x {tuple(x.shape)}")
    gy, x, B, C = (native.ready(t, x.dtype) for t in (gy, x, B, C))
    delta, A, D, kept = (native.ready(t, torch.float32) for t in (delta, A, D, kept))
    gh, starts = native.ready(gh, torch.float32), native.ready(starts, torch.bool)
    gx, gdelta, gA, gB, gC, gD = (torch.empty_like(t) for t in (x, delta, A, B, C, D))
    gh0 = delta.new_empty(b, d, n)
    arrays = native.addresses(gy, gh, x, delta, A, B, C, D, starts, kept, gx, gdelta, gA, gB, gC, gD, gh0)
    _scan_backward(b, l, d, n, x.dtype is torch.bfloat16, torch.get_num_threads(), *arrays)
    return gx, gdelta, gA, gB, gC, gD, gh0


def _step(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    b, d, n = state.shape
    if not (
        x.shape == delta.shape == (b, d) and B.shape == C.shape == (b, n) and A.shape == (d, n) and D.shape == (d,)
    ):
        raise ValueError(f"shapes of the step do not agree with the state {(b, d, n)}")
    x, B, C = (native.ready(t, x.dtype) for t in (x, B, C))
    h, delta, A, D = (native.ready(t, torch.float32) for t in (state, delta, A, D))
    y = torch.empty_like(x)
    arrays = native.addresses(x, h, delta, A, B, C, D, y)
    _scan_step(b, d, n, x.dtype is torch.bfloat16, torch.get_num_threads(), *arrays)
    if h is not state:  # it was not contiguous
        state.copy_(h)
    return y


def _check(random: native.Random) -> None:
    # a second chunk, channels that fill no vector, states in groups of 8, 4 and 1
    b, l, d, n = 2, _CHUNK + 3, 19, 13
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x, B, C, gy = (random(*shape).to(dtype) for shape in ((b, l, d), (b, l, n), (b, l, n), (b, l, d)))
        delta, A = random(b, l, d) + 0.5, -16 * (random(d, n) + 0.5)
        D, h0, gh, starts = random(d), random(b, d, n), random(b, d, n), random(b, l) < -0.4
        y, h, kept = _forward(x, delta, A, B, C, D, starts, h0, True)
        state, truth = h0.clone(), h0.clone()
        got = [y, h, *_backward(gy, gh, x, delta, A, B, C, D, starts, kept)]
        got += [_step(x[:, 0], state, delta[:, 0], A, B[:, 0], C[:, 0], D), state]
        wanted = [step_reference(x[:, 0], truth, delta[:, 0], A, B[:, 0], C[:, 0], D), truth]
        inputs = [t.requires_grad_() for t in (x, delta, A, B, C, D, h0)]
        with torch.enable_grad():
            results = scan_reference(x, delta, A, B, C, D, starts, h0)
        wanted = [*results, *torch.autograd.grad(results, inputs, [gy, gh]), *wanted]
        for mine, theirs in zip(got, wanted):
            native.require_close(mine, theirs, tolerance)


native.self_check(_check)
_forward_op = torch.library.custom_op("moai::selective_scan_native", mutates_args=())(_forward)
_backward_op = torch.library.custom_op("moai::selective_scan_native_backward", mutates_args=())(_backward)
register_scan(_forward_op, _backward_op, _CHUNK)
_step_op = torch.library.custom_op("moai::selective_scan_step_native", mutates_args={"state"})(_step)
_step_op.register_fake(lambda x, *_: torch.empty_like(x))


def scan_native(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, starts: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, h, _ = _forward_op(x, delta, A, B, C, D, starts, h0, needs_backward(x, delta, A, B, C, D, h0))
    return y, h


def step_native(x: Tensor, state: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    if needs_backward(x, state, delta, A, B, C, D):
        return step_reference(x, state, delta, A, B, C, D)
    if torch.compiler.is_compiling():
        return _step_op(x, state, delta, A, B, C, D)
    return _step(x, state, delta, A, B, C, D)  # an op of torch costs as much again as the step of a small model
