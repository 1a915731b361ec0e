"""What the experts of a model do with text: load, specialisation by language, file and kind of token, who is chosen
together. As tables, as one HTML page with maps, and as JSON.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.runtime import make_console, write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run, with sparse layers")
    add_source_options(parser)
    parser.add_argument(
        "--language", default="auto", metavar="auto|folder|CODE", help="of the texts, as for `moai eval perplexity`"
    )
    parser.add_argument("--batch-tokens", type=int, help="tokens that go through the model at once")
    parser.add_argument("--html", metavar="FILE", help="write one page with maps")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sources import Skipped, read_texts
    from moai_llm.evaluation import experts, experts_report
    from moai_llm.evaluation.corpus import language_of
    from moai_llm.inference import load_model

    console = make_console()
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    experts.empty(model.model)  # refuses a model without experts before anything is read
    language = language_of(arguments.language)
    sources, reading = open_sources(arguments, console)
    skipped = Skipped(reading.skip_bad)

    def texts():
        for source in sources:
            for text, _ in read_texts([source], reading=reading, skipped=skipped):
                yield text, {"file": source.name, "language": language(text, source.name)}

    with ReadProgress(console, []) as bar:
        counts = experts.observe(
            model,
            texts(),
            batch_tokens=arguments.batch_tokens,
            progress=lambda tokens: bar.update(f"looking at the routers: {tokens:,} tokens"),
        )
    show_skipped(console, skipped)
    found = experts_report.results(model, counts, {"language": arguments.language})
    details = found.details
    layers = [experts.Layer(**layer) for layer in details["layers"]]
    console.print(f"{counts.tokens:,} tokens of {len(counts.labels):,} documents")
    console.print(f"{counts.experts} experts in each sparse layer, {counts.k} for each token")
    _show(console, *experts_report.load_table(layers))
    for kind, about in details["specialisation"].items():
        console.print(f"\nwhat an expert tells of the {kind} (0 nothing, 1 all), and the expert that likes it most:")
        columns, rows = experts_report.information_table(about, layers)
        favourites = [_favourites(about, i) for i in range(len(layers))]
        _show(console, [*columns, "expert (times as often as in all text)"],
              [(name, [*cells, liked]) for (name, cells), liked in zip(rows, favourites)])  # fmt: skip
    for path, write in ((arguments.html, lambda: experts_report.page(found)), (arguments.json, None)):
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(path), write()) if write else found.save(path)
            console.print(f"written to {path}", markup=False, soft_wrap=True)


def _favourites(about, layer):
    """Of the labels with the most choices, the expert that each likes most."""
    sizes = [sum(row) for row in about["choices"][layer]]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])[:6]
    parts = []
    for i in order:
        row = about["lift"][layer][i]
        best = max(range(len(row)), key=row.__getitem__)
        parts.append(f"{about['labels'][i].rpartition('/')[2]}: {best} ({row[best]:.1f})")
    return ", ".join(parts)


def _show(console, columns, rows):
    table = Table(*columns, box=None, pad_edge=False)
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)
