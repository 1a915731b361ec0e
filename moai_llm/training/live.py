"""How a run looks on a terminal while it goes: one panel, drawn anew a few times a second.

What it shows it was given; it keeps only the losses it draws.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK = 48  # characters of the line of losses
KEPT = 4096  # losses to draw from; beyond, every other is forgotten
LAYERS, EXPERTS = 4, 32  # of the bars of experts


class LiveView:
    """A rich renderable: `rich.live.Live(view)` shows it.

    Args:
        total: steps of the whole run. start: steps that stood at the beginning of this session.
    """

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title, self.total, self.start, self.step = title, total, start, start
        self.row: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.load: Sequence[Sequence[float]] = ()
        self._losses: list[float] = []  # replaced or appended to, never cut: another thread draws it
        self._stride = self._skipped = 1
        self._began = time.perf_counter()

    def update(self, step: int, row: dict[str, Any], load: Sequence[Sequence[float]] = ()) -> None:
        self.step = step
        if "loss" in row:
            self.row = row
            self._keep(row["loss"])
        else:
            self.evaluation = {"step": step, **row}
        if load:
            self.load = load

    def advance(self, step: int) -> None:
        self.step = step

    def _keep(self, loss: float) -> None:
        self._skipped += 1
        if self._skipped >= self._stride:
            self._losses.append(loss)
            self._skipped = 0
        if len(self._losses) > KEPT:
            self._losses = self._losses[::2]
            self._stride *= 2

    def eta(self) -> float | None:
        """Seconds to the end, from the mean speed of this session."""
        done = self.step - self.start
        if done < 1 or self.step >= self.total:
            return None
        return (time.perf_counter() - self._began) / done * (self.total - self.step)

    def __rich__(self) -> RenderableType:
        eta = self.eta()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        left = f"  eta {duration(eta)}" if eta is not None else ""
        bar.add_row(
            ProgressBar(total=max(self.total, 1), completed=self.step),
            f"{self.step:,}/{self.total:,}  {self.step / max(self.total, 1):.0%}{left}",
        )
        parts: list[RenderableType] = [bar]
        if self._losses:
            line = Text(sparkline(self._losses[:], SPARK), style="cyan", no_wrap=True)
            parts.append(line.append(f"  loss {self.row.get('loss', math.nan):.4f}", style="bold"))
        parts.append(_numbers(self.row, self.evaluation))
        if self.load:
            parts.append(_experts(self.load))
        return Panel(Group(*parts), title=self.title, title_align="left", border_style="dim")


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks, the mean of each stretch; the lowest is the lowest block. One without a number is a gap.

    >>> sparkline([3, 2, 1], 8)
    '█▅▁'
    """
    size = max(1, math.ceil(len(values) / width))
    means = []
    for i in range(0, len(values), size):
        part = [value for value in values[i : i + size] if math.isfinite(value)]
        means.append(sum(part) / len(part) if part else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return " " * len(means)
    low, span = min(finite), max(finite) - min(finite) or 1.0
    steps = len(BLOCKS) - 1
    return "".join(BLOCKS[math.floor((m - low) / span * steps + 0.5)] if math.isfinite(m) else " " for m in means)


def duration(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _numbers(row: dict[str, Any], evaluation: dict[str, Any]) -> RenderableType:
    shown = {
        "lr": f"{row['lr']:.2e}" if "lr" in row else "",
        "grad norm": f"{row['grad_norm']:.3g}" if "grad_norm" in row else "",
        "tok/s": f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
        "MFU": f"{row['mfu']:.1%}" if row.get("mfu") else "",
        "memory": f"{row['memory_mb'] / 1000:.2f} GB" if row.get("memory_mb") else "",
        f"eval at {evaluation.get('step')}": f"{evaluation['eval_loss']:.4f}" if "eval_loss" in evaluation else "",
        "bits per byte": f"{evaluation['bits_per_byte']:.4f}" if "bits_per_byte" in evaluation else "",
    }
    text = Text(no_wrap=False, overflow="fold")  # on a narrow screen it takes two lines
    for name, value in shown.items():
        if value:
            text.append(f"{name} ", style="dim").append(f"{value}   ")
    return text


def _experts(load: Sequence[Sequence[float]]) -> RenderableType:
    """A bar for each expert, full at twice its even share; the layers that are most uneven where there are many."""
    spread = [max(shares) - min(shares) for shares in load]
    shown = sorted(sorted(range(len(load)), key=lambda i: -spread[i])[:LAYERS])
    text = Text()
    for i in shown:
        shares = load[i]
        even = 1 / len(shares)
        blocks = []
        for share in shares[:EXPERTS]:
            filled = min(max(share / (2 * even), 0.0), 1.0)
            blocks.append(BLOCKS[round(filled * (len(BLOCKS) - 1))])
        dead = sum(share < even / 100 for share in shares)
        text.append("\n" if text else "").append(f"experts {i + 1:>2} ", style="dim").append("".join(blocks))
        text.append("…" if len(shares) > EXPERTS else "")
        text.append(f"  {dead} dead" if dead else "", style="red")
    if len(load) > LAYERS:
        text.append(f"\nthe {LAYERS} most uneven of {len(load)} sparse layers", style="dim")
    return text
