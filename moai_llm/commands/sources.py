"""What every command that reads sources shares: the options, the progress, and the account of what was not read."""

from __future__ import annotations

import argparse
import codecs
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich.console import Console

from moai_llm.runtime import MoaiError

if TYPE_CHECKING:
    from moai_llm.data.sources import Reading, Skipped, Source

SHOWN = 10  # rows of the account
EVERY = 30  # seconds between two lines of progress where there is no terminal


SOURCES = (
    "files (text, code, JSON lines, JSON, CSV, Parquet, Arrow, archives, compressed or not), folders, "
    "'quoted/**/patterns*', URLs, data sets of the Hub (org/name:config:split), git repositories (git:FOLDER), "
    "- for standard input"
)


def add_source_options(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """The positional `sources` and how to read them."""
    parser.add_argument("sources", nargs=nargs, help=SOURCES)
    add_reading_options(parser)


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """How to read sources, however the command calls them."""
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="name a column: --map text=body; once for each. Columns with usual names are found without it",
    )
    parser.add_argument("--skip-bad", action="store_true", help="count broken files and records and go on")
    parser.add_argument(
        "--streaming",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read data sets of the Hub as they come; --no-streaming downloads them first (default: streaming)",
    )
    parser.add_argument("--encoding", default="utf-8", help="of text, JSON and CSV, e.g. cp949 (default utf-8)")
    parser.add_argument("--max-record", default="64MB", help="refuse records larger than this (default 64MB)")


def open_sources(
    arguments: argparse.Namespace, console: Console, columns: Collection[str] = ("text",)
) -> tuple[list[Source], Reading]:
    """The single sources that the arguments name, and how to read them. What is left out of folders is shown.

    Args:
        columns: what --map can name.

    Raises:
        MoaiError: a source that is not there, an option that makes no sense.
    """
    from moai_llm.data.sources import Skipped, expand

    reading, skipped = read_options(arguments, columns), Skipped(arguments.skip_bad)
    sources = expand(arguments.sources, skipped=skipped)
    show_skipped(console, skipped)
    return sources, reading


def read_options(arguments: argparse.Namespace, columns: Collection[str] = ("text",)) -> Reading:
    """What `add_reading_options` added, checked."""
    from moai_llm.data.sources import Reading
    from moai_llm.data.sources.columns import parse_mapping
    from moai_llm.data.sources.records import read_size

    try:
        codecs.lookup(arguments.encoding).incrementaldecoder(errors="strict")
        "".encode(arguments.encoding)
    except (LookupError, TypeError):
        raise MoaiError(f"--encoding {arguments.encoding}: no such encoding; e.g. cp949, shift_jis, gb18030") from None
    return Reading(
        mapping=parse_mapping(arguments.map, columns),
        skip_bad=arguments.skip_bad,
        max_record=read_size(arguments.max_record),
        encoding=arguments.encoding,
        streaming=arguments.streaming,
    )


def show_skipped(console: Console, skipped: Skipped) -> None:
    """Broken files and records by file and reason, with the first of each; and what was left out on purpose."""
    broken = skipped.broken()
    for row in broken[:SHOWN]:
        more = f" ({row.times - 1:,} more like it in this file)" if row.times > 1 else ""
        console.print(f"skipped {row.times:,}: {row.example}{more}", markup=False, soft_wrap=True)
    if len(broken) > SHOWN:
        rest = broken[SHOWN:]
        console.print(
            f"... and {sum(row.times for row in rest):,} more, for {len(rest):,} other reasons or in other files"
        )
    by_source: dict[str, list[str]] = {}
    for source, reason, count in skipped.left_out():
        by_source.setdefault(source, []).append(f"{count:,} {reason}")
    for source, reasons in list(by_source.items())[:SHOWN]:
        console.print(f"left out of {source}: {', '.join(reasons)}", markup=False, soft_wrap=True)
    if len(by_source) > SHOWN:
        console.print(f"... and something in {len(by_source) - SHOWN} more sources")


class ReadProgress:
    """How far reading is, how fast it goes, and when it will be through: on a terminal a bar, elsewhere a new line now
    and then.
    """

    def __init__(self, console: Console, sources: Collection[Source]):
        sizes = [source.size for source in sources]
        self._total = sum(size or 0 for size in sizes) if None not in sizes else 0
        self._console, self._done, self._said = console, 0, time.monotonic()
        self._begun: tuple[float, int] | None = None  # when, and what was read by then, maybe by an earlier run

    def __enter__(self) -> ReadProgress:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        bar = [BarColumn(bar_width=30)] if self._total else []
        columns = [SpinnerColumn(), *bar, TextColumn("{task.description}")]
        self._bar = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("reading ...", total=self._total or None)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def read(self, count: int) -> None:
        """So many more stored bytes were read."""
        self._done += count

    def update(self, text: str) -> None:
        now = time.monotonic()
        self._begun = self._begun or (now, self._done)
        seconds, done = now - self._begun[0], self._done - self._begun[1]
        if seconds > 1 and done:
            text += f", {done / seconds / 1e6:.3g} MB/s"
            if self._total > self._done:
                text += f", {_clock(seconds * (self._total - self._done) / done)} left"
        if self._total:
            text = f"{min(1.0, self._done / self._total):.0%} read: {text}"
        self._bar.update(self._task, description=text, completed=self._done)
        if not self._console.is_terminal and now - self._said > EVERY:
            self._said = now
            self._console.print(text)


def _clock(seconds: float) -> str:
    """0:05, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
