"""Clean documents before they are prepared: rules, duplicates, overlap with evaluation sets; each gives a report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moai_llm.commands.sources import ReadProgress, add_source_options, open_sources, show_skipped
from moai_llm.runtime import MoaiError, make_console, write_atomically

if TYPE_CHECKING:
    from moai_llm.data.clean import CleanReport
    from moai_llm.data.contamination import ContaminationReport
    from moai_llm.data.dedup import DedupOptions, DedupReport
    from moai_llm.data.documents import Document
    from moai_llm.data.sources import Reading, Source

OUT = "a file (.jsonl, .jsonl.zst, .jsonl.gz), or a folder of such files"


def add_verbs(verbs: argparse._SubParsersAction) -> None:
    """`clean`, `dedup` and `contamination` beside the other verbs of `moai data`."""
    clean = verbs.add_parser("clean", help="drop what is not worth learning from, repair the rest")
    _add_common(clean, out_required=True)
    clean.add_argument("--config", default="default", metavar="YAML", help="rules, languages, personal data, ...")
    dedup = verbs.add_parser("dedup", help="drop duplicates: equal, near-equal, equal programs, shared lines")
    _add_common(dedup, out_required=True)
    dedup.add_argument("--no-near", action="store_true", help="only equal texts, no near-duplicates")
    dedup.add_argument("--bands", type=int, default=16, help="of the signatures (default 16)")
    dedup.add_argument("--rows", type=int, default=8, help="in a band; more find only more alike texts (default 8)")
    dedup.add_argument("--words", type=int, default=5, help="in a shingle (default 5)")
    dedup.add_argument(
        "--characters", type=int, default=8, help="in a shingle of Korean, Japanese, Chinese, ... (default 8)"
    )
    dedup.add_argument("--verify", action="store_true", help="compare candidates by their true similarity")
    dedup.add_argument("--threshold", type=float, help="least Jaccard similarity with --verify (default 0.7)")
    dedup.add_argument("--keep", choices=("first", "longest"), default="first", help="which one of a cluster")
    dedup.add_argument(
        "--lines", type=int, metavar="N", help="take out lines of 20 characters or more that N documents had before"
    )
    dedup.add_argument(
        "--code", choices=("tree", "names"), help="Python by its syntax tree, or with its names numbered too"
    )
    dedup.add_argument("--python", action="store_true", help="all records are Python, for --code")
    dedup.add_argument(
        "--index", metavar="FOLDER", help="remember the documents; those of earlier runs are there already"
    )
    dedup.add_argument("--memory", default="256MB", help="that sorting may take (default 256MB)")
    check = verbs.add_parser("contamination", help="which documents hold items of evaluation sets")
    _add_common(check, out_required=False)
    check.add_argument("--against", nargs="+", required=True, metavar="EVAL", help="evaluation sets, like sources")
    check.add_argument("--words", type=int, default=13, help="in an n-gram (default 13)")
    check.add_argument(
        "--characters", type=int, default=26, help="in an n-gram of Korean, Japanese, Chinese, ... (default 26)"
    )
    check.add_argument(
        "--eval-text", metavar="COLUMN", help="what to compare of an item; all its strings where it is not named"
    )


def _add_common(parser: argparse.ArgumentParser, out_required: bool) -> None:
    add_source_options(parser)
    parser.add_argument("--out", required=out_required, help=OUT + ("" if out_required else "; for what is clean"))
    parser.add_argument("--report", metavar="FILE", help="also write the report, as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace output that is there")


class _Reader:
    """Reads the documents of the command's sources, as often as they are asked for, and shows how far that is."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        from moai_llm.data.sources import Skipped

        self.sources: list[Source]
        self.reading: Reading
        self.sources, self.reading = open_sources(arguments, console)
        self.skipped = Skipped(arguments.skip_bad)
        self.shown = ReadProgress(console, self.sources)
        out = Path(arguments.out).absolute() if arguments.out else None
        inside = [s.name for s in self.sources if out and Path(s.name).absolute() in (out, *out.glob("part-*"))]
        if inside:
            raise MoaiError(f"{inside[0]} is both a source and the output: name another --out")

    def documents(self) -> Iterator[Document]:
        from dataclasses import replace

        from moai_llm.data.documents import read_documents
        from moai_llm.data.sources import Skipped

        self.skipped = Skipped(self.reading.skip_bad)
        reading = replace(self.reading, progress=self.shown.read)
        for n, document in enumerate(read_documents(self.sources, reading, skipped=self.skipped)):
            if n % 1000 == 0:
                self.shown.update(f"{n:,} documents")
            yield document


def run_clean(arguments: argparse.Namespace) -> None:
    from moai_llm.data.clean import Cleaner, clean, load_config

    console = make_console()
    cleaner, reader = Cleaner(load_config(arguments.config)), _Reader(arguments, console)
    with reader.shown:
        report = clean(reader.documents(), cleaner, arguments.out, overwrite=arguments.overwrite)
    _show_clean(console, report)
    _finish(arguments, console, reader, report.as_dict())


def run_dedup(arguments: argparse.Namespace) -> None:
    from moai_llm.data.dedup import dedup

    console, options = make_console(), _dedup_options(arguments)
    reader = _Reader(arguments, console)
    if any(source.once for source in reader.sources):
        raise MoaiError("standard input can be read once, and duplicates need two passes: write it to a file")
    with reader.shown:
        report = dedup(
            reader.documents, arguments.out, options, index=arguments.index, overwrite=arguments.overwrite,
            progress=reader.shown.update,
        )  # fmt: skip
    _show_dedup(console, report)
    _finish(arguments, console, reader, report.as_dict())


def _dedup_options(arguments: argparse.Namespace) -> DedupOptions:
    from moai_llm.data.dedup import DedupOptions
    from moai_llm.data.minhash import MinHashOptions
    from moai_llm.data.sources.records import read_size

    if arguments.threshold is not None and not arguments.verify:
        raise MoaiError("--threshold does nothing without --verify; --bands and --rows say what is a candidate")
    if arguments.verify and arguments.no_near:
        raise MoaiError("--verify compares near-duplicates, and --no-near looks for none")
    if arguments.python and not arguments.code:
        raise MoaiError("--python does nothing without --code")
    return DedupOptions(
        near=not arguments.no_near,
        minhash=MinHashOptions(arguments.bands, arguments.rows, arguments.words, arguments.characters),
        verify=arguments.verify,
        threshold=0.7 if arguments.threshold is None else arguments.threshold,
        lines=arguments.lines,
        code=arguments.code,
        python=arguments.python,
        keep=arguments.keep,
        memory=read_size(arguments.memory),
    )


def run_contamination(arguments: argparse.Namespace) -> None:
    from moai_llm.data.contamination import check_contamination, index_evaluations
    from moai_llm.data.sources import Reading

    console = make_console()
    mapping = {"text": arguments.eval_text} if arguments.eval_text else {}
    index = index_evaluations(
        arguments.against, Reading(mapping=mapping), words=arguments.words, characters=arguments.characters
    )
    reader = _Reader(arguments, console)
    with reader.shown:
        report = check_contamination(reader.documents(), index, arguments.out, overwrite=arguments.overwrite)
    _show_contamination(console, report)
    _finish(arguments, console, reader, report.as_dict())


def _finish(arguments: argparse.Namespace, console: Console, reader: _Reader, report: dict[str, Any]) -> None:
    show_skipped(console, reader.skipped)
    if arguments.report:
        text = json.dumps(report, ensure_ascii=False, indent=1).encode("utf-8", "replace").decode("utf-8")
        write_atomically(Path(arguments.report), text + "\n")
    if arguments.out:
        console.print(f"written to {arguments.out}", markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, pad_edge=False)


def _share(count: int, of: int) -> str:
    return f"{count / max(1, of):.1%}"


def _show_clean(console: Console, report: CleanReport) -> None:
    table = _table("documents", "", "share", "for example")
    table.add_row("read", f"{report.read:,}", "", "")
    table.add_row("kept", f"{report.kept:,}", _share(report.kept, report.read), "")
    for rule, count in report.dropped.most_common():
        place, detail, text = report.examples[rule][0]
        example = f"{place}: {f'({detail}) ' if detail else ''}{text}"
        table.add_row(f"dropped: {rule}", f"{count:,}", _share(count, report.read), _plain(example))
    console.print(table)
    for what, count in report.changes.most_common():
        console.print(f"{what}: {count:,}", markup=False)


def _show_dedup(console: Console, report: DedupReport) -> None:
    table = _table("documents", "", "share")
    for name in ("read", "kept", "exact", "near", "empty"):
        count = getattr(report, name)
        if count or name in ("read", "kept"):
            label = {"exact": "dropped: equal", "near": "dropped: near-duplicate", "empty": "dropped: empty"}.get(
                name, name
            )
            table.add_row(label, f"{count:,}", _share(count, report.read) if name != "read" else "")
    console.print(table)
    console.print(f"clusters of duplicates: {report.clusters:,}; documents of the largest: {report.largest:,}")
    for place, other, kind in report.examples[:3]:
        console.print(f"{kind}: {place} is like {other}", markup=False, soft_wrap=True)
    if report.lines:
        console.print(f"lines taken out: {report.lines:,}")
    for line, count in report.frequent_lines[:5]:
        console.print(f"  {count:,} times: {_safe(line)}", markup=False, soft_wrap=True)


def _show_contamination(console: Console, report: ContaminationReport) -> None:
    table = _table("evaluation set", "items", "found in the documents", "share", "too short to tell")
    for row in report.sets:
        share = _share(row.found, row.items)
        table.add_row(_plain(row.name), f"{row.items:,}", f"{row.found:,}", share, f"{row.too_short:,}")
    console.print(table)
    hit = f"{report.contaminated:,} of {report.read:,} documents share an n-gram with an evaluation set"
    console.print(f"{hit} ({_share(report.contaminated, report.read)})")
    for place, name, phrase in report.examples[:5]:
        console.print(_safe(f"{place} has of {name}: {' '.join(phrase.split())}"), markup=False, soft_wrap=True)


def _safe(text: str) -> str:
    """Text from outside, without the characters that would drive a terminal."""
    from moai_llm.data.sources.records import printable

    return printable(text)


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(_safe(text), overflow="ellipsis", no_wrap=True)
