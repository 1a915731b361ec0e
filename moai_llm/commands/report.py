"""One page from one or several training runs: loss, learning rate, gradients, speed, memory, load of the
experts, samples, configuration, environment, checkpoints. One HTML file that needs no other.

moai report work/base
moai report work/base work/other --out both.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moai_llm.commands.tokenizer_report import short_names
from moai_llm.runtime import MoaiError, make_console, write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", help="the folders of runs, or a folder that holds some")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page to write (default report.html)")
    parser.add_argument("--no-digests", action="store_true", help="do not read the checkpoints, which may be large")


def run(arguments: argparse.Namespace) -> None:
    from rich.table import Table

    from moai_llm.training.report.page import page, summary
    from moai_llm.training.report.record import find_runs, read_run

    out, console = Path(arguments.out), make_console()
    if out.is_dir():
        raise MoaiError(f"--out {out} is a folder: name a file to write")
    paths = find_runs(arguments.runs)
    records = []
    with console.status("reading ...") as status:
        for path, name in zip(paths, short_names([str(path) for path in paths])):
            status.update(f"reading {path} ...")
            records.append(read_run(path, name, digests=not arguments.no_digests))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page(records))
    table = Table("run", "steps", "loss", "held out", "bits per byte", "tokens/s", box=None, pad_edge=False)
    for found in summary(records):
        cells = [("loss", ".4f"), ("eval_loss", ".4f"), ("bits_per_byte", ".4f"), ("tokens_per_second", ",.0f")]
        shown = ["" if found[key] is None else f"{found[key]:{form}}" for key, form in cells]
        table.add_row(found["run"], f"{found['steps']:,}", *shown)
    console.print(table)
    console.print(f"written to {out}", markup=False)
