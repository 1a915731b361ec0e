"""Attention over rows of packed documents: cut at the borders against masks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, interleave, require_close, threads
from moai_llm.ops.attention import attention, visible
from moai_llm.ops.dispatch import use

LENGTHS = (300, 150, 600, 90, 410, 250, 248)
HEADS, KEYS, WIDTH = 6, 2, 64


def run(quick: bool = False) -> list[Table]:
    with threads(1):
        return [measure(dtype, 3 if quick else 9) for dtype in (torch.float32, torch.bfloat16)]


def measure(dtype: torch.dtype, rounds: int) -> Table:
    length = sum(LENGTHS)
    g = torch.Generator().manual_seed(0)
    shapes = ((1, HEADS, length, WIDTH), (1, KEYS, length, WIDTH), (1, KEYS, length, WIDTH))
    q, k, v = (torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes)
    grad = torch.randn(1, HEADS, length, WIDTH, generator=g).to(dtype)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    keep = visible(length, length, documents, None, q.device)
    additive = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, -torch.inf)

    def split() -> Tensor:
        with use(attention="split"):
            return attention(q, k, v, seq_idx=documents)

    def masked(mask: Tensor) -> Callable[[], Tensor]:
        return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    candidates = {"ours, split": split, "SDPA, boolean mask": masked(keep), "SDPA, additive mask": masked(additive)}
    with use(attention="reference"):
        truth = attention(q.double(), k.double(), v.double(), seq_idx=documents)
        right = (truth, *torch.autograd.grad(truth, (q, k, v), grad.double()))
    for name, function in candidates.items():
        y = function()
        for got, expected in zip((y, *torch.autograd.grad(y, (q, k, v), grad)), right):
            require_close(name, got, expected, 1e-5 if dtype == torch.float32 else 2e-2)

    def forward(function: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    def both(function: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (q, k, v), grad)

    once = interleave({name: forward(f) for name, f in candidates.items()}, rounds)
    twice = interleave({name: both(f) for name, f in candidates.items()}, rounds)
    name = str(dtype).removeprefix("torch.")
    table = Table(
        f"{len(LENGTHS)} documents in a row of {length} tokens, {HEADS}/{KEYS} heads x {WIDTH}, {name}, 1 thread",
        ("attention", "forward ms (wall)", "forward + backward ms (wall)", "times ours"),
    )
    print(table.title)
    ours = twice["ours, split"]
    for candidate, timing in twice.items():
        table.add(candidate, once[candidate].wall * 1e3, timing.wall * 1e3, ours.times_faster_than(timing))
    best = min(ours.times_faster_than(t) for candidate, t in twice.items() if candidate != "ours, split")
    table.goal(f"split against the better mask, forward + backward, {name}", best, 4.0)
    return table
