"""Compare two models on the same documents: a paired bootstrap over documents, of two result files or of two models."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from moai_llm.commands.eval_perplexity import add_options, measure_sources
from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import add_source_options
from moai_llm.runtime import MoaiError, make_console


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="a JSON file of `moai eval perplexity` or `moai eval tasks`, or a model")
    parser.add_argument("b", help="another of the same kind; what is shown is A - B")
    add_source_options(parser, nargs="*")
    add_options(parser)
    parser.add_argument("--resamples", type=int, default=10_000, help="how often to draw the documents (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--json", metavar="FILE", help="write the comparison as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.evaluation.compare import FEW, compare_results
    from moai_llm.evaluation.results import Results, Score, read_results

    if arguments.resamples < 100:
        raise MoaiError(f"--resamples {arguments.resamples}: fewer than 100 say nothing about a 95 % interval")
    files = [Path(name).suffix == ".json" for name in (arguments.a, arguments.b)]
    if files[0] != files[1]:
        raise MoaiError("compare two JSON files, or two models on the same sources")
    if files[0] and arguments.sources:
        raise MoaiError("two JSON files need no sources: their documents are in them")
    if not files[0] and not arguments.sources:
        raise MoaiError(f"give the sources to compare {arguments.a} and {arguments.b} on, or two JSON files")
    a, b = (read_results(n) if files[0] else _measured(n, arguments) for n in (arguments.a, arguments.b))
    found = compare_results(a, b, resamples=arguments.resamples, seed=arguments.seed)
    console = make_console()
    table = Table(
        "task", "metric", "documents", "A", "B", "A - B", "95 % interval", "p", "A better on", box=None, pad_edge=False
    )
    for one in found:
        table.add_row(
            one.task, one.metric, f"{one.documents:,}", f"{one.a:.4f}", f"{one.b:.4f}", f"{one.difference:+.4f}",
            f"{one.low:+.4f} to {one.high:+.4f}", f"{one.p:.4f}", f"{one.wins:.1%}",
        )  # fmt: skip
    console.print(table)
    if len(found) > 10:
        by_chance = 0.05 * len(found)
        console.print(f"{len(found)} comparisons: about {by_chance:.0f} of them are below p = 0.05 by chance alone")
    if any(one.documents < FEW for one in found):
        console.print(f"fewer than {FEW} documents: their intervals are too narrow and their p too small to rely on")
    if a.settings != b.settings:
        console.print(f"A and B were measured differently: {a.settings} and {b.settings}", markup=False, soft_wrap=True)
    if arguments.json:
        scores = [
            Score(c.task, f"{c.metric}, A - B", c.difference, c.documents, None, c.low, c.high, c.higher_is_better)
            for c in found
        ]
        settings = {"resamples": arguments.resamples, "seed": arguments.seed}
        details = {"comparisons": [asdict(c) for c in found]}
        Results("compare", [*a.models, *b.models], settings, scores, details=details).save(arguments.json)
        console.print(f"written to {arguments.json}", markup=False, soft_wrap=True)


def _measured(path: str, arguments: argparse.Namespace):
    from moai_llm.inference import load_model

    model = load_model(path, arguments.device, arguments.dtype)
    settings = {"window": arguments.window or model.context, "stride": arguments.stride}
    return measure_sources(model, arguments).results(model, settings)
