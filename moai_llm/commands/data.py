"""Prepare text or conversations for training, merge, verify and look inside what was prepared."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from moai_llm.commands import conversations, data_clean, data_info, data_merge, data_mine, data_show, data_verify
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
    names = "{" + ",".join(["prepare", "schema", *STORES, "clean", "dedup", "contamination", "mine"]) + "}"
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
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each processor)")
    prepare.add_argument(
        "--shard-tokens", type=int, metavar="N", help="tokens in a file of the store (default 67,108,864)"
    )
    prepare.add_argument(
        "--overwrite", action="store_true", help="replace a store that is there, and what a run with other options left"
    )
    prepare.add_argument(
        "--fresh", action="store_true", help="begin anew instead of going on from a run that was stopped"
    )
    conversations.configure(verbs.add_parser("schema", help="what conversations look like, before they are prepared"))
    for verb, (module, what) in STORES.items():
        module.configure(verbs.add_parser(verb, help=what))
    data_clean.add_verbs(verbs)
    data_mine.configure(verbs.add_parser("mine", help="wrong answers that a model takes for nearly right"))


def run(arguments: argparse.Namespace) -> None:
    {
        "prepare": _prepare,
        "schema": conversations.run,
        **{verb: module.run for verb, (module, _) in STORES.items()},
        "clean": data_clean.run_clean,
        "dedup": data_clean.run_dedup,
        "contamination": data_clean.run_contamination,
        "mine": data_mine.run,
    }[arguments.verb](arguments)


def _prepare(arguments: argparse.Namespace) -> None:
    from moai_llm.data.prepare import prepare
    from moai_llm.data.shards import Store
    from moai_llm.data.writer import SHARD_TOKENS
    from moai_llm.tokenizer import load_tokenizer

    console, tokenizer, code = make_console(), load_tokenizer(arguments.tokenizer), _code_options(arguments)
    kind, options, columns = conversations.read_options(arguments)
    chat, embedding = (None, options) if kind == "embedding" else (options, None)
    sources, reading = open_sources(arguments, console, columns)
    with ReadProgress(console, sources) as shown:
        report = prepare(
            sources,
            tokenizer,
            arguments.out,
            kind=kind,
            chat=chat,  # type: ignore[arg-type]
            embedding=embedding,  # type: ignore[arg-type]
            reading=replace(reading, progress=shown.read),
            valid=arguments.valid,
            valid_share=arguments.valid_share,
            code=code,
            clean=_cleaner(arguments),
            shard_tokens=SHARD_TOKENS if arguments.shard_tokens is None else arguments.shard_tokens,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            fresh=arguments.fresh,
            progress=lambda documents, tokens: shown.update(f"{documents:,} documents, {tokens:,} tokens"),
        )
    show_report(console, report, arguments.out, arguments.valid or "")
    if code is not None:
        console.print(_about_code(report))
    for out in filter(None, (arguments.out, arguments.valid)):
        _warn_of_long_conversations(console, Store(out))
    more = f" data.valid={arguments.valid}" if arguments.valid else ""
    if kind == "preference":
        more += " loss.type=dpo train.init_from=MODEL"
    if kind == "embedding":
        more += " loss.type=info_nce"
    next_step = f"moai train RECIPE data.train={arguments.out}{more}"
    console.print(f"written to {arguments.out}. Next: {next_step}", soft_wrap=True)


def _cleaner(arguments: argparse.Namespace) -> Cleaner | None:
    if arguments.clean is None:
        return None
    from moai_llm.data.clean import Cleaner, load_config

    return Cleaner(load_config(arguments.clean))


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


def show_report(console: Console, report: Report, out: str = "", valid: str = "") -> None:
    """What was read, kept and dropped; with a row for each of two stores."""
    held_out, columns = report.held_out, ("read", "kept", "dropped", "skipped", "tokens", "bytes per token")
    table = Table(*(["store"] if held_out else []), *columns, box=None, pad_edge=False)
    for name, each in ((out, report), (valid, held_out)):
        if each is not None:
            table.add_row(*([name] if held_out else []), *_row(each))
    console.print(table)
    cut = report.cut + (held_out.cut if held_out else 0)
    if cut:
        console.print(f"{cut:,} of those kept were longer than --max-length and lost a part")
    show_skipped(console, report.skipped)


def _row(report: Report) -> list[str]:
    manifest = report.manifest
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items()) or "0"
    documents = manifest.documents // (2 if manifest.kind == "preference" else 1)
    if manifest.kind == "embedding":
        documents = report.read - report.dropped.total()
    counts = (f"{manifest.tokens:,}", f"{manifest.text_bytes / manifest.tokens:.2f}")
    return [f"{report.read:,}", f"{documents:,}", dropped, f"{report.skipped.bad_count:,}", *counts]
