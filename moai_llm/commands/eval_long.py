"""What is left of a long context: a pass key found again by length and depth, and, with text, loss by position."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console, write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory or a run")
    add_source_options(parser, nargs="*")
    parser.add_argument("--context", type=int, help="the longest prompt (default: the context of the model)")
    parser.add_argument(
        "--rope", help="stretch RoPE to --context by yarn, linear, dynamic or ntk (default: leave it as it is)"
    )
    parser.add_argument("--lengths", metavar="N,...", help="of prompts (default: powers of two up to --context)")
    parser.add_argument(
        "--depths", default="0,0.25,0.5,0.75,1", metavar="X,...", help="where the key stands, from 0 to 1"
    )
    parser.add_argument("--languages", default="en,ko", help="of the prompts (default en,ko)")
    parser.add_argument("--trials", type=int, default=5, help="keys for each length and depth (default 5)")
    parser.add_argument("--rows", type=int, default=16, help="sequences of text for the loss by position (default 16)")
    parser.add_argument("--buckets", type=int, default=16, help="stretches of positions (default 16)")
    parser.add_argument("--piece", type=int, default=1024, help="tokens through the model at once (default 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the keys (default 0)")
    parser.add_argument("--html", metavar="FILE", help="write one page with pictures")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.evaluation import long_context, long_report
    from moai_llm.inference import load_model

    for name in ("trials", "rows", "buckets", "piece"):
        if getattr(arguments, name) < 1:
            raise MoaiError(f"--{name} {getattr(arguments, name)} is too small")
    console = make_console()
    depths = _numbers("--depths", arguments.depths, float)
    if not all(0 <= depth <= 1 for depth in depths):
        raise MoaiError(f"--depths {arguments.depths}: each from 0, the beginning, to 1, the end")
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    trained, context = model.context, arguments.context or model.context
    if context < 2:
        raise MoaiError(f"--context {context} is too small")
    if context != trained or arguments.rope:
        model = long_context.extend(model, context, arguments.rope)
    lengths = _numbers("--lengths", arguments.lengths, int) if arguments.lengths else _powers(context)
    if max(lengths) > context:
        raise MoaiError(f"--lengths {max(lengths)} is more than the context, {context}: --context {max(lengths)}")
    languages = [name for name in arguments.languages.split(",") if name]
    rows, single = _rows(model, arguments, context, console) if arguments.sources else ([], True)
    buckets = []
    with ReadProgress(console, []) as bar:
        cells = long_context.passkey(
            model.tokenizer,
            long_context.predictor(model, arguments.piece),
            lengths,
            depths,
            languages=languages,
            trials=arguments.trials,
            seed=arguments.seed,
            progress=lambda done, total: bar.update(f"pass keys: {done:,} of {total:,}"),
        )
        if rows:
            buckets = long_context.by_position(
                model,
                rows,
                buckets=arguments.buckets,
                piece=arguments.piece,
                progress=lambda done, total: bar.update(f"loss by position: {done:,} of {total:,} sequences"),
            )
    settings = {
        "context": context, "rope": arguments.rope, "lengths": lengths, "depths": depths, "languages": languages,
        "trials": arguments.trials, "seed": arguments.seed, "sequences_are_documents": single if buckets else None,
    }  # fmt: skip
    found = long_report.results(model, cells, buckets, trained, settings)
    console.print("keys found, by where they stand")
    _show(console, *long_report.passkey_table(cells))
    for text in long_report.warnings(found):
        console.print(text, markup=False, soft_wrap=True)
    if buckets:
        what = "of one document each" if single else "made of documents one after the other, for none is as long"
        console.print(f"\nloss by position, {len(rows)} sequences of {context:,} tokens {what}")
        _show(console, *long_report.position_table(buckets))
    for path in filter(None, (arguments.html, arguments.json)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if path == arguments.html:
            write_atomically(Path(path), long_report.page(found))
        else:
            found.save(path)
        console.print(f"written to {path}", markup=False, soft_wrap=True)


def _rows(model, arguments, context, console):
    from moai_llm.data.sources import Skipped, read_texts
    from moai_llm.evaluation.long_context import sequences

    sources, reading = open_sources(arguments, console)
    skipped = Skipped(reading.skip_bad)
    texts = (text for text, _ in read_texts(sources, reading=reading, skipped=skipped))
    rows, single = sequences(model.tokenizer, texts, context, arguments.rows)
    show_skipped(console, skipped)
    if not rows:
        raise MoaiError(f"the text has fewer than {context:,} tokens: give more, or a smaller --context")
    return rows, single


def _powers(context: int) -> list[int]:
    """From 128 tokens on, and the context itself."""
    found = [1 << i for i in range(7, 31) if 1 << i < context]
    return [*found, context]


def _numbers(option, text, kind):
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise MoaiError(f"{option} {text}: numbers with commas between them") from None


def _show(console, columns, rows):
    table = Table(*columns, box=None, pad_edge=False)
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)
