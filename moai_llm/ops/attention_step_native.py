"""The `native` step of an attention mixer: attention_step.cpp, built for this CPU.

Importing this module builds the library, or takes it from the cache, and compares it with the reference; it raises
`dispatch.Unavailable` where that does not work out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moai_llm.ops import native
from moai_llm.ops.attention_step import AttentionWeights, Rope, attention_step_reference
from moai_llm.ops.native import ready

_library = native.load("attention_step.cpp")


def _function(name: str) -> Any:
    function = getattr(_library, name)
    function.argtypes = [ctypes.c_int64] * 8 + [ctypes.c_int, ctypes.c_float] + [ctypes.c_void_p] * 17
    function.errcheck = native.raise_if_failed
    return function


_FUNCTIONS = {
    torch.float32: _function("moai_attention_step_fp32"),
    torch.bfloat16: _function("moai_attention_step_bf16"),
}


def attention_step_native(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    rope: Rope,
    window: int | None,
    weights: AttentionWeights,
) -> Tensor:
    w, half = weights, x.dtype
    (b, shared, capacity, size), width = keys.shape, x.shape[1]
    heads = w.q.shape[0] // size
    if len(lengths) != b or not 0 <= min(lengths) <= max(lengths) < capacity or heads % shared:
        raise ValueError(f"keys {tuple(keys.shape)}, {heads} heads and lengths {list(lengths)} do not fit")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("the cache must be contiguous: it is written in place")
    rotated = 0 if rope is None else 2 * rope[0].shape[-1]
    places = (ctypes.c_int64 * b)(*lengths)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    cos, sin = (None, None) if rope is None else (ready(t, torch.float32, (b, 1, rotated // 2)) for t in rope)
    inner, shape = (shared * size, width), (b, shared, capacity, size)
    before = (ready(x, half, (b, width)), cos, sin, ready(keys, half, shape), ready(values, half, shape))
    after = (
        ready(w.q, half, (heads * size, width)), ready(w.k, half, inner), ready(w.v, half, inner),
        ready(w.out, half, (width, heads * size)), ready(w.q_bias, half, (heads * size,)),
        ready(w.k_bias, half, inner[:1]), ready(w.v_bias, half, inner[:1]), ready(w.out_bias, half, (width,)),
        ready(w.q_norm, half, (size,)), ready(w.k_norm, half, (size,)), y,
    )  # fmt: skip
    _FUNCTIONS[half](
        b, width, heads, shared, size, rotated, capacity, window or 0, torch.get_num_threads(), w.eps,
        *native.addresses(*before), ctypes.addressof(places), *native.addresses(*after),
    )  # fmt: skip
    return y


def _check(random: native.Random) -> None:
    b, width, heads, shared, size, capacity = 2, 21, 6, 3, 10, 7
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):

        def some(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return random(*shape).to(dtype)

        q, inner = heads * size, shared * size
        weights = AttentionWeights(
            size, 1e-6, some(q, width), some(inner, width), some(inner, width), some(width, q),
            some(q), some(inner), some(inner), some(width), 1 + some(size), 1 + some(size),
        )  # fmt: skip
        angles = 3 * random(b, 1, 3)
        x, rope = some(b, width), (angles.cos(), angles.sin())
        keys, values = some(b, shared, capacity, size), some(b, shared, capacity, size)
        k, v = keys.clone(), values.clone()
        got = attention_step_native(x, keys, values, [5, 2], rope, 4, weights)
        truth = attention_step_reference(x, k, v, [5, 2], rope, 4, weights)
        for result, wanted in ((got, truth), (keys, k), (values, v)):
            native.require_close(result, wanted, tolerance)


native.self_check(_check)
