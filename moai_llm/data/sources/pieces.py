"""Sources cut into pieces that can be read apart, by several processes: bytes of JSON lines, row groups of Parquet.

Where a source is cut depends on the source alone, so that everybody cuts it alike. The records of its pieces, one piece
after the other, are those of the source. What was broken is told in the words of the whole source, except that lines
are counted from the beginning of a piece; `later_lines` moves them to where they are.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Generator, Iterable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from moai_llm.data.sources.files import kind_of
from moai_llm.data.sources.formats import read_jsonl, read_objects
from moai_llm.data.sources.records import Reading, Record, Skipped, Source, printable
from moai_llm.data.sources.streams import BLOCK, BOMS, MAGIC, buffered, counted, is_utf8
from moai_llm.data.sources.tables import read_parquet, stored_groups
from moai_llm.runtime import MoaiError

PIECE_BYTES = 4 << 20
MANY = 1000  # small sources in a slice


class Piece(NamedTuple):
    """All of a source, or what begins in [begin, end): lines by bytes of the file, or row groups by number."""

    source: Source
    unit: Literal["all", "bytes", "groups"] = "all"
    begin: int = 0
    end: int = 0


def slices(sources: Iterable[Source], reading: Reading) -> Iterator[list[Piece]]:
    """All of the sources in order, as portions of work of about `PIECE_BYTES`: a piece of one source, or several small
    sources. What cannot be cut is one portion, however large.
    """
    size = PIECE_BYTES
    small, collected = list[Piece](), 0
    for source in sources:
        pieces = cut(source, reading, size)
        alone = len(pieces) > 1 or source.size is None
        if small and (alone or len(small) == MANY or collected >= size):
            yield small
            small, collected = [], 0
        if alone:
            yield from ([piece] for piece in pieces)
        else:
            small += pieces
            collected += source.size or 0
    if small:
        yield small


def cut(source: Source, reading: Reading, size: int) -> list[Piece]:
    """The pieces of a source, of about `size` stored bytes."""
    kind = kind_of(source.path.name) if source.path is not None else None
    if source.path is None or kind is None or kind.compression or source.size is None or source.size < 2 * size:
        return [Piece(source)]
    if kind.format in (".jsonl", ".ndjson") and is_utf8(reading.encoding):
        with source.path.open("rb") as file:
            head = file.read(16)
        marks = [bom for bom, encoding in BOMS if encoding != "utf-8"] + [magic for magic, _, _ in MAGIC]
        if not head.startswith(tuple(marks)):
            borders = [*range(0, source.size - size // 2, size), source.size]
            return [Piece(source, "bytes", begin, end) for begin, end in zip(borders, borders[1:])]
    if kind.format == ".parquet":
        pieces, begin, stored = [], 0, 0
        groups = stored_groups(source.path)
        for i, group in enumerate(groups):
            stored += group
            if stored >= size or i == len(groups) - 1:
                pieces.append(Piece(source, "groups", begin, i + 1))
                begin, stored = i + 1, 0
        return pieces or [Piece(source)]
    return [Piece(source)]


def read_part(piece: Piece, reading: Reading, skipped: Skipped) -> Generator[Record, None, int]:
    """The records of a piece that is not all of its source. Returns the number of lines that begin in it."""
    source = piece.source
    assert source.path is not None
    with source.path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != source.size:
            raise MoaiError(f"{source.name} has changed while it was read: run this again when nobody writes to it")
        if piece.unit == "groups":
            stream = counted(file, reading)
            yield from read_parquet(stream, source.name, reading, skipped, range(piece.begin, piece.end))
            return 0
        begin, end = _next_line(file, piece.begin), _next_line(file, piece.end)
        file.seek(begin)
        section = _Section(file, end - begin)
        stream = counted(cast(BinaryIO, section), reading)
        if piece.begin == 0:
            yield from read_jsonl(stream, source.name, reading, skipped)
        else:  # whatever its first line begins with is no byte order mark
            yield from read_objects(buffered(stream), source.name, reading, skipped)
        return section.lines


def later_lines(message: str, source: str, lines: int) -> str:
    """A message about a piece with so many lines before it: what it says of a line is moved on."""
    place = re.compile(re.escape(f"{printable(source)}:") + r"(\d+)")
    return place.sub(lambda found: f"{printable(source)}:{int(found[1]) + lines}", message, count=1)


def _next_line(file: BinaryIO, at: int) -> int:
    """Where the first line begins at this byte or behind it."""
    if at == 0:
        return 0
    file.seek(at - 1)
    while block := file.readline(BLOCK):
        if block.endswith(b"\n"):
            break
    return file.tell()


class _Section(io.RawIOBase):
    """The next bytes of a file, and how many lines they hold."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left = file, size
        self.lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        self.lines += data.count(b"\n")
        return len(data)
