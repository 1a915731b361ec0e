"""Where the time and the memory of a run go: `moai train ... --profile` and `--memory-profile`.

A few steps near the beginning are traced once and the run goes on. The trace is written inside `on_trace_ready`:
after the loop the profiler has moved on to the next, empty, cycle.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, schedule

from moai_llm.runtime import MoaiError
from moai_llm.training import environment

SKIPPED, WARMUP, ACTIVE = 5, 1, 3  # steps: caches fill and kernels are built, the tracer starts, what is traced
ROWS = 15  # of the table of operators
HISTORY = 100_000  # allocations that a snapshot of CUDA memory remembers


@dataclass(frozen=True)
class ProfileOptions:
    """What to look at; nothing by default."""

    time: bool = False
    trace: Path | None = None  # where the timeline goes, for chrome://tracing or ui.perfetto.dev
    memory: bool = False
    interval: int = 100  # steps between two reports of memory

    def check(self, left: int) -> None:
        """Raises `MoaiError` where a run has too few steps left to be traced."""
        if self.time and left <= WARMUP:
            raise MoaiError(f"--profile needs at least {WARMUP + 1} steps to look at, and this run has {left} left")


class Operator(NamedTuple):
    """One kind of operation over all traced steps; times in microseconds, its callees not counted."""

    name: str
    calls: int
    time: float
    share: float


class Profiler:
    """A context around the steps of a run; `step` is called after each.

    Args:
        options: nothing is done where they ask for nothing.
        out: the run directory: profile.txt and memory_snapshot.pickle go there.
        left: steps this session will take.
        say: shows lines to who watches. log: writes numbers of a step.
    """

    def __init__(
        self, options: ProfileOptions, out: Path, device: torch.device, left: int, model: nn.Module,
        optimizer: torch.optim.Optimizer, say: Callable[[str], None], log: Callable[..., None],
    ) -> None:  # fmt: skip
        self._options, self._out, self._device, self._say, self._log = options, out, device, say, log
        self._model, self._optimizer = model, optimizer
        self._tracer: Any = None
        if options.time:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
            skipped = min(SKIPPED, max(0, left - WARMUP - ACTIVE))
            active = min(ACTIVE, left - skipped - WARMUP)
            self._tracer = profile(
                activities=activities, schedule=schedule(wait=skipped, warmup=WARMUP, active=active, repeat=1),
                on_trace_ready=self._traced, record_shapes=False, acc_events=True,
            )  # fmt: skip

    def step(self, done: int) -> float:
        """After step `done` of the run. Returns the seconds it took, which are not the training's."""
        began = time.perf_counter()
        if self._tracer is not None:
            self._tracer.step()
        if self._options.memory and done % self._options.interval == 0:
            self._report_memory(done)
        return time.perf_counter() - began

    def __enter__(self) -> Profiler:
        if self._tracer is not None:
            self._tracer.__enter__()
        if self._options.memory and self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracer is not None:
            self._tracer.__exit__(kind, error, trace)
        if self._options.memory and self._device.type == "cuda":
            file = self._out / "memory_snapshot.pickle"
            torch.cuda.memory._dump_snapshot(str(file))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._say(f"every allocation is in {file}; open it at https://pytorch.org/memory_viz")

    def _traced(self, tracer: Any) -> None:
        lines = table(operators(tracer, self._device))
        (self._out / "profile.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for line in lines:
            self._say(line)
        if self._options.trace is not None:
            self._options.trace.parent.mkdir(parents=True, exist_ok=True)
            tracer.export_chrome_trace(str(self._options.trace))
            self._say(f"timeline in {self._options.trace}; open it at https://ui.perfetto.dev")

    def _report_memory(self, step: int) -> None:
        found = memory_by_kind(self._model, self._optimizer, self._device)
        self._log(step, **{f"memory_{name}_mb": round(size / 1e6, 1) for name, size in found.items()})
        shown = "  ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in found.items())
        self._say(f"step {step} memory:  {shown}")


def operators(tracer: Any, device: torch.device) -> list[Operator]:
    """What a trace spent its time on, most first: time on the device where it has its own, else on the CPU."""
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [
        (event.key, event.count, float(getattr(event, kind)))
        for event in tracer.key_averages()
        if not event.key.startswith("ProfilerStep")
    ]
    whole = sum(spent for _, _, spent in found) or 1.0
    each = (Operator(name, calls, spent, spent / whole) for name, calls, spent in found)
    return sorted(each, key=lambda operator: operator.time, reverse=True)


def table(found: list[Operator]) -> list[str]:
    """The operators that took the most, as lines of text."""
    rest = found[ROWS:]
    sums = sum(o.calls for o in rest), sum(o.time for o in rest), sum(o.share for o in rest)
    others = Operator(f"{len(rest)} others", *sums)
    width = max(len(operator.name[:60]) for operator in [*found[:ROWS], others])
    lines = [f"{'operator':<{width}}  {'calls':>7}  {'time':>10}   share"]
    for name, calls, spent, share in [*found[:ROWS], *[others] * bool(rest)]:
        lines.append(f"{name[:60]:<{width}}  {calls:>7,}  {spent / 1000:>7,.1f} ms  {share:>6.1%}")
    return lines


def memory_by_kind(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> dict[str, int]:
    """Bytes of what is known by name, and of the whole: what lies between is activations, buffers and the rest.

    Gradients are those that stand between two steps: none, where a step frees them.
    """
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    found = {
        "weights": sum(p.nbytes for p in parameters),
        "optimizer": sum(t.nbytes for t in states),
        "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
    }
    if device.type == "cuda":
        return found | {
            "allocated": torch.cuda.memory_allocated(device), "peak": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }  # fmt: skip
    return found | {"process": environment.resident_bytes(), "peak": environment.peak_resident_bytes()}
