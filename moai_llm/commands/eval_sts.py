"""How well a model's vectors of texts follow the grades that people gave to pairs."""

from __future__ import annotations

import argparse

from rich.table import Table

from moai_llm.commands.eval_vectors import add_common, read, vectors_of, write
from moai_llm.runtime import MoaiError, make_console


def configure(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--score-max", type=float, default=1.0, metavar="N", help="the largest grade (default 1)")


def run(arguments: argparse.Namespace) -> None:
    """How well the cosines of pairs follow the grades that people gave them."""
    from moai_llm.evaluation.embedding import as_graded, cosines
    from moai_llm.evaluation.ranking import pearson, spearman

    console = make_console()
    graded = as_graded(read(arguments, console, arguments.score_max))
    if len(graded.score) < 2:
        raise MoaiError("fewer than two pairs have a grade; name its column, as in --map score=grade")
    table = Table("", "Spearman", "Pearson", box=None, pad_edge=False)
    found = {}
    for name in (arguments.model, *arguments.beside):
        vectors = vectors_of(name, [*graded.first, *graded.second], arguments, console)
        alike = cosines(*(vectors[: len(graded.first)], vectors[len(graded.first) :]))
        found[name] = {"spearman": spearman(alike, graded.score), "pearson": pearson(alike, graded.score)}
        table.add_row(name, *(f"{value:.4f}" for value in found[name].values()))
    console.print(f"{len(graded.score):,} pairs")
    console.print(table)
    write(arguments.json, found)
