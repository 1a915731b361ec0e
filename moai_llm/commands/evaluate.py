"""Measure a model: perplexity and bits per byte of your text."""

from __future__ import annotations

import argparse

from rich.table import Table

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import make_console


def configure(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="perplexity")
    perplexity = verbs.add_parser("perplexity", help="loss, perplexity and bits per byte, per file and in all")
    perplexity.add_argument("model", help="a model directory or a run")
    add_source_options(perplexity, nargs="*")
    perplexity.add_argument("--text", help="a text to measure instead of files")
    perplexity.add_argument("--window", type=int, help="tokens of context; default the model's")
    add_device(perplexity)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.sources import Skipped, read_texts
    from moai_llm.evaluation.perplexity import Perplexity, evaluate_text
    from moai_llm.inference.load import load_model
    from moai_llm.runtime import MoaiError

    if (arguments.text is None) == (not arguments.sources):
        raise MoaiError("give either files or --text")
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    table = Table("text", "tokens", "bytes", "loss", "perplexity", "bits per byte", box=None, pad_edge=False)
    total = Perplexity(0.0, 0, 0)
    console = make_console()
    sources, reading = open_sources(arguments, console)
    skipped = Skipped(reading.skip_bad)
    groups = {"--text": [(arguments.text, "")]} if arguments.text is not None else {
        source.name: read_texts([source], reading=reading, skipped=skipped) for source in sources
    }  # fmt: skip
    for name, texts in groups.items():
        found = Perplexity(0.0, 0, 0)
        for text, _ in texts:
            if len(model.tokenizer.encode(text)) > 1:
                found += evaluate_text(model, text, arguments.window)
        total += found
        if found.targets:
            table.add_row(name, *_cells(found))
    if not total.targets:
        raise MoaiError("nothing to predict: no text has two tokens")
    if len(groups) > 1:
        table.add_row("all", *_cells(total))
    console.print(table)
    show_skipped(console, skipped)


def _cells(found):
    return (
        f"{found.targets:,}",
        f"{found.bytes:,}",
        f"{found.loss:.4f}",
        f"{found.perplexity:.2f}",
        f"{found.bits_per_byte:.4f}",
    )
