"""Whole documents from sources to JSON lines: the text, with all other columns of its record carried along."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import orjson

from moai_llm.data.sources import Reading, Skipped, Source, expand, read_source
from moai_llm.data.sources.columns import find_text_column, text_of
from moai_llm.runtime import MoaiError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
PART = 512 << 20  # bytes of JSON in a file of a folder, before compression


class Document(NamedTuple):
    text: str
    place: str
    columns: dict[str, Any]  # the others


def read_documents(
    sources: Iterable[str | Path | Source], reading: Reading, *, skipped: Skipped | None = None
) -> Iterator[Document]:
    """The documents of sources in order, with their other columns. `source` says where each comes from, unless there is
    such a column.

    Raises:
        MoaiError: like `read_texts`.
    """
    skipped = Skipped(reading.skip_bad) if skipped is None else skipped
    for source in expand(sources, skipped=skipped):
        for record in read_source(source, reading, skipped):
            text = text_of(record, reading, skipped)
            if text is not None:
                name = reading.mapping.get("text") or find_text_column(list(record.columns))
                others = {str(key): value for key, value in record.columns.items() if key not in (name, "text")}
                yield Document(text, record.place, {"source": record.place, **others})


class DocumentWriter:
    """Documents to one file of JSON lines (`.jsonl`, `.jsonl.zst`, `.jsonl.gz`), or to a folder of `.jsonl.zst` files.
    What is written has its name only when it is whole: leaving with an error leaves nothing.

    Raises:
        MoaiError: there is something by that name, unless `overwrite`.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, part: int = PART) -> None:
        self.out, self._overwrite, self._limit = Path(out), overwrite, part
        self.is_file = self.out.name.endswith(SUFFIXES)
        if not self.is_file and self.out.suffix in (".json", ".txt", ".csv", ".parquet", ".zst", ".gz"):
            raise MoaiError(f"{out}: documents are written as {', '.join(SUFFIXES)}, or to a folder")
        if self.out.exists() and not overwrite:
            raise MoaiError(f"{out} exists; --overwrite replaces it")
        if self.out.is_dir() and (self.is_file or not _is_ours(self.out)):
            raise MoaiError(f"{out} is a folder with other things in it: name another one")
        self._temporary = self.out.with_name(f".tmp-{self.out.name}-{os.getpid()}")
        self._file: IO[bytes] | None = None
        self._parts, self._written = 0, 0

    def __enter__(self) -> DocumentWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if not self.is_file:
            self._temporary.mkdir()
        self._begin()
        return self

    def write(self, text: str, columns: dict[str, Any]) -> None:
        line = as_json({"text": text, **columns})
        if not self.is_file and self._written and self._written + len(line) > self._limit:
            self._end()
            self._begin()
        assert self._file is not None
        self._file.write(line)
        self._written += len(line)

    def __exit__(self, kind: object, *_: object) -> None:
        self._end()
        if kind is not None:
            shutil.rmtree(self._temporary) if self._temporary.is_dir() else self._temporary.unlink()
            return
        if self.out.is_dir():
            shutil.rmtree(self.out)
        os.replace(self._temporary, self.out)

    def _begin(self) -> None:
        path, name = self._temporary, self.out.name
        if not self.is_file:
            path, name = path / f"part-{self._parts:05d}.jsonl.zst", ".jsonl.zst"
        self._parts, self._written = self._parts + 1, 0
        if name.endswith(".zst"):
            import zstandard

            self._file = zstandard.open(path, "wb")
        elif name.endswith(".gz"):  # no time stamp: the same documents are the same bytes
            self._file = cast(IO[bytes], gzip.GzipFile(path, "wb", mtime=0))
        else:
            self._file = path.open("wb")

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()


def as_json(columns: dict[str, Any]) -> bytes:
    """A line of JSON. Lone surrogates become U+FFFD, and what JSON cannot hold its text."""
    options = orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    try:
        return orjson.dumps(columns, default=str, option=options)
    except TypeError:  # lone surrogates, integers beyond 64 bits
        return orjson.dumps(_plain(columns), default=str, option=options)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


def _is_ours(folder: Path) -> bool:
    return all(path.name.startswith("part-") and path.name.endswith(".jsonl.zst") for path in folder.iterdir())
