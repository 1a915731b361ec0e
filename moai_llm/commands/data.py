"""Prepare text or conversations for training, and look inside what was prepared."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moai_llm.commands import conversations, data_clean
from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.recipe import DataConfig, OverlongName, PackingName
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.data.clean import Cleaner
    from moai_llm.data.code import CodeOptions
    from moai_llm.data.loader import Loader
    from moai_llm.data.pair_loader import PairLoader
    from moai_llm.data.prepare import Report
    from moai_llm.data.shards import Store


RANKS = 8  # for which `info` says how even the work is


def configure(parser: argparse.ArgumentParser) -> None:
    names = "{prepare,schema,info,show,clean,dedup,contamination}"
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
    info = verbs.add_parser("info", help="what is in a store")
    info.add_argument("store", help="a prepared store")
    info.add_argument("--seq-len", type=int, default=1024, help="row length to show the packing of")
    _add_packing(info)
    show = verbs.add_parser("show", help="decode packed rows: documents in colours, what is not learned in grey")
    show.add_argument("store", help="a prepared store")
    show.add_argument("row", type=int, nargs="?", default=0, help="which row, counted from 0 (default 0)")
    show.add_argument("--seq-len", type=int, default=256, help="tokens in a row (default 256)")
    _add_packing(show)
    data_clean.add_verbs(verbs)


def _add_packing(parser: argparse.ArgumentParser) -> None:
    default = DataConfig().packing
    parser.add_argument(
        "--packing", choices=get_args(PackingName), default=default, help=f"as data.packing of a recipe ({default})"
    )
    parser.add_argument(
        "--overlong",
        choices=get_args(OverlongName),
        help="as data.overlong of a recipe, for documents longer than a row",
    )


def run(arguments: argparse.Namespace) -> None:
    {
        "prepare": _prepare,
        "schema": conversations.run,
        "info": _info,
        "show": _show,
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


def _info(arguments: argparse.Namespace) -> None:
    store = _open(arguments.store)
    manifest, lengths = store.manifest, store.lengths()
    ordered = sorted(lengths)
    typical = ", ".join(f"p{q} {ordered[min(len(ordered) - 1, len(ordered) * q // 100)]:,}" for q in (50, 90, 99))
    facts = {
        "kind": manifest.kind,
        "documents": f"{len(store):,}",
        "tokens": f"{manifest.tokens:,}",
        "bytes per token": f"{manifest.text_bytes / manifest.tokens:.2f}",
        "vocabulary": f"{manifest.vocab_size:,}",
        "stored as": manifest.dtype,
        "document length": f"{typical}, max {ordered[-1]:,}",
        **_facts_of_rows(store, arguments),
        "damage": "; ".join(store.problems()) or "none",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    make_console().print(table)


def _facts_of_rows(store: Store, arguments: argparse.Namespace) -> dict[str, str]:
    from moai_llm.data.loader import Loader
    from moai_llm.data.pair_loader import PairLoader

    make = PairLoader if store.manifest.kind == "preference" else Loader
    loader = make(store, arguments.seq_len, packing=arguments.packing, overlong=arguments.overlong, step_rows=RANKS)
    packing = loader.packing
    return {
        f"rows of {arguments.seq_len}": f"{len(loader):,}, {packing.efficiency:.1%} full",
        f"{packing.unit} cut": f"{packing.cut_documents:,}",
        f"{packing.unit} dropped": f"{packing.dropped_documents:,}",
        "dropped tokens": f"{packing.dropped_tokens:,}",
        "attention wait": _attention_wait(loader),
    }


def _attention_wait(loader: Loader | PairLoader) -> str:
    """How much longer than needed attention takes where `RANKS` ranks do one row each and wait for each other."""
    import numpy as np

    from moai_llm.data.balance import imbalance, rows_of_stream

    steps = len(loader) // RANKS
    if not steps:
        return f"fewer than {RANKS} rows"
    order = rows_of_stream(np.arange(steps * RANKS), len(loader), seed=0, step=loader.group)
    return f"{imbalance(loader.packing.costs()[order].reshape(steps, RANKS)):.0%} of the time with {RANKS} ranks"


def _show(arguments: argparse.Namespace) -> None:
    from moai_llm.data.loader import Loader

    store = _open(arguments.store)
    if store.manifest.kind == "preference":
        conversations.show_pair(store, arguments.row)
        return
    loader = Loader(store, arguments.seq_len, seed=None, packing=arguments.packing, overlong=arguments.overlong)
    tokenizer = store.tokenizer()
    if not 0 <= arguments.row < len(loader):
        raise MoaiError(f"there are {len(loader)} rows, counted from 0")
    row = {key: tensor.tolist() for key, tensor in loader.row(arguments.row).items()}
    names = {i: token.encode() for token, i in tokenizer.special_ids.items()}
    colors = ("cyan", "green", "yellow", "magenta")
    runs: list[
        tuple[str, bytes]
    ] = []  # a character may be spread over tokens, so bytes of one style are decoded together
    for token, label, document in zip(row["input_ids"], row["labels"], row["seq_idx"]):
        if token == tokenizer.pad_id:
            continue
        style = "dim" if label == -100 else colors[document % len(colors)]
        piece = names.get(token) or tokenizer.token_bytes(token)
        if runs and runs[-1][0] == style:
            piece = runs.pop()[1] + piece
        runs.append((style, piece))
    line = Text()
    for style, piece in runs:
        line.append(piece.decode("utf-8", "replace"), style=style)
    make_console().print(line)


def _open(path: str) -> Store:
    from moai_llm.data.shards import Store

    return Store(path)
