"""`moai eval retrieval` and `moai eval sts`: how good a model's vectors of texts are, beside simple ways to do it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from moai_llm.commands.embed import add_length, check_length, progress_of, warn_untrained
from moai_llm.commands.generate import add_device
from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from moai_llm.data.embedding_records import Related
    from moai_llm.evaluation.ranking import Retrieval

KS = (1, 5, 10)


def configure_retrieval(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument(
        "--tfidf", action="store_true", help="beside TF-IDF over characters, which knows spelling and nothing else"
    )


def configure_sts(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    parser.add_argument("--score-max", type=float, default=1.0, metavar="N", help="the largest grade (default 1)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    add_source_options(parser)
    parser.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="another model to measure; once for each"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    add_length(parser)
    add_device(parser)


def run_retrieval(arguments: argparse.Namespace) -> None:
    """Each anchor looks for its right answers among the right and wrong answers of all records."""
    from moai_llm.evaluation.embedding import as_search
    from moai_llm.evaluation.ranking import from_ranks, ranks_of, retrieval
    from moai_llm.evaluation.tfidf import tfidf_scores

    console = make_console()
    search = as_search(_records(arguments, console))
    if not search.queries:
        raise MoaiError("none of the records has a right answer to look for")
    found: dict[str, Retrieval] = {}
    for name in (arguments.model, *arguments.beside):
        vectors = _vectors(name, [*search.queries, *search.documents], arguments, console)
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
    _write(arguments.json, {name: vars(each) for name, each in found.items()})


def run_sts(arguments: argparse.Namespace) -> None:
    """How well the cosines of pairs follow the grades that people gave them."""
    from moai_llm.evaluation.embedding import as_graded, cosines
    from moai_llm.evaluation.ranking import pearson, spearman

    console = make_console()
    graded = as_graded(_records(arguments, console, arguments.score_max))
    if len(graded.score) < 2:
        raise MoaiError("fewer than two pairs have a grade; name its column, as in --map score=grade")
    table = Table("", "Spearman", "Pearson", box=None, pad_edge=False)
    found = {}
    for name in (arguments.model, *arguments.beside):
        vectors = _vectors(name, [*graded.first, *graded.second], arguments, console)
        alike = cosines(*(vectors[: len(graded.first)], vectors[len(graded.first) :]))
        found[name] = {"spearman": spearman(alike, graded.score), "pearson": pearson(alike, graded.score)}
        table.add_row(name, *(f"{value:.4f}" for value in found[name].values()))
    console.print(f"{len(graded.score):,} pairs")
    console.print(table)
    _write(arguments.json, found)


def _records(arguments: argparse.Namespace, console: Console, score_max: float = 1.0) -> list[Related]:
    from moai_llm.data.embedding_records import COLUMNS, EmbeddingOptions, read_related
    from moai_llm.data.sources import Skipped, read_records

    check_length(arguments.max_length)
    sources, reading = open_sources(arguments, console, COLUMNS)
    skipped = Skipped(reading.skip_bad)
    records = read_records(sources, reading, skipped=skipped)
    found = [r for r, _ in read_related(records, skipped, reading.mapping, EmbeddingOptions(score_max=score_max))]
    show_skipped(console, skipped)
    return found


def _vectors(name: str, texts: list[str], arguments: argparse.Namespace, console: Console) -> np.ndarray:
    from moai_llm.inference.embed import embed, load_embedder

    embedder = load_embedder(name, arguments.device, arguments.dtype)
    warn_untrained(console, embedder)
    with progress_of(console, len(texts)) as done:
        return embed(embedder, texts, max_length=arguments.max_length, progress=done)


def _write(file: str | None, found: Mapping[str, Any]) -> None:
    if file:
        write_atomically(Path(file), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
