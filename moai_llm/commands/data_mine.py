"""`moai data mine`: give records of texts that belong together wrong answers which a model takes for nearly right."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moai_llm.commands.embed import add_length, check_length, progress_of, warn_untrained
from moai_llm.commands.sampling import add_device
from moai_llm.commands.sources import add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console, write_atomically


def configure(parser: argparse.ArgumentParser) -> None:
    add_source_options(parser)
    parser.add_argument("--model", required=True, help="a model directory or a run, to tell what is alike")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the records with their wrong answers")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="wrong answers to add (default 5)")
    parser.add_argument(
        "--margin", type=float, default=0.05, metavar="COSINE",
        help="leave out what is not less alike than the best right answer by so much (default 0.05)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    add_length(parser)
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.embedding_records import COLUMNS, read_related
    from moai_llm.data.sources import Skipped, read_records
    from moai_llm.inference.embed import load_embedder
    from moai_llm.inference.mine import mine

    console, out = make_console(), Path(arguments.out)
    if out.suffix != ".jsonl":
        raise MoaiError(f"--out {out}: records are written as .jsonl")
    if out.exists() and not arguments.overwrite:
        raise MoaiError(f"{out} exists already: choose another place or pass --overwrite")
    if arguments.count < 1:
        raise MoaiError(f"--count {arguments.count}: at least one wrong answer")
    check_length(arguments.max_length)
    sources, reading = open_sources(arguments, console, COLUMNS)
    skipped = Skipped(reading.skip_bad)
    records = [r for r, _ in read_related(read_records(sources, reading, skipped=skipped), skipped, reading.mapping)]
    show_skipped(console, skipped)
    if not any(record.right for record in records):
        raise MoaiError("none of the records has a right answer, from which wrong ones could be told")
    embedder = load_embedder(arguments.model, arguments.device, arguments.dtype)
    warn_untrained(console, embedder)
    texts = len({text for r in records for text in (r.anchor, *r.right, *r.wrong)})
    lines, added = [], 0
    with progress_of(console, texts) as done:
        mined = mine(embedder, records, count=arguments.count, margin=arguments.margin,
                     max_length=arguments.max_length, progress=done)  # fmt: skip
        for before, record in zip((r for r in records if r.right), mined):
            added += len(record.wrong) - len(before.wrong)
            line = {"anchor": record.anchor, "positive": list(record.right), "negative": list(record.wrong)}
            graded = {} if record.score is None else {"score": record.score}
            lines.append(json.dumps({**line, **graded}, ensure_ascii=False) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(lines))
    console.print(
        f"{len(lines):,} records, {added:,} wrong answers added: {out}. "
        f"Next: moai data prepare {out} --embedding --tokenizer {embedder.path} --out STORE", soft_wrap=True,
    )  # fmt: skip
