"""Loss and its gradients from hidden states: ours in chunks against all logits at once, extra peak memory and time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, interleave, peak_memory, require_close, threads
from moai_llm.ops.cross_entropy import linear_cross_entropy

ROWS = 4096
SIZES = ((512, 32768), (512, 65536), (512, 131072), (1024, 32768), (1024, 65536), (1024, 131072))
Gradients = tuple[Tensor, Tensor, Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Gradients:
    loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    return (loss, *torch.autograd.grad(loss, (hidden, weight)))


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Gradients:
    loss = linear_cross_entropy(hidden, weight, targets).objective / targets.numel()
    return (loss, *torch.autograd.grad(loss, (hidden, weight)))


def inputs(rows: int, width: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) * width**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=g)


def check() -> None:
    """Both against float64 at an odd size."""
    made = inputs(77, 48, 1001, torch.float64)
    truth = plain(*made)
    for name, function in {"ours": chunked, "plain": plain}.items():
        found = function(*(t.detach().float().requires_grad_() if t.is_floating_point() else t for t in made))
        for got, right in zip(found, truth):
            require_close(name, got, right, 1e-5)


def run(quick: bool = False) -> list[Table]:
    check()
    with threads(2):
        return [measure(dtype, SIZES[:1] if quick else SIZES) for dtype in (torch.float32, torch.bfloat16)]


def measure(dtype: torch.dtype, sizes: tuple[tuple[int, int], ...]) -> Table:
    name = str(dtype).removeprefix("torch.")
    table = Table(
        f"Linear + cross-entropy, forward and backward, {ROWS} rows, {name}",
        (
            "hidden x vocabulary",
            "plain s",
            "ours s",
            "time, plain = 1",
            "plain extra MiB",
            "ours extra MiB",
            "memory, plain = 1",
        ),
    )
    print(table.title)
    for width, vocab in sizes:
        made = inputs(ROWS, width, vocab, dtype)
        # the gradients of hidden and weight are the result, not an extra
        result = sum(t.numel() * t.element_size() for t in made[:2])
        extra = {f: peak_memory(bind(f, made)) - result for f in (plain, chunked)}
        times = interleave({"plain": bind(plain, made), "ours": bind(chunked, made)}, rounds=2, warmup=0)
        ratio = 1 / times["ours"].times_faster_than(times["plain"])
        memory = extra[chunked] / extra[plain]
        table.add(f"{width} x {vocab}", times["plain"].wall, times["ours"].wall, ratio,
                  extra[plain] / 2**20, extra[chunked] / 2**20, memory)  # fmt: skip
        table.goal(f"time of {width} x {vocab}, {name}", ratio, at_most=1.1)
        if vocab == 131072:
            table.goal(f"extra peak memory of {width} x {vocab}, {name}", memory, at_most=1 / 6)
    return table


def bind(function: Callable[..., Gradients], made: tuple[Tensor, Tensor, Tensor]) -> Callable[[], Gradients]:
    return lambda: function(*made)
