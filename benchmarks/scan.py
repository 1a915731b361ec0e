"""The selective scan: ours without and with a compiler, the plain loop, mambapy's parallel scan, transformers' CPU
path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, Timing, interleave, require_close, threads
from moai_llm.ops.dispatch import use
from moai_llm.ops.selective_scan import selective_scan

SHAPES = ((2, 512, 1024, 16), (2, 2048, 1024, 16))
Scan = Callable[..., Tensor]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, delta, A, B, C, D of a freshly initialised Mamba layer."""
    b, l, d, n = shape
    g = torch.Generator().manual_seed(0)
    made = [
        torch.randn(b, l, d, generator=g), F.softplus(torch.randn(b, l, d, generator=g) - 3),
        -torch.arange(1.0, n + 1).repeat(d, 1), torch.randn(b, l, n, generator=g), torch.randn(b, l, n, generator=g),
        torch.ones(d),
    ]  # fmt: skip
    return [t.to(dtype).requires_grad_() for t in made]


def ours(name: str) -> Scan:
    def run(*tensors: Tensor) -> Tensor:
        with use(selective_scan=name):
            return selective_scan(*tensors)

    return run


def indexing_loop(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The loop as it is usually written, one index per step and tensor; each index costs a whole tensor in the
    backward.
    """
    h, outputs = x.new_zeros(x.shape[0], x.shape[2], A.shape[1]), []
    for t in range(x.shape[1]):
        h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(outputs, 1) + D * x


def mambapy(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    states = pscan(torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None])
    return (states @ C[..., None]).squeeze(3) + D * x


def transformers_path(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from transformers.models.mamba import modeling_mamba

    function = modeling_mamba.mamba_selective_scan
    function = getattr(function, "__wrapped__", function)
    x, delta, B, C = (t.transpose(1, 2) for t in (x, delta, B, C))
    return function(x, delta, A, B, C, D).transpose(1, 2)


CANDIDATES: dict[str, Scan] = {
    "ours, native": ours("native"),
    "ours, torch": ours("torch"),
    "plain loop": indexing_loop,
    "loop of our reference (unbind)": ours("reference"),
    "mambapy pscan": mambapy,
}


def check(candidates: dict[str, Scan]) -> None:
    """Every candidate against the loop in float64, output and all gradients, at an odd size."""
    shape = (2, 45, 24, 16)

    def results(scan: Scan, dtype: torch.dtype) -> list[Tensor]:
        tensors = inputs(shape, dtype)
        y = scan(*tensors)
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        return [y, *torch.autograd.grad((y * weights).sum(), tensors)]

    truth = results(ours("reference"), torch.float64)
    for name, scan in candidates.items():
        for got, right in zip(results(scan, torch.float32), truth):
            require_close(name, got, right, 1e-5)


def run(quick: bool = False) -> list[Table]:
    check({**CANDIDATES, "transformers": transformers_path})
    tables = []
    for count in (1, 2):
        with threads(count):
            for shape in SHAPES[: 1 if quick else 2]:
                tables.append(_measure(shape, count, rounds=3 if quick else 7))
    return tables


def _measure(shape: tuple[int, int, int, int], count: int, rounds: int) -> Table:
    table = Table(
        f"Selective scan at (B, L, D, N) = {shape}, fp32, {count} thread{'s' if count > 1 else ''}",
        ("scan", "forward ms (wall)", "forward + backward ms (wall)", "forward + backward ms (CPU)", "times native"),
    )
    print(table.title)
    tensors = inputs(shape)
    grad = torch.randn(shape[:3])

    def forward(scan: Scan) -> Callable[[], object]:
        def call() -> None:
            with torch.no_grad():
                scan(*tensors)

        return call

    def both(scan: Scan) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(*tensors), tensors, grad)

    once = interleave({name: forward(scan) for name, scan in CANDIDATES.items()}, rounds)
    twice = interleave({name: both(scan) for name, scan in CANDIDATES.items()}, rounds)
    if shape[1] == 512:  # its backward is superlinear in the length: one run at the short one is enough to show it
        once["transformers"] = interleave({"t": forward(transformers_path)}, 3)["t"]
        twice["transformers"] = interleave({"t": both(transformers_path)}, 1, warmup=0)["t"]
    best = twice["ours, native"]
    for name, timing in twice.items():
        cells = once[name].wall * 1e3, timing.wall * 1e3, timing.cpu * 1e3, timing.wall / best.wall
        table.add(name, *cells)
    _goals(table, once, twice, count)
    return table


def _goals(table: Table, once: dict[str, Timing], twice: dict[str, Timing], count: int) -> None:
    def ratio(timings: dict[str, Timing], other: str, mine: str) -> float:
        return timings[other].cpu / timings[mine].cpu if count == 1 else timings[other].wall / timings[mine].wall

    table.goal("torch against mambapy pscan, forward + backward", ratio(twice, "mambapy pscan", "ours, torch"), 3)
    table.goal("torch against the plain loop, forward + backward", ratio(twice, "plain loop", "ours, torch"), 3.5)
    table.goal("torch against mambapy pscan, forward", ratio(once, "mambapy pscan", "ours, torch"), 3)
    table.goal("torch against the plain loop, forward", ratio(once, "plain loop", "ours, torch"), 3.5)
    if count == 1:
        table.goal("native against the plain loop, forward + backward", ratio(twice, "plain loop", "ours, native"), 10)
        table.goal("native against the plain loop, forward", ratio(once, "plain loop", "ours, native"), 10)
        table.goal(
            "native against our reference's loop, forward + backward",
            ratio(twice, "loop of our reference (unbind)", "ours, native"),
            10,
        )
