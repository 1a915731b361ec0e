"""Read records and texts from wherever they are: files, folders, patterns, archives, URLs, data sets of the Hub, git
repositories, standard input.

A record is a dict of columns with the place it came from, so that a complaint can name file and line. Everything
streams: no source is in memory as a whole. What is broken is an error, or counted, as the caller wants.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from moai_llm.data.sources.columns import reading_of_texts, rename, text_of
from moai_llm.data.sources.find import expand
from moai_llm.data.sources.pieces import Piece, read_part
from moai_llm.data.sources.records import Broken, Reading, Record, Skipped, Source
from moai_llm.data.sources.streams import DAMAGE

__all__ = [
    "Broken", "Piece", "Reading", "Record", "Skipped", "Source", "expand", "read_piece", "read_records", "read_source",
    "read_texts",
]  # fmt: skip


def read_records(
    sources: Iterable[str | Path | Source], reading: Reading | None = None, *, skipped: Skipped | None = None
) -> Iterator[Record]:
    """All records of the sources, in order.

    Args:
        skipped: where to count what is not read; one of its own when None.

    Raises:
        MoaiError: a source that is not there; a broken file or record, unless `reading.skip_bad`.
    """
    reading = reading or Reading()
    skipped = Skipped(reading.skip_bad) if skipped is None else skipped
    for source in expand(sources, skipped=skipped):
        for record in read_source(source, reading, skipped):
            renamed = rename(record, reading.mapping, skipped) if reading.mapping else record
            if renamed is not None:
                yield renamed


def read_texts(
    sources: Iterable[str | Path | Source],
    column: str | None = None,
    reading: Reading | None = None,
    *,
    skipped: Skipped | None = None,
) -> Iterator[tuple[str, str]]:
    """(text, place) of every record; `column` (or `text` of `reading.mapping`) names the text, else it is found among
    the usual names, in capitals or not.

    Raises:
        MoaiError: like `read_records`, and a record without text.
    """
    reading = reading_of_texts(reading or Reading(), column)
    skipped = Skipped(reading.skip_bad) if skipped is None else skipped
    for source in expand(sources, skipped=skipped):
        for record in read_source(source, reading, skipped):
            text = text_of(record, reading, skipped)
            if text is not None:
                yield text, record.place


def read_source(source: Source, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """The records of one source as they are. A file that breaks off is told to `skipped`, with where that was."""
    yield from read_piece(Piece(source), reading, skipped)


def read_piece(piece: Piece, reading: Reading, skipped: Skipped) -> Generator[Record, None, int]:
    """`read_source` of a piece of it. Returns how many lines begin in the piece, 0 where that does not matter."""
    source, place, bad = piece.source, "", skipped.bad_count
    whole = piece.unit == "all"
    try:
        records = iter(source.read(reading, skipped) if whole else read_part(piece, reading, skipped))
        while True:
            try:
                record = next(records)
            except StopIteration as end:
                if whole and not place and skipped.bad_count == bad:
                    skipped.leave_out(source.name, "nothing in it")
                return end.value or 0
            place = record.place
            yield record
    except Broken as error:
        skipped.add(source.name, error)
    except DAMAGE as error:
        words = getattr(error, "strerror", None) or str(error) or type(error).__name__
        skipped.bad(source.name, source.name, "cannot be read", f": {words}{f' (after {place})' if place else ''}")
    return 0
