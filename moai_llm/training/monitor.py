"""What a run tells while it goes: its numbers to the files and trackers, and to who watches.

On a terminal one live panel; off a terminal plain lines, one per log step.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import track
from torch import Tensor

from moai_llm.architecture import Architecture
from moai_llm.config import MoaiConfig
from moai_llm.optimization import LoraConfig
from moai_llm.planning.adapters import frozen_flops
from moai_llm.planning.hardware import GIB, find_device
from moai_llm.recipe import Recipe
from moai_llm.training import environment
from moai_llm.training.events import Events, read_metrics
from moai_llm.training.live import LiveView, duration
from moai_llm.training.precision import Precision
from moai_llm.training.sinks import Sinks

T = TypeVar("T")
LOADS = 200  # maps of the experts' load that a run keeps, spread over its steps: each may be thousands of numbers


class Monitor:
    """Records numbers by step and shows the run.

    Args:
        out: the run directory.
        total: steps of the whole run. start: steps already done.
        quiet: write the files and show nothing.
        sinks: trackers that hear the numbers too.
        flops: of a step per token. peak: what the device could do in a second; both known, rows have `mfu`.
        device: whose memory is told.
    """

    def __init__(
        self,
        out: Path,
        total: int,
        start: int = 0,
        *,
        title: str = "train",
        quiet: bool = False,
        sinks: Sinks | None = None,
        flops: float | None = None,
        peak: float | None = None,
        device: torch.device | None = None,
        console: Console | None = None,
    ) -> None:
        self.total, self.title = total, title
        self.console = console or Console(quiet=quiet, stderr=False, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self._events, self._sinks = Events(out, start), sinks
        # the sessions before took so long; of one that was killed, up to the row that it is resumed from
        spent = max((row.get("seconds", 0.0) for row in read_metrics(out / "metrics.jsonl")), default=0.0)
        self._began = time.perf_counter() - spent
        self._flops, self._peak, self._device = flops, peak, device or torch.device("cpu")
        self._every_load, self._last_load = max(1, total // LOADS), start
        self.view = LiveView(title, total, start)
        self._display = Live(self.view, console=self.console, refresh_per_second=4, transient=False)

    @classmethod
    def for_run(
        cls,
        recipe: Recipe,
        config: MoaiConfig,
        precision: Precision,
        total: int,
        start: int,
        *,
        title: str,
        quiet: bool,
    ) -> Monitor:
        """The monitor of a training run; notes in RUN/environment.json what it runs on."""
        out, device = Path(recipe.train.out), precision.device
        run_id = environment.record(out, device, start)
        return cls(
            out, total, start, title=title, quiet=quiet, sinks=Sinks(recipe, run_id, start),
            flops=work(config, recipe.data.seq_len, recipe.lora), peak=peak(precision), device=device,
        )  # fmt: skip

    def log(self, step: int, expert_load: Tensor | None = None, /, **numbers: Any) -> None:
        """Write the numbers of a step (1-based) and show the main ones.

        Args:
            expert_load: (sparse layers, E) share of all selections; a row has it now and then.
        """
        row = {"step": step, **numbers}
        load = [] if expert_load is None else [[round(x, 5) for x in layer] for layer in expert_load.tolist()]
        if "tokens_per_second" in row:
            if self._flops and self._peak:
                row["mfu"] = row["tokens_per_second"] * self._flops / self._peak
            row["memory_mb"] = round(self._memory() / 1e6, 1)
            row["seconds"] = round(time.perf_counter() - self._began, 2)
        if load and (step // self._every_load > self._last_load // self._every_load or step in (1, self.total)):
            row["expert_load"], self._last_load = load, step
        self._events.write(row)
        if self._sinks is not None:
            self._sinks.log(step, numbers | {name: row[name] for name in ("mfu", "memory_mb") if name in row})
        self.view.update(step, row, load)
        if not self.live and "loss" in row:
            self.console.print(f"{self.title} {step}/{self.total}  {self._summary(row)}")

    def advance(self, step: int) -> None:
        """Move the bar without new numbers."""
        self.view.advance(step)

    def rewind(self, step: int, text: str) -> None:
        """The run went back to `step`: forget what was written of later steps, and say why in a line that stays."""
        self._events.rewind(step)
        self._last_load = min(self._last_load, step)
        self.log(step, event=text)
        self.advance(step)
        self.note(text)

    def note(self, text: str) -> None:
        """A line that stays: an evaluation, a sample, a checkpoint."""
        self.console.print(text, markup=False)

    def _memory(self) -> int:
        """The most bytes tensors took on a GPU, else what the process holds now."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return environment.resident_bytes()

    def _summary(self, row: dict[str, Any]) -> str:
        parts = [f"loss {row['loss']:.3f}"]
        if "reward_accuracy" in row:
            parts.append(f"accuracy {row['reward_accuracy']:.0%}")
        if "accuracy" in row:
            parts.append(f"accuracy {row['accuracy']:.0%}")
        if "kl" in row:
            parts.append(f"kl {row['kl']:.3f}")
        if "lr" in row:
            parts.append(f"lr {row['lr']:.1e}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.1%}")
        eta = self.view.eta()
        if eta is not None:
            parts.append(f"eta {duration(eta)}")
        return "  ".join(parts)

    def __enter__(self) -> Monitor:
        if self.live:
            self._display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._display.stop()
        if self._sinks is not None:
            self._sinks.close()


def work(config: Architecture, seq_len: int, lora: LoraConfig | None = None) -> float | None:
    """Operations of a training step per token, recomputed ones not counted; None where a brick is not known here."""
    try:
        left_out = frozen_flops(lora, config) if lora is not None and lora.rank else 0.0
        return 3 * config.flops(seq_len)["total"] - left_out
    except ValueError:  # a brick from outside the package
        return None


def peak(precision: Precision) -> float | None:
    """Operations a second that the maker of the device promises for this precision; None where that is not known: a
    guessed peak says nothing.
    """
    if precision.device.type != "cuda" or precision.name == "fp32":
        return None
    memory = torch.cuda.get_device_properties(precision.device).total_memory / GIB
    found = find_device(torch.cuda.get_device_name(precision.device), memory)
    if found is None or found.tflops is None or (precision.name == "bf16" and not found.bf16):
        return None
    return found.tflops * 1e12


def follow(items: Iterable[T], total: int, title: str, *, quiet: bool = False) -> Iterator[T]:
    """Hand out the items and show how far it is: a bar on a terminal, else a line every ten seconds."""
    console = Console(quiet=quiet, highlight=False, soft_wrap=True)
    if console.is_terminal:
        yield from track(items, description=title, total=total, console=console, disable=quiet)
        return
    began = said = time.perf_counter()
    for done, item in enumerate(items, 1):
        yield item
        now = time.perf_counter()
        if now - said > 10 and done < total:
            console.print(f"{title} {done}/{total}  eta {duration((now - began) / done * (total - done))}")
            said = now
