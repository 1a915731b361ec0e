"""What a run tells: metrics.jsonl (every number), training_log.csv (the same for a spreadsheet), a live line on a
terminal.

Off a terminal the live line becomes plain lines, one per log step. On resume both files are cut back to the resumed
step, so no step is written twice.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, track

T = TypeVar("T")

CSV_COLUMNS = (
    "step", "tokens", "loss", "lr", "grad_norm", "clip", "tokens_per_second", "aux_loss", "expert_cv", "eval_loss",
    "bits_per_byte", "kl", "reward_margin", "reward_accuracy", "eval_reward_margin", "eval_reward_accuracy",
)  # fmt: skip


class Monitor:
    """Records numbers by step and shows the run.

    Args:
        out: the run directory.
        total: steps of the whole run. start: steps already done.
        quiet: write the files and show nothing.
    """

    def __init__(self, out: Path, total: int, start: int = 0, *, title: str = "train", quiet: bool = False) -> None:
        self.total, self.start, self.title = total, start, title
        self.console = Console(quiet=quiet, stderr=False, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        out.mkdir(parents=True, exist_ok=True)
        self._jsonl, self._csv = out / "metrics.jsonl", out / "training_log.csv"
        self._cut_back()
        self._began = time.perf_counter()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"), console=self.console, transient=False,
        )  # fmt: skip
        self._task = self._progress.add_task(title, total=total, completed=start, numbers="")

    def _cut_back(self) -> None:
        """Keep what was written up to the resumed step."""
        kept = [row for row in read_metrics(self._jsonl) if row["step"] <= self.start] if self.start else []
        self._jsonl.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        with self._csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def log(self, step: int, **numbers: Any) -> None:
        """Write the numbers of a step (1-based) and show the main ones."""
        row = {"step": step, **numbers}
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with self._csv.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore").writerow(row)
        text = self._summary(step, row)
        if self.live:
            self._progress.update(self._task, completed=step, numbers=text)
        elif "loss" in row:
            self.console.print(f"{self.title} {step}/{self.total}  {text}")

    def advance(self, step: int) -> None:
        """Move the bar without new numbers."""
        if self.live:
            self._progress.update(self._task, completed=step)

    def rewind(self, step: int, text: str) -> None:
        """The run went back to `step`: forget what was written of later steps, and say why in a line that stays."""
        self.start = step
        self._cut_back()
        self._began = time.perf_counter()
        self.log(step, event=text)
        self.advance(step)
        self.note(text)

    def note(self, text: str) -> None:
        """A line that stays: an evaluation, a sample, a checkpoint."""
        self.console.print(text, markup=False)

    def _summary(self, step: int, row: dict[str, Any]) -> str:
        parts = []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.3f}")
        if "reward_accuracy" in row:
            parts.append(f"accuracy {row['reward_accuracy']:.0%}")
        if "kl" in row:
            parts.append(f"kl {row['kl']:.3f}")
        if "lr" in row:
            parts.append(f"lr {row['lr']:.1e}")
        if "tokens_per_second" in row:
            parts.append(f"{row['tokens_per_second']:,.0f} tok/s")
        done = step - self.start
        if done > 0 and step < self.total:
            left = (time.perf_counter() - self._began) / done * (self.total - step)
            parts.append(f"eta {duration(left)}")
        return "  ".join(parts)

    def __enter__(self) -> Monitor:
        if self.live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._progress.stop()


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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def duration(seconds: float) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
