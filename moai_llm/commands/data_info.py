"""moai data info: what is in a store, as a table and as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.table import Table

from moai_llm.recipe import DataConfig, OverlongName, PackingName
from moai_llm.runtime import MoaiError, make_console, write_atomically

if TYPE_CHECKING:
    from moai_llm.data.overview import Overview


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="a prepared store")
    parser.add_argument("--seq-len", type=int, default=1024, help="row length to show the packing of (default 1024)")
    add_packing(parser)
    parser.add_argument("--html", metavar="FILE", help="write a page with plots there, one file that needs no other")


def add_packing(parser: argparse.ArgumentParser) -> None:
    """How documents become rows."""
    default = DataConfig().packing
    parser.add_argument(
        "--packing", choices=get_args(PackingName), default=default, help=f"as data.packing of a recipe ({default})"
    )
    parser.add_argument(
        "--overlong",
        choices=get_args(OverlongName),
        help="as data.overlong of a recipe, for documents longer than a row",
    )


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.overview import look
    from moai_llm.data.shards import Store

    if arguments.html and Path(arguments.html).is_dir():
        raise MoaiError(f"{arguments.html} is a folder: name a file to write")
    store, console = Store(arguments.store), make_console()
    overview = look(store, arguments.seq_len, arguments.packing, arguments.overlong, every=bool(arguments.html))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(overview).items():
        table.add_row(name, value)
    table.add_row("damage", f"none in manifests and sizes; moai data verify {arguments.store} reads everything")
    console.print(table)
    if store.merged:
        console.print()
        console.print(_parts(overview))
    if arguments.html:
        from moai_llm.data.overview_page import page

        Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(arguments.html), page(overview))
        console.print(f"written to {arguments.html}", markup=False, soft_wrap=True)


def _facts(overview: Overview) -> dict[str, str]:
    from moai_llm.data.overview import RANKS

    lengths = overview.lengths
    facts = {
        "kind": overview.kind,
        "documents": f"{overview.documents:,}",
        "tokens": f"{overview.tokens:,}",
        "bytes per token": f"{overview.text_bytes / overview.tokens:.2f}",
        "vocabulary": f"{overview.vocab_size:,}",
        "stored as": overview.dtype,
        "document length": f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, max {lengths.largest:,}",
    }
    if overview.strategy:
        facts["merged"] = f"{len(overview.parts)} stores, {overview.strategy}"
    unit = {"preference": "pairs", "embedding": "records"}.get(overview.kind, "documents")
    for rows in overview.packings[:1]:
        facts[f"rows of {overview.seq_len}"] = f"{rows.rows:,}, {rows.fullness:.1%} full"
        facts[f"{unit} cut"] = f"{rows.cut:,}"
        facts[f"{unit} dropped"] = f"{rows.dropped:,}"
        facts["dropped tokens"] = f"{rows.dropped_tokens:,}"
        if not overview.strategy:
            few = rows.wait is None
            facts["attention wait"] = (
                f"fewer than {RANKS} rows" if few else f"{rows.wait:.0%} of the time with {RANKS} ranks"
            )
    return facts


def _parts(overview: Overview) -> Table:
    table = Table("part", "kind", "documents", "tokens", "share of rows", "epochs", "rows", "full", "cut",
                  box=None, pad_edge=False)  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for part in overview.parts:
        rows = (f"{part.rows.rows:,}", f"{part.rows.fullness:.1%}", f"{part.rows.cut:,}") if part.rows else ()
        counts = f"{part.documents:,}", f"{part.tokens:,}", f"{part.share:.1%}", f"{part.epochs:.2f}"
        table.add_row(part.name, part.kind, *counts, *rows)
    return table
