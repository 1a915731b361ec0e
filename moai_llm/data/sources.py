"""Read records from files: text, JSON lines, JSON, CSV, Parquet, and folders of them.

A record is a dict of columns with the place it came from, so that a complaint can name file and line.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from moai_llm.runtime import MoaiError, require

TEXT_COLUMNS = ("text", "content", "document", "body", "본문", "내용")


class Record(NamedTuple):
    columns: dict[str, Any]
    place: str  # file, and line or row where there are several


def read_records(paths: Iterable[str | Path]) -> Iterator[Record]:
    """All records of files and folders, in sorted order.

    Raises:
        MoaiError: a missing path, a folder without readable files, an unknown suffix, text that is not UTF-8, a
            broken record.
    """
    for file in list_files(paths):
        yield from SOURCES[file.suffix.lower()](file)


def read_texts(paths: Iterable[str | Path], column: str | None = None) -> Iterator[tuple[str, str]]:
    """(text, place) of every record that has text; `column` names it, else it is found among the usual names,
    in capitals or not.

    Raises:
        MoaiError: like `read_records`, and a record without the column.
    """
    for record in read_records(paths):
        names = {str(c).lower(): c for c in reversed(record.columns)}
        name = column or next((names[c] for c in TEXT_COLUMNS if c in names), None)
        if name is None or name not in record.columns:
            have = ", ".join(map(str, record.columns)) or "nothing"
            wanted = f"column {column!r}" if column else f"text column ({', '.join(TEXT_COLUMNS[:3])}, ...)"
            raise MoaiError(f"{record.place}: no {wanted}; it has {have}. Name the column with --column")
        text = record.columns[name]
        if not isinstance(text, str):
            raise MoaiError(f"{record.place}: {name} is {type(text).__name__}, not text")
        yield text, record.place


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """The readable files among paths and, for folders, below them; hidden ones are left out."""
    files: list[Path] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in SOURCES and p.is_file() and not _hidden(p, path)
            )
            if not found:
                raise MoaiError(f"{path}: no file there ends in {', '.join(SOURCES)}")
            files += found
        elif not path.exists():
            raise MoaiError(f"{path}: no such file or folder")
        elif path.suffix.lower() not in SOURCES:
            raise MoaiError(
                f"{path}: cannot read {path.suffix or 'files without a suffix'}; known are {', '.join(SOURCES)}"
            )
        else:
            files.append(path)
    return files


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _text(file: Path) -> Iterator[Record]:
    """A text file is one document."""
    yield Record({"text": _decode(file)}, str(file))


def _jsonl(file: Path) -> Iterator[Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield Record(_object(line, f"{file}:{number}"), f"{file}:{number}")


def _json(file: Path) -> Iterator[Record]:
    """A list of objects, or one object."""
    try:
        content = orjson.loads(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except orjson.JSONDecodeError as error:
        raise MoaiError(f"{file} is not JSON: {error}") from None
    for number, item in enumerate(content if isinstance(content, list) else [content], 1):
        if not isinstance(item, dict):
            raise MoaiError(f"{file}: item {number} is {type(item).__name__}, expected an object")
        yield Record(item, f"{file}: item {number}")


def _csv(file: Path) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
            for row in reader:
                place = f"{file}:{reader.line_num}"
                if None in row or None in row.values():
                    raise MoaiError(f"{place}: this row has not {len(reader.fieldnames or [])} columns like the header")
                yield Record(dict(row), place)
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None
    except csv.Error as error:
        raise MoaiError(f"{file}:{reader.reader.line_num}: {error}") from None


def _parquet(file: Path) -> Iterator[Record]:
    parquet = require("pyarrow.parquet", "data")
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:  # pyarrow has its own hierarchy
        raise MoaiError(f"{file} is not readable Parquet: {error}") from None
    number = 0
    for batch in table.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield Record(row, f"{file}: row {number}")


SOURCES: dict[str, Callable[[Path], Iterator[Record]]] = {
    **dict.fromkeys((".txt", ".md", ".rst", ".py"), _text),
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _decode(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from None
    except OSError as error:
        raise MoaiError(f"{file}: {error.strerror}") from None


def _not_utf8(file: Path, error: UnicodeDecodeError) -> MoaiError:
    return MoaiError(
        f"{file} is not UTF-8 (byte {error.start}: 0x{error.object[error.start]:02x}); convert it, "
        f"e.g. iconv -f EUC-KR -t UTF-8 {file.name}"
    )


def _object(line: bytes, place: str) -> dict[str, Any]:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # orjson refuses lone surrogates, which real dumps contain
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MoaiError(f"{place} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MoaiError(f"{place} is {type(value).__name__}, expected an object")
    return value
