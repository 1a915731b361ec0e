"""moai data merge: stores as one, each with its share of the rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.data.merge import MergeSpec

OFTEN = 4  # epochs up to which repeated data is about as good as new (arXiv 2305.16264)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stores", nargs="*", help="prepared stores, of one tokenizer; merged ones count as their parts")
    parser.add_argument("--out", required=True, help="the merged store to write: a manifest, no data is copied")
    parser.add_argument(
        "--strategy", choices=("weighted", "equal", "proportional", "temperature"),
        help="how the shares of the rows come about: by --weights, equal for each store (default), by its tokens, or "
        "by its tokens to the power of 1/temperature",
    )  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each store, of any sum")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="1 is proportional, larger is more equal (default 2)"
    )
    parser.add_argument(
        "--spec", metavar="FILE", help="read all that from JSON or YAML: paths, weights, merge_strategy, temperature"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.merge import epochs, merge
    from moai_llm.data.overview import short_name

    store = merge(_spec(arguments), arguments.out, overwrite=arguments.overwrite)
    console, parts = make_console(), store.parts()
    shares = epochs(parts)
    table = Table(
        "part", "kind", "documents", "tokens", "share of rows", "epochs in one of all", "until one is used up",
        box=None, pad_edge=False,
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for part, share in zip(parts, shares):
        manifest = part.store.manifest
        numbers = f"{manifest.documents:,}", f"{manifest.tokens:,}", f"{part.weight:.1%}"
        table.add_row(
            short_name(part.store, parts), manifest.kind, *numbers, f"{share.whole:.2f}", f"{share.first:.2f}"
        )
    manifest = store.manifest
    table.add_row("all", manifest.kind, f"{manifest.documents:,}", f"{manifest.tokens:,}", "100.0%", "1.00", "")
    console.print(table)
    for part, share in zip(parts, shares):
        if share.whole > OFTEN:
            console.print(
                f"{part.store.path} is read {share.whole:.1f} times in an epoch of all. "
                f"Beyond {OFTEN} times the same text teaches less and less: --strategy temperature lies between equal "
                "and proportional",
                markup=False,
                soft_wrap=True,
            )
    if {part.store.manifest.kind for part in parts} == {"text", "chat"}:
        console.print("texts are learned whole, of conversations what their masks say")
    if manifest.kind == "preference":
        console.print(f"written to {arguments.out}. Look at it: moai data show {arguments.out} 0", markup=False)
        return
    console.print(f"written to {arguments.out}. Next: moai train RECIPE data.train={arguments.out}", markup=False)


def _spec(arguments: argparse.Namespace) -> MergeSpec:
    from moai_llm.data.merge import make_spec, read_spec

    given = (arguments.strategy, arguments.weights, arguments.temperature)
    if arguments.spec is None:
        if not arguments.stores:
            raise MoaiError("name the stores to merge, or a file with --spec")
        return make_spec(arguments.stores, *given)
    if arguments.stores or any(value is not None for value in given):
        raise MoaiError(f"{arguments.spec} names the stores and their weights: give them there or here, not both")
    return read_spec(Path(arguments.spec))
