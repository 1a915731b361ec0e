"""A report as tables: what they hold, for the terminal and the page alike, and how the terminal draws them.

A cell knows its number, so that the best of a column is found by what is shown. A tokenizer that does not give a text
back is never the best on it: it may have saved tokens by leaving something out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moai_llm.tokenizer.counts import Row
from moai_llm.tokenizer.pieces import shortened
from moai_llm.tokenizer.report import ALL, Entry, Report, decimal, percent

Better = Literal["higher", "lower", ""]
UNSPACED_MARK = "¹"
NOTES = {
    "best": "* is the best of its column among the tokenizers that give the text back.",
    "lost": "! marks a text that does not come back: some documents decode to another string.",
    "words": "A word is a segment between the word boundaries of Unicode (UAX #29) that begins with a letter, a digit "
    "or an underscore.",
    "unspaced": f"{UNSPACED_MARK} mostly written without spaces. The rules of UAX #29 know no dictionary: each Han "
    "character and each hiragana is a word of its own, so read tokens per character there.",
    "characters": "A character is a Unicode code point.",
    "parity": "These texts are translations of each other.",
    "single": "single bytes: tokens that are one byte of a longer character, where the vocabulary has no piece for the "
    "text.",
    "unused": "unused: share of the vocabulary that is in none of the texts; it falls as there is more text.",
    "unreachable": "unreachable: ids that their own text does not give, alone or beside another character; – where "
    "tokens are not plain bytes of the text.",
    "speed": "Encoding alone, megabytes of text a second: of CPU time over all threads, and on the clock.",
    "rough": "Measured on less than a megabyte of text, so take the speeds as rough.",
}


@dataclass(frozen=True)
class Cell:
    """A number as shown. `lossy`: of a text that does not come back; `best`: nothing in the column is better."""

    text: str
    value: float = math.nan
    lossy: bool = False
    best: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table: a row a tokenizer, the same order as the report's."""

    title: str
    better: Better
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    notes: list[str]

    @property
    def heading(self) -> str:
        title = self.title[0].upper() + self.title[1:]
        return f"{title} ({self.better} is better)" if self.better else title


def sheets(report: Report) -> Iterator[Sheet]:
    """The tables of a report, the most telling first."""
    labels = [text.label for text in report.texts]
    marked = [text.label + UNSPACED_MARK * text.unspaced for text in report.texts]
    unspaced = ["unspaced"] * any(text.unspaced for text in report.texts)
    several = len(labels) > 1  # else the sum says nothing new
    per_token = []
    for entry in report.entries:
        rows = [*entry.rows, *[entry.total] * several]
        per_token.append([Cell(f"{entry.vocab_size:,}"), *[_cell(row, row.bytes_per_token) for row in rows]])
    yield _sheet(report, "bytes per token", "higher", ["vocabulary", *labels, *[ALL] * several], per_token)
    per_word = [[_cell(row, row.tokens_per_word) for row in entry.rows] for entry in report.entries]
    yield _sheet(report, "tokens per word", "lower", marked, per_word, "words", *unspaced)
    per_character = [[_cell(row, row.tokens_per_character) for row in entry.rows] for entry in report.entries]
    yield _sheet(report, "tokens per character", "lower", labels, per_character, "characters")
    if report.parallel:
        first, *others = report.parallel
        parity = [[_parity(entry, label, first) for label in others] for entry in report.entries]
        yield _sheet(report, f"tokens of the same text, relative to {first}", "lower", others, parity, "parity")
    yield _losses(report)
    yield _vocabulary(report)
    if report.timed:
        yield _speed(report)


def _cell(row: Row, value: float) -> Cell:
    return Cell(decimal(value), value, lossy=row.round_trip_failures > 0)


def _parity(entry: Entry, label: str, first: str) -> Cell:
    value = entry.parity[label]
    return Cell(decimal(value), value, any(r.round_trip_failures for r in entry.rows if r.label in (label, first)))


def _losses(report: Report) -> Sheet:
    columns = ["documents not given back", "unknown tokens", "single bytes"]
    rows = []
    for entry in report.entries:
        total = entry.total
        failures = Cell(f"{total.round_trip_failures:,} of {total.documents:,}", total.round_trip_failures)
        unknown = Cell(f"{total.unknown_tokens:,}", total.unknown_tokens)
        rows.append([failures, unknown, Cell(percent(total.byte_share), total.byte_share, not entry.lossless)])
    return _sheet(report, "what is lost", "lower", columns, rows, "single")


def _vocabulary(report: Report) -> Sheet:
    columns = ["vocabulary", "special tokens", "unused", "unreachable", "longest token", "its bytes"]
    rows = []
    for entry in report.entries:
        unreachable = "–" if entry.unreachable is None else f"{entry.unreachable:,}"
        shown = (f"{entry.vocab_size:,}", f"{entry.special_tokens:,}", percent(entry.unused_share), unreachable,
                 shortened(entry.longest.text), f"{entry.longest_bytes:,}")  # fmt: skip
        rows.append([Cell(text) for text in shown])
    return _sheet(report, "the vocabulary", "", columns, rows, "unused", "unreachable")


def _speed(report: Report) -> Sheet:
    cells = []
    for entry in report.entries:
        speeds = (entry.total.mb_per_cpu_second, entry.total.mb_per_second)
        cells.append([Cell(f"{speed:.1f}" if math.isfinite(speed) else "–", speed) for speed in speeds])
    rough = ["rough"] * (sum(text.bytes for text in report.texts) < 1e6)
    return _sheet(report, "speed", "higher", ["MB per CPU second", "MB per second"], cells, "speed", *rough)


def _sheet(
    report: Report, title: str, better: Better, columns: Sequence[str], cells: Sequence[Sequence[Cell]], *notes: str
) -> Sheet:
    best = [_best([row[i] for row in cells], better) for i in range(len(columns))]
    rows = []
    for number, (entry, row) in enumerate(zip(report.entries, cells)):
        marked = [Cell(c.text, c.value, c.lossy, number in best[i]) for i, c in enumerate(row)]
        rows.append((entry.name, marked))
    return Sheet(title, better, list(columns), rows, [NOTES[note] for note in notes])


def _best(column: Sequence[Cell], better: Better) -> set[int]:
    """Which cells show the best number; none where all show the same or there is nothing to compare."""
    numbers = [cell for cell in column if math.isfinite(cell.value) and not cell.lossy]
    if not better or not numbers or len({cell.text for cell in column}) == 1:
        return set()
    best = (max if better == "higher" else min)(numbers, key=lambda cell: cell.value)
    return {i for i, cell in enumerate(column) if cell.text == best.text and not cell.lossy}


def print_report(report: Report, console: Console) -> None:
    """The tables in the terminal, each with the notes that belong to it, and what did not come back."""
    lines = [f"{text.label} {amount(text.documents, text.bytes)}" for text in report.texts]
    console.print(escape(f"Measured on {'; '.join(lines)}."), end="\n\n")
    any_best = any_lossy = False
    for sheet in sheets(report):
        table = Table(box=None, pad_edge=False, header_style="dim")
        console.print(escape(sheet.heading), style="bold")
        table.add_column("tokenizer", overflow="fold")
        for column in sheet.columns:
            table.add_column(escape(column), justify="right")
        for name, cells in sheet.rows:
            table.add_row(escape(name), *map(_drawn, cells))
            any_best = any_best or any(cell.best for cell in cells)
            any_lossy = any_lossy or any(cell.lossy for cell in cells)
        console.print(table)
        for note in sheet.notes:
            console.print(escape(note), style="dim")
        console.print()
    for entry in report.entries:
        if failure := entry.total.first_failure:
            console.print(escape(f"{entry.name} does not give text back: {failure[0]!r} comes back as {failure[1]!r}"))
    for key, wanted in (("best", any_best), ("lost", any_lossy)):
        if wanted:
            console.print(escape(NOTES[key]), style="dim")


def _drawn(cell: Cell) -> str:
    mark = "*" if cell.best else "!" if cell.lossy else " "
    style = "bold green" if cell.best else "yellow" if cell.lossy else ""
    text = escape(cell.text) + mark
    return f"[{style}]{text}[/]" if style else text


def amount(documents: int, size: int) -> str:
    """How much text, in words."""
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if size >= s or s == 1)
    number = f"{size / scale:,.1f}" if scale > 1 else str(size)
    return f"{documents:,} document{'s' * (documents != 1)}, {number} {unit}"
