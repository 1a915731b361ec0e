"""How well a model's vectors of texts find what belongs together, beside simple ways to do it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from moai_llm.commands.eval_vectors import add_common, read, vectors_of, write
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.evaluation.ranking import Retrieval

KS = (1, 5, 10)


def configure(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--tfidf", action="store_true", help="beside TF-IDF over characters, which knows spelling and nothing else"
    )


def run(arguments: argparse.Namespace) -> None:
    """Each anchor looks for its right answers among the right and wrong answers of all records."""
    from moai_llm.evaluation.embedding import as_search
    from moai_llm.evaluation.ranking import from_ranks, ranks_of, retrieval
    from moai_llm.evaluation.tfidf import tfidf_scores

    console = make_console()
    search = as_search(read(arguments, console))
    if not search.queries:
        raise MoaiError("none of the records has a right answer to look for")
    found: dict[str, Retrieval] = {}
    for name in (arguments.model, *arguments.beside):
        vectors = vectors_of(name, [*search.queries, *search.documents], arguments, console)
        queries, documents = vectors[: len(search.queries)], vectors[len(search.queries) :]
        found[name] = retrieval(queries, documents, search.relevant, KS)
    if arguments.tfidf:
        scores = tfidf_scores(search.queries, search.documents)
        ranks = [ranks_of(row, relevant) for row, relevant in zip(scores, search.relevant)]
        found["TF-IDF"] = from_ranks(ranks, len(search.documents), KS)
    table = Table("", *(f"recall@{k}" for k in KS), "MRR", "nDCG@10", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, each in found.items():
        table.add_row(name, *(f"{each.recall[k]:.4f}" for k in KS), f"{each.mrr:.4f}", f"{each.ndcg[10]:.4f}")
    any_one = next(iter(found.values()))
    table.add_row("chance", *(f"{any_one.chance[k]:.4f}" for k in KS), "", "")
    console.print(f"{any_one.queries:,} queries, {any_one.documents:,} documents")
    console.print(table)
    write(arguments.json, {name: vars(each) for name, each in found.items()})
