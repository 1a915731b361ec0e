"""What a run left in its folder, read as it is: one that was killed, or whose files are partly gone, still reports."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from moai_llm.runtime import MoaiError
from moai_llm.training import environment
from moai_llm.training.checkpoint import problems
from moai_llm.training.events import read_metrics

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Kept:
    """A checkpoint. `problem` is None where every file has its digest, or where nobody looked."""

    name: str
    bytes: int
    problem: str | None
    checked: bool


@dataclass(frozen=True)
class Record:
    """One run."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    samples: list[tuple[int, list[str]]]  # step, the texts of its prompts
    checkpoints: list[Kept]

    def points(self, key: str) -> Points:
        """(step, value) of the rows that have a finite one."""
        found = [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), (int, float))]
        return [(float(step), float(value)) for step, value in found if math.isfinite(value)]

    def last(self, key: str) -> float | None:
        points = self.points(key)
        return points[-1][1] if points else None

    def usual(self, key: str) -> float | None:
        points = self.points(key)
        return median(value for _, value in points) if points else None

    def most(self, key: str) -> float | None:
        return max((value for _, value in self.points(key)), default=None)

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def loads(self) -> list[tuple[int, list[list[float]]]]:
        """(step, load of each sparse layer) where it was logged."""
        return [(row["step"], row["expert_load"]) for row in self.rows if row.get("expert_load")]

    @property
    def sessions(self) -> list[dict[str, Any]]:
        return list(self.environment.get("sessions", []))


def find_runs(paths: Sequence[str]) -> list[Path]:
    """The runs that paths mean: each itself, or those that lie in it, as a quickstart's do.

    Raises:
        MoaiError: there is none.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        itself = (path / "metrics.jsonl").is_file()
        inside = [path] if itself else sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        if not inside:
            what = "no such folder" if not path.exists() else "no run in it (metrics.jsonl)"
            raise MoaiError(f"{given}: {what}; give the train.out of a run")
        found += [run for run in inside if run not in found]
    return found


def read_run(path: Path, name: str, *, digests: bool = True) -> Record:
    """Read a run's folder.

    Args:
        digests: look at every file of every checkpoint, which for large models takes a while.

    Raises:
        MoaiError: it has not logged a single row.
    """
    rows = read_metrics(path / "metrics.jsonl")
    if not rows:
        raise MoaiError(f"{path}: metrics.jsonl has no row yet: wait for the first step")
    try:
        recipe = yaml.safe_load((path / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        recipe = None
    return Record(
        name, path, rows, recipe if isinstance(recipe, dict) else {}, environment.read(path), read_samples(path),
        list(_checkpoints(path, digests)),
    )  # fmt: skip


def read_samples(path: Path) -> list[tuple[int, list[str]]]:
    """samples.txt by step. A resumed run wrote some steps twice; the later ones count."""
    found: dict[int, list[str]] = {}
    last = -1
    try:
        lines = (path / "samples.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        parts = re.fullmatch(r"step (\d+): (.+)", line)
        if not parts:
            continue
        try:
            step, text = int(parts[1]), str(ast.literal_eval(parts[2]))
        except (ValueError, SyntaxError):  # a line cut off by a kill
            continue
        if step < last:
            found = {number: texts for number, texts in found.items() if number < step}
        found.setdefault(step, []).append(text)
        last = step
    return sorted(found.items())


def smooth(points: Points, share: float = 1 / 40) -> Points:
    """An exponential mean over about `share` of the points, without its bias at the beginning."""
    keep = 1 - 2 / (max(1.0, len(points) * share) + 1)
    mean = weight = 0.0
    found = []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((step, mean / weight))
    return found


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """A recipe as {"optim.lr": 3e-4, ...}."""
    found = {}
    for section, held in tree.items():
        if isinstance(held, dict):
            found.update({f"{section}.{key}": value for key, value in held.items()})
        else:
            found[section] = held
    return found


def _checkpoints(path: Path, digests: bool) -> Iterator[Kept]:
    for folder in sorted((path / "checkpoints").glob("*step-*")):
        if folder.is_dir() and not folder.name.startswith("."):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            yield Kept(folder.name, size, next(problems(folder), None) if digests else None, digests)
