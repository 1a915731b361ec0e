"""Prepare text or conversations for training, merge, verify and look inside what was prepared."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moai_llm.commands import conversations, data_clean, data_info, data_merge, data_show, data_verify
from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.recipe import DataConfig
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.data.clean import Cleaner
    from moai_llm.data.code import CodeOptions
    from moai_llm.data.prepare import Report
    from moai_llm.data.shards import Store


# verb -> (what adds its arguments and runs it, what it does), of those that work on prepared stores
STORES = {
    "merge": (data_merge, "several stores as one, each with its share of the rows; nothing is copied"),
    "verify": (data_verify, "whether stores are what they were when they were written"),
    "info": (data_info, "what is in a store"),
    "show": (data_show, "decode packed rows: documents in colours, what is not learned in grey"),
}


def configure(parser: argparse.ArgumentParser) -> None:
    names = "{" + ",".join(["prepare", "schema", *STORES, "clean", "dedup", "contamination"]) + "}"
    verbs = parser.add_subparsers(dest="verb", required=True, metavar=names)
    prepare = verbs.add_parser("prepare", help="tokenise sources into a store")
    add_source_options(prepare)
    prepare.add_argument("--tokenizer", required=True, help="a tokenizer or model directory, or o200k_base")
    prepare.add_argument("--out", required=True, help="the store to write")
    conversations.add_options(prepare)
    prepare.add_argument("--valid", help="a second store, for what is held out for evaluation")
    prepare.add_argument(
        "--valid-share", type=float, default=0.02, help="the share of the documents that --valid gets (default 0.02)"
    )
    prepare.add_argument(
        "--fim",
        type=float,
        metavar="RATE",
        help="share of the documents of source code to rearrange: fill in the middle",
    )
    prepare.add_argument(
        "--fim-order", choices=("both", "psm", "spm"), default="both", help="prefix or suffix first (default both)"
    )
    prepare.add_argument(
        "--code-chunk", type=int, metavar="TOKENS", help="cut source code longer than this between statements"
    )
    prepare.add_argument(
        "--code-language", metavar="NAME", help="language of records whose file has no suffix that tells, e.g. python"
    )
    prepare.add_argument(
        "--clean", metavar="YAML", help="clean the text first by these rules, see `moai data clean`; `default` for ours"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace a store that is there")
    conversations.configure(verbs.add_parser("schema", help="what conversations look like, before they are prepared"))
    for verb, (module, what) in STORES.items():
        module.configure(verbs.add_parser(verb, help=what))
    data_clean.add_verbs(verbs)


def run(arguments: argparse.Namespace) -> None:
    {
        "prepare": _prepare,
        "schema": conversations.run,
        **{verb: module.run for verb, (module, _) in STORES.items()},
        "clean": data_clean.run_clean,
        "dedup": data_clean.run_dedup,
        "contamination": data_clean.run_contamination,
    }[arguments.verb](arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from moai_llm.data.prepare import Part, prepare
    from moai_llm.data.shards import Store, refuse_existing
    from moai_llm.tokenizer import load_tokenizer

    console, tokenizer, code = make_console(), load_tokenizer(arguments.tokenizer), _code_options(arguments)
    kind, chat, columns = conversations.read_options(arguments)
    sources, reading = open_sources(arguments, console, columns)
    if arguments.valid and any(source.once for source in sources):
        raise MoaiError("standard input can be read once, and --valid reads the sources twice: write it to a file")
    parts: list[tuple[Part | None, str]] = [(None, arguments.out)]
    if arguments.valid:
        parts = [("valid", arguments.valid), ("train", arguments.out)]
    for _, out in parts:
        refuse_existing(Path(out), arguments.overwrite)
    cleaner = _cleaner(arguments)
    for part, out in parts:
        with ReadProgress(console, sources) as shown:
            report = prepare(
                sources,
                tokenizer,
                out,
                kind=kind,
                chat=chat,
                reading=replace(reading, progress=shown.read),
                part=part,
                valid_share=arguments.valid_share,
                code=code,
                clean=cleaner,
                overwrite=arguments.overwrite,
                progress=lambda documents, tokens: shown.update(f"{documents:,} documents, {tokens:,} tokens"),
            )
        if part:
            console.print(f"{part}: {out}")
        show_report(console, report)
        if code is not None:
            console.print(_about_code(report))
        _warn_of_long_conversations(console, Store(out))
    more = f" data.valid={arguments.valid}" if arguments.valid else ""
    if kind == "preference":
        more += " loss.type=dpo train.init_from=MODEL"
    next_step = f"moai train RECIPE data.train={arguments.out}{more}"
    console.print(f"written to {arguments.out}. Next: {next_step}", soft_wrap=True)


def _cleaner(arguments: argparse.Namespace) -> Cleaner | None:
    from moai_llm.data.clean import Cleaner, load_config

    return None if arguments.clean is None else Cleaner(load_config(arguments.clean))


def _code_options(arguments: argparse.Namespace) -> CodeOptions | None:
    from moai_llm.data.code import CodeOptions
    from moai_llm.tokenizer.fim import Fim

    fim = None if arguments.fim is None else Fim(arguments.fim, arguments.fim_order)
    if fim is None and arguments.fim_order != "both":
        raise MoaiError("--fim-order does nothing without --fim RATE")
    if fim is None and arguments.code_chunk is None:
        if arguments.code_language:
            raise MoaiError("--code-language does nothing without --fim or --code-chunk")
        return None
    return CodeOptions(fim, arguments.code_chunk, arguments.code_language)


def _about_code(report: Report) -> str:
    if not report.code:
        return (
            "none of the documents is source code: their files have no suffix of a known language. "
            "Name the language with --code-language"
        )
    return f"documents of source code: {report.code:,}; rearranged to fill in the middle: {report.filled:,}"


def _warn_of_long_conversations(console: Console, store: Store) -> None:
    default, lengths = DataConfig().seq_len, store.lengths()
    long = int((lengths > default).sum())
    if store.manifest.kind == "chat" and long:
        console.print(
            f"{long:,} of {len(store):,} conversations are longer than {default:,} tokens, the default data.seq_len: "
            f"rows that are shorter cut their end off. The longest has {lengths.max():,}. --max-length TOKENS "
            "--truncate turns leaves out their oldest turns instead."
        )


def show_report(console: Console, report: Report) -> None:
    """What was read, kept and dropped."""
    manifest = report.manifest
    table = Table("read", "kept", "dropped", "skipped", "tokens", "bytes per token", box=None, pad_edge=False)
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "0"
    ratio = manifest.text_bytes / manifest.tokens
    skipped = f"{report.skipped.bad_count:,}"
    documents = manifest.documents // (2 if manifest.kind == "preference" else 1)
    kept, tokens = f"{documents:,}", f"{manifest.tokens:,}"
    table.add_row(f"{report.read:,}", kept, dropped, skipped, tokens, f"{ratio:.2f}")
    console.print(table)
    if report.cut:
        console.print(f"{report.cut:,} of those kept were longer than --max-length and lost a part")
    show_skipped(console, report.skipped)
