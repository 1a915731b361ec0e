"""Measure candidates against each other fairly: one process, one after the other in every round, medians, correctness
first.

Wall time is what a user waits, CPU time what the work costs (on a busy machine the steadier of the two). A comparison
whose candidates do not agree with the truth is refused: a fast wrong answer is not a result.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in the order of the rounds."""

    walls: tuple[float, ...]
    cpus: tuple[float, ...]

    @property
    def wall(self) -> float:
        return statistics.median(self.walls)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)

    def times_faster_than(self, other: Timing) -> float:
        """Median over the rounds of other / self: both sides of a round met the same machine."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.walls, other.walls))


@dataclass
class Table:
    """Rows of one benchmark; `verdicts` say which goal was met."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        row = tuple(cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells)
        self.rows.append(row)
        print("  " + " | ".join(row), flush=True)

    def goal(self, what: str, value: float, at_least: float | None = None, at_most: float | None = None) -> None:
        """Record a ratio against its goal."""
        met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        bound = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}"
        self.verdicts.append(f"{'met' if met else 'MISSED'}: {what}: {value:.2f} (goal {bound})")
        print("  " + self.verdicts[-1], flush=True)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            f"| {' | '.join(self.columns)} |",
            "|---" + "|--:" * (len(self.columns) - 1) + "|",
        ]
        lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"- {verdict}" for verdict in self.verdicts)]) + "\n"


class Disagreement(AssertionError):
    """A candidate's result is wrong, so its time means nothing."""


def require_close(name: str, got: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    """Relative Frobenius distance to the truth.

    Raises:
        Disagreement: it is larger than the tolerance.
    """
    got, truth = got.detach().double(), truth.detach().double()
    error = float((got - truth).norm() / truth.norm())
    if not error <= tolerance:
        raise Disagreement(f"{name} is off by {error:.1e} (allowed {tolerance:.0e}): nothing is measured")


def interleave(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, warmup: int = 1) -> dict[str, Timing]:
    """Run every candidate once per round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if i >= warmup:
                taken[name].append(spent)
    return {name: Timing(*zip(*runs)) for name, runs in taken.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes by which the resident memory of a fresh child process grows at most while it runs this once.

    A child, because a heap that was once large hides every later allocation.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # the parent's pool does not survive a fork
            ctypes.CDLL(None).malloc_trim(0)  # what the parent freed would serve the child without being seen
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident now
            before = _status("VmRSS")
            run()
            os.write(write, str(_status("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    if not content:
        raise RuntimeError("the measured process died")
    return int(content)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    import transformers

    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def save(name: str, tables: list[Table], command: str) -> Path:
    """Write results/NAME.md and NAME.json with the command that made them."""
    RESULTS.mkdir(exist_ok=True)
    facts = environment()
    described = ", ".join(f"{key} {value}" for key, value in facts.items())
    text = f"# {name}\n\nPrinted by `{command}` on {described}.\n\n" + "\n".join(table.markdown() for table in tables)
    path = RESULTS / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    content = {"command": command, "environment": facts, "tables": [vars(table) for table in tables]}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path
