"""The one stream of numbers of a run: metrics.jsonl, a line for each event, and what is derived from it.

A row is `{"step": 20, "loss": 3.1, ...}`. It is written and flushed before anyone else hears of it, so a kill loses at
most the row of that moment. On resume the file is cut back to the resumed step, so no step is written twice.
training_log.csv is the same for a spreadsheet.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CSV_COLUMNS = (
    "step", "tokens", "loss", "lr", "grad_norm", "clip", "skipped", "tokens_per_second", "mfu", "memory_mb", "seconds",
    "aux_loss", "expert_cv", "eval_loss", "bits_per_byte", "kl", "reward_margin", "reward_accuracy",
    "eval_reward_margin", "eval_reward_accuracy",
)  # fmt: skip


class Events:
    """Appends rows to the files of a run.

    Args:
        out: the run's folder.
        start: steps that stand already; what lies behind them is cut off.
    """

    def __init__(self, out: Path, start: int = 0) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._jsonl, self._csv = out / "metrics.jsonl", out / "training_log.csv"
        self.rewind(start)

    def rewind(self, step: int) -> None:
        """Cut off what was written of later steps."""
        kept = [row for row in read_metrics(self._jsonl) if row["step"] <= step] if step else []
        self._jsonl.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        write_csv(self._csv, kept)

    def write(self, row: dict[str, Any]) -> None:
        with self._jsonl.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        with self._csv.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore").writerow(row)


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The rows as a table, its columns named in the first line."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


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
