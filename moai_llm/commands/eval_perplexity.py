"""Loss, perplexity and bits per byte of text, by file, by language and in all."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.table import Table

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.evaluation.corpus import Corpus
    from moai_llm.inference import TextModel


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    add_source_options(parser, nargs="*")
    parser.add_argument("--text", help="a text to measure instead of files")
    add_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results, and those of each document, as JSON")
    add_device(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """How text is measured."""
    parser.add_argument("--window", type=int, help="tokens of context; default the model's")
    parser.add_argument(
        "--stride", type=int,
        help="begin a window every so many tokens, so that each token has at least WINDOW - STRIDE before it (default: "
        "the window; smaller is slower and nearer to what the model can do)",
    )  # fmt: skip
    parser.add_argument(
        "--language", default="auto", metavar="auto|folder|CODE",
        help="auto: by script, and by py3langid where it is installed; folder: the name of each file's folder; else "
        "the language of all",
    )  # fmt: skip
    parser.add_argument("--batch-tokens", type=int, help="tokens that go through the model at once")


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.inference import load_model

    if (arguments.text is None) == (not arguments.sources):
        raise MoaiError("give either files or --text")
    console = make_console()
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    corpus = measure_sources(model, arguments)
    table = Table(
        "text", "documents", "tokens", "bytes", "loss", "perplexity", "bits per byte", "95 % interval", box=None,
        pad_edge=False,
    )  # fmt: skip
    for name, items in corpus.groups().items():
        table.add_row(*_cells(name, items))
    console.print(table)
    if arguments.json:
        settings = {"window": arguments.window or model.context, "stride": arguments.stride}
        corpus.results(model, settings).save(arguments.json)
        console.print(f"written to {arguments.json}", markup=False, soft_wrap=True)


def measure_sources(model: TextModel, arguments: argparse.Namespace) -> Corpus:
    """Every text that the arguments name; how far it is, and what was not read, is shown.

    Raises:
        MoaiError: there is nothing to predict.
    """
    from moai_llm.data.sources import Skipped, read_texts
    from moai_llm.evaluation.corpus import Corpus, language_of
    from moai_llm.evaluation.perplexity import measure

    console = make_console()
    corpus, language = Corpus(), language_of(arguments.language)
    text = getattr(arguments, "text", None)
    sources, reading = ([], None) if text is not None else open_sources(arguments, console)
    skipped = Skipped(arguments.skip_bad)

    def texts():
        if text is not None:
            yield text, "--text"
        for source in sources:
            for found, _ in read_texts([source], reading=reading, skipped=skipped):
                yield found, source.name

    with ReadProgress(console, []) as bar:
        documents = measure(
            model,
            texts(),
            window=arguments.window,
            stride=arguments.stride,
            batch_tokens=arguments.batch_tokens,
            progress=lambda tokens: bar.update(f"measuring {model.path.name}: {tokens:,} tokens"),
        )
        for document in documents:
            corpus.add(document, document.given, language(document.text, document.given))
    show_skipped(console, skipped)
    if not corpus.items:
        raise MoaiError("nothing to predict: no text has two tokens")
    return corpus


def _cells(name, items):
    from moai_llm.evaluation.corpus import scores_of, total

    found = total(items)
    bits = next(score for score in scores_of(name, items) if score.metric == "bits_per_byte")
    return (
        name,
        f"{len(items):,}",
        f"{found.targets:,}",
        f"{found.bytes:,}",
        f"{found.loss:.4f}",
        f"{found.perplexity:.2f}",
        f"{found.bits_per_byte:.4f}",
        f"{bits.low:.4f} to {bits.high:.4f}" if bits.low is not None else "one document",
    )
