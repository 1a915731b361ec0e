"""Train a recipe once for every combination of some keys, one run after the other, and compare the results.

moai sweep quickstart data.train=work/text data.valid=work/valid --over optim.lr=1e-3,3e-3 --over train.seed=0,1
moai sweep quickstart data.train=work/text --over 'optim.betas=[0.9, 0.95],[0.9, 0.99]' --out runs/betas --show

The same command goes on where it was stopped, leaves finished runs alone and tries failed ones again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moai_llm import recipe as recipes
from moai_llm.commands.train import make_hooks, resolve_models
from moai_llm.runtime import MoaiError, make_console, write_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from moai_llm.recipe import Recipe

TABLE = "sweep.csv"
FINISHED = "finished.json"  # in a run's folder: the digest of the recipe that was run to its end
NUMBERS = ("step", "eval_loss", "loss")
LONGEST = 120  # characters of a folder's name


@dataclass
class Trial:
    """One combination of the values: its recipe, and what became of it."""

    values: dict[str, str]
    recipe: Recipe
    state: str = "new"  # new | begun | finished | failed
    numbers: dict[str, float] = field(default_factory=dict)
    message: str = ""

    @property
    def out(self) -> Path:
        return Path(self.recipe.train.out)

    def rank(self) -> tuple[bool, float]:
        """Finished ones first, the lowest loss first; a loss that is no number is the worst."""
        loss = self.numbers.get("eval_loss", self.numbers.get("loss", math.inf))
        return self.state != "finished", loss if math.isfinite(loss) else math.inf


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a preset (see `moai recipes`) or a recipe file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys to change in every run")
    parser.add_argument(
        "--over", action="append", required=True, metavar="a.b=c,d,...", help="a key and its values; may be repeated"
    )
    parser.add_argument("--out", default="runs/sweep", help="the folder of all runs (default runs/sweep)")
    parser.add_argument("--show", action="store_true", help="list the runs and what became of them, and stop")


def run(arguments: argparse.Namespace) -> None:
    out, console = Path(arguments.out), make_console()
    trials = make_trials(arguments.recipe, arguments.overrides, arguments.over, out)
    for trial in trials:
        look_up(trial)
    if not arguments.show:
        out.mkdir(parents=True, exist_ok=True)
        for number, trial in enumerate(trials, 1):
            console.print(f"\n[bold]{number}/{len(trials)}[/bold] {trial.out.name}", highlight=False)
            if trial.state == "finished":
                console.print("already finished")
            elif not _train(trial):
                _write(out / TABLE, trials)
                raise MoaiError("stopped; the same command goes on from here")
            elif trial.state == "failed":
                console.print(f"failed: {trial.message}", markup=False)
            _write(out / TABLE, trials)
        console.print()
    _show(console, trials)
    if not arguments.show:
        console.print(f"\n{out / TABLE} holds the table; `moai report` compares runs as plots")
    failed = sum(trial.state == "failed" for trial in trials)
    if failed:
        raise MoaiError(f"{failed} of {len(trials)} runs failed; the same command tries them again")


def make_trials(recipe: str, overrides: Sequence[str], over: Sequence[str], out: Path) -> list[Trial]:
    """Every combination, the last key changing fastest; all recipes are read before anything runs.

    Raises:
        MoaiError: a recipe that is not valid, a key that is given twice, or `train.out`, which the sweep sets.
    """
    axes = dict(map(_axis, over))
    if len(axes) < len(over):
        raise MoaiError("--over names a key twice: give all its values at once, --over optim.lr=1e-4,3e-4")
    fixed = [item.partition("=")[0].strip() for item in overrides]
    for key in (*fixed, *axes):
        if key == "train.out":
            raise MoaiError("every run of a sweep has a folder of its own: leave out train.out and set --out")
        if key in fixed and key in axes:
            raise MoaiError(f"{key} is given once for all runs and once with --over: leave one of them out")
    trials = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        items = [f"{key}={value}" for key, value in chosen.items()]
        folder = out / _folder(items)
        trials.append(Trial(chosen, recipes.load(recipe, [*overrides, *items, f"train.out={folder}"])))
    return trials


def look_up(trial: Trial) -> None:
    """What an earlier sweep made of it."""
    note = trial.out / FINISHED
    if note.is_file() and json.loads(note.read_text(encoding="utf-8"))["recipe"] == _digest(trial.recipe):
        trial.state = "finished"
    elif (trial.out / "recipe.yaml").is_file():
        trial.state = "begun"
    if trial.state != "new":
        trial.numbers = _numbers(trial.out)


def _axis(item: str) -> tuple[str, list[str]]:
    key, _, text = item.partition("=")
    values = _split(text)
    if not key.strip() or not all(values):
        raise MoaiError(f"--over {item}: write a key and its values, --over optim.lr=1e-4,3e-4")
    if len(set(values)) < len(values):
        raise MoaiError(f"--over {item} has a value twice")
    return key.strip(), values


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _folder(items: Sequence[str]) -> str:
    """A name that says the values; with a digest where characters had to go."""
    whole = ",".join(items)
    name = re.sub(r"[^\w.=,+-]+", "_", whole)
    if name == whole and len(name) <= LONGEST:
        return name
    return f"{name[:LONGEST]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _train(trial: Trial) -> bool:
    """Run it to its end, or as far as it goes; false where a signal stopped it."""
    from moai_llm.training.loop import train

    written, resume = _digest(trial.recipe), (trial.out / "recipe.yaml").is_file()
    try:
        resolve_models(trial.recipe, resume=resume)
        trained = train(trial.recipe, hooks=make_hooks(trial.recipe), resume=resume, title=trial.out.name)
    except Exception as error:  # whatever it is, the other runs are worth having
        trial.state, trial.message = "failed", f"{type(error).__name__}: {error}".removeprefix("MoaiError: ")
        trial.numbers = _numbers(trial.out)
        return True
    trial.state, trial.numbers = "finished" if trained.finished else "begun", _numbers(trial.out)
    if trained.finished:
        write_atomically(trial.out / FINISHED, json.dumps({"recipe": written}))
    return trained.finished


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipes.dump(recipe).encode()).hexdigest()


def _numbers(run: Path) -> dict[str, float]:
    """The last of each number that the run logged."""
    from moai_llm.training.events import read_metrics

    file = run / "metrics.jsonl"
    rows: list[dict[str, Any]] = read_metrics(file) if file.is_file() else []
    return {name: row[name] for row in rows for name in NUMBERS if name in row}


def _cells(trial: Trial) -> list[str]:
    return [
        *trial.values.values(), trial.state, str(trial.numbers.get("step", "")),
        *(f"{trial.numbers[name]:.4f}" if name in trial.numbers else "" for name in NUMBERS[1:]),
    ]  # fmt: skip


def _write(file: Path, trials: list[Trial]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*trials[0].values, "state", *NUMBERS, "run", "message"])
    table.writerows([*_cells(trial), str(trial.out), trial.message] for trial in sorted(trials, key=Trial.rank))
    write_atomically(file, text.getvalue())


def _show(console: Console, trials: list[Trial]) -> None:
    from rich.table import Table

    table = Table(*trials[0].values, "state", *NUMBERS, box=None, pad_edge=False)
    for trial in sorted(trials, key=Trial.rank):
        table.add_row(*_cells(trial))
    console.print(table)
