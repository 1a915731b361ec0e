"""What is wrong with this machine, this model or this run, and what to do about it.

moai doctor                                       the machine: what is installed, what runs on it
moai doctor moai-3b-tiny data.train=work/text     a recipe: its model is built and put to the test
moai doctor work/base                             a run: its losses, speed, experts, checkpoints, and its weights
moai doctor work/base/checkpoints/step-00002000   a model directory

A model is checked for the crystal ball (it sees the future), documents that leak into each other, its initial loss,
accumulation, gradients that do not reach a layer, dead experts, and whether it learns one batch by heart. Files are
only read. The exit code is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moai_llm import recipe as recipes
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from moai_llm.recipe import Recipe
    from moai_llm.training.doctor import Finding

COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="a preset or recipe file, a run, or a model directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="keys of the recipe to change")
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, ...")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.runtime import pick_device
    from moai_llm.training.doctor import worst

    device, console = pick_device(arguments.device), make_console()
    found: list[Finding] = []
    for title, findings in _sections(arguments, device):
        if not arguments.json:
            console.print(f"[bold]{title}[/bold]")
        for finding in _waiting(findings, console, arguments.json):
            found.append(finding)
            if not arguments.json:
                _show(finding, console)
    verdict = worst(found)
    if arguments.json:
        content = {"target": arguments.target, "verdict": verdict, "findings": [f.to_dict() for f in found]}
        print(json.dumps(content, ensure_ascii=False, indent=1))
    else:
        counts = {kind: sum(f.verdict == kind for f in found) for kind in COLORS}
        console.print(f"\n{counts['ok']} fine, {counts['warn']} to look at, {counts['fail']} failed")
    if verdict == "fail":
        sys.exit(1)


def _sections(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Title and findings, each computed when it is asked for."""
    from moai_llm.training.doctor import examine
    from moai_llm.training.doctor.machine import machine

    target, path = arguments.target, Path(arguments.target or "runs")
    if target is not None and path.is_dir():
        if arguments.overrides:
            raise MoaiError(f"{target} is no recipe, so {arguments.overrides[0]} changes nothing: leave it out")
        is_run = (path / "metrics.jsonl").is_file()
        yield "the machine", machine(device, path)
        if is_run:
            yield f"the run {path}", examine.of_run(path)
        if not is_run or any(path.glob("checkpoints/step-*/config.json")):
            yield "its weights" if is_run else f"the model {path}", _weights(path, device)
        return
    recipe = None if target is None else recipes.load(target, arguments.overrides)
    out = path if recipe is None else Path(recipe.train.out)
    yield "the machine", machine(device, out)
    if recipe is not None:
        yield f"the model of {target}", examine.of_recipe(recipe, target, device)


def _weights(path: Path, device: torch.device) -> Iterator[Finding]:
    """The checks of the newest weights a path holds, on the data of its recipe where that is still there."""
    from moai_llm.config import read_config
    from moai_llm.inference.load import is_for_vectors, load_model, resolve_model
    from moai_llm.training.doctor import Finding, examine

    directory = resolve_model(path)
    room = examine.fits(read_config(directory / "config.json"), device, str(path))
    yield room
    if room.verdict == "fail":
        return
    if is_for_vectors(directory):
        seen = "it makes vectors of texts; the checks of language models say nothing of it, `moai eval retrieval` does"
        yield Finding("kind", "ok", seen)
        return
    model = load_model(directory, str(device), "fp32").model
    file = directory / "recipe.yaml"
    recipe: Recipe | None = recipes.load(file) if file.is_file() else None
    yield from examine.of_model(model, recipe, fresh=False)


def _waiting(findings: Iterator[Finding], console: Console, quiet: bool) -> Iterator[Finding]:
    """The findings, with a sign of life while one is computed."""
    while True:
        if quiet or not console.is_terminal:
            finding = next(findings, None)
        else:
            with console.status("checking ..."):
                finding = next(findings, None)
        if finding is None:
            return
        yield finding


def _show(finding: Finding, console: Console) -> None:
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table

    if not console.is_terminal:  # one line each, to be searched
        console.print(f"  {finding.verdict:<4}  {finding.check:<17}  {finding.seen}", markup=False, soft_wrap=True)
        if finding.advice:
            console.print(f"{'':25}  -> {finding.advice}", markup=False, soft_wrap=True)
        return
    row = Table.grid(padding=(0, 2))
    row.add_column(width=4)
    row.add_column(width=17)
    row.add_column(overflow="fold")
    row.add_row(f"[{COLORS[finding.verdict]}]{finding.verdict}[/]", finding.check, escape(finding.seen))
    if finding.advice:
        row.add_row("", "", f"[{COLORS[finding.verdict]}]->[/] {escape(finding.advice)}")
    console.print(Padding(row, (0, 0, 0, 2)))
