"""Text, JSON lines and CSV: from a stream of bytes to records."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, BinaryIO

import orjson

from moai_llm.data.sources.records import Broken, Reading, Record, Skipped
from moai_llm.data.sources.streams import as_utf8, lines, not_utf8, too_long

PIECE = 8 << 20  # bytes of a text file that are one document; a longer file is several
DELIMITERS = (",", "\t", ";", "|")
NUL = ("NUL bytes", ": not text, or UTF-16 without a byte order mark (then pass --encoding utf-16-le)")


def read_text(file: BinaryIO, name: str, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """A text file is one document. One over 8 MB, or over the limit of a record, is several, cut where a paragraph
    ends, or at least a line.
    """
    stream, size, rest, line, done = as_utf8(file, name, reading), min(PIECE, reading.max_record), b"", 1, 0
    while True:
        block = stream.read(size - len(rest) if len(rest) < size else size)
        rest += block
        border = len(rest)
        if block and len(rest) >= size:
            border = rest.rfind(b"\n\n") + 2 if b"\n\n" in rest else rest.rfind(b"\n") + 1
            if not border:
                if len(rest) > reading.max_record:
                    raise Broken(f"{name}:{line}", *too_long(reading.max_record, "a line"))
                continue
        elif block:
            continue
        piece, rest = rest[:border], rest[border:]
        place = name if line == 1 else f"{name}:{line}"
        text = _decode(piece, name, reading, done)
        if text or line == 1:
            yield Record({"text": text}, place, name)
        line, done = line + piece.count(b"\n"), done + len(piece)
        if not block:
            return


def _decode(piece: bytes, name: str, reading: Reading, before: int = 0) -> str:
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Broken(name, *not_utf8(piece, error, reading, before)) from None
    if "\0" in text:
        raise Broken(name, *NUL)
    return text


def read_jsonl(file: BinaryIO, name: str, reading: Reading, skipped: Skipped, first: int = 1) -> Iterator[Record]:
    """An object a line; lines without anything on them are passed over. The first line counts as number `first`."""
    yield from read_objects(as_utf8(file, name, reading), name, reading, skipped, first)


def read_objects(
    stream: BufferedReader, name: str, reading: Reading, skipped: Skipped, first: int = 1
) -> Iterator[Record]:
    """`read_jsonl` of what is UTF-8, from some line on."""
    for number, line in lines(stream, name, reading, skipped):
        if not line.isspace():
            place = f"{name}:{number + first - 1}"
            columns = parse_object(line, name, place, reading, skipped)
            if columns is not None:
                yield Record(columns, place, name)


def parse_object(line: bytes, name: str, place: str, reading: Reading, skipped: Skipped) -> dict[str, Any] | None:
    """A JSON object, None for what is told to be bad."""
    reason, detail = "", ""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # orjson refuses lone surrogates, NaN and huge numbers, which real dumps contain
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            reason, detail = not_utf8(line, error, reading)
        except RecursionError:
            reason = "JSON nested too deeply"
        except ValueError as error:
            reason, detail = "not JSON", f": {error}"
            if line.strip() in (b"[", b"{"):
                detail += ". One JSON document over several lines should be named .json"
    if not reason and not isinstance(value, dict):
        reason = f"{json_type(value)} instead of an object"
    if reason:
        skipped.bad(name, place, reason, detail)
        return None
    return value


def json_type(value: Any) -> str:
    names = {type(None): "null", str: "a string", list: "a list", bool: "true or false", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def read_csv(file: BinaryIO, name: str, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """A row a record; the first row names the columns. Comma, tab, semicolon or bar between them, whichever the
    header has.
    """
    csv.field_size_limit(min(reading.max_record, 2**31 - 1))
    source = _CsvLines(lines(as_utf8(file, name, reading), name, reading, skipped), name, reading)
    top = next(source, None)
    if top is None:
        return
    delimiter = next((d for d in DELIMITERS if d in top), ",")
    (header,) = csv.reader([top], delimiter=delimiter)
    twice = [column for column in header if column and header.count(column) > 1]
    if twice:
        raise Broken(f"{name}:1", "a column twice", f": the header has {twice[0]!r} more than once")
    rows = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        begin = source.begin_row()
        try:
            row = next(rows, None)
        except csv.Error as error:
            skipped.bad(name, f"{name}:{begin}", *_csv_reason(error, begin, source.number))
            continue
        except Broken as error:
            if source.too_long:  # where the row should have ended is not known: what follows may lie within a quote
                raise
            skipped.add(name, error)
            continue
        if row is None:
            return
        place = f"{name}:{begin}"
        if len(row) != len(header):
            if row:  # an empty line is no row
                detail = f": {len(row)}, the header has {len(header)}"
                skipped.bad(name, place, "another number of columns than the header", detail)
            continue
        yield Record(dict(zip(header, row)), place, name)


def _csv_reason(error: csv.Error, begin: int, end: int) -> tuple[str, str]:
    if "unexpected end" in str(error) or "field larger" in str(error):
        return "a quote that is never closed", f": it swallows the lines up to {end}"
    return "not CSV", f": {error}"


class _CsvLines:
    """Lines as text, numbered. An object, not a generator: it goes on after it has raised."""

    def __init__(self, source: Iterator[tuple[int, bytes]], name: str, reading: Reading):
        self._source, self._name, self._reading = source, name, reading
        self.number = 0  # of the line that was read last
        self.too_long = False
        self._begin, self._row = 1, 0  # line where the row begins, its bytes so far

    def begin_row(self) -> int:
        """The line on which the next row begins."""
        self._begin, self._row = self.number + 1, 0
        return self._begin

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._source)
        place = f"{self._name}:{self.number}"
        self._row += len(line)
        if self._row > self._reading.max_record:
            self.too_long = True
            reason, detail = too_long(self._reading.max_record, "a row")
            raise Broken(f"{self._name}:{self._begin}", reason, f"{detail}, if no quote is left open there")
        return _decode(line, place, self._reading)
