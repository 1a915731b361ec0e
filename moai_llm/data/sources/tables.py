"""Parquet and Arrow: rows of tables, only the columns that are needed, a few at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from moai_llm.data.sources.records import Broken, Reading, Record, Skipped
from moai_llm.data.sources.streams import buffered, counted
from moai_llm.runtime import MoaiError, require

BATCH_BYTES = 4 << 20
BATCH_ROWS = 1024


def read_parquet(
    file: BinaryIO, name: str, reading: Reading, skipped: Skipped, groups: range | None = None
) -> Iterator[Record]:
    """The rows of a Parquet file, or of some of its row groups; `file` must be seekable. Columns are read by the
    page.
    """
    parquet = require("pyarrow.parquet", "data")
    try:
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except MoaiError:  # from the file below
        raise
    except Exception as error:  # pyarrow has its own hierarchy
        raise Broken(name, "not readable Parquet", f": {error}") from None
    columns = reading.select(table.schema_arrow.names)
    rows, size = table.metadata.num_rows, sum(_sizes(table.metadata))
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, size)))
    batches = table.iter_batches(batch_rows, row_groups=groups, columns=columns, use_threads=False)
    first = 0 if groups is None else sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
    yield from _rows(batches, columns, name, skipped, first)


def _sizes(metadata: Any) -> Iterator[int]:
    for group in range(metadata.num_row_groups):
        yield metadata.row_group(group).total_byte_size


def stored_groups(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file as it is stored; none of what is no Parquet."""
    try:
        metadata = require("pyarrow.parquet", "data").read_metadata(path)
    except Exception:  # reading it will say what is wrong
        return []
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [sum(g.column(k).total_compressed_size for k in range(g.num_columns)) for g in groups]


def read_arrow(file: BinaryIO, name: str, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """The rows of an Arrow file (also Feather 2; `file` must be seekable then) or stream."""
    pyarrow = require("pyarrow", "data")
    stream = buffered(file)
    try:
        if stream.peek(6)[:6] == b"ARROW1":
            table = pyarrow.ipc.open_file(stream)
            batches = (table.get_batch(i) for i in range(table.num_record_batches))
        else:
            batches = table = pyarrow.ipc.open_stream(stream)
    except MoaiError:
        raise
    except Exception as error:
        raise Broken(name, "not readable Arrow", f": {error}") from None
    yield from _rows(batches, reading.select(table.schema.names), name, skipped)


def _rows(batches: Iterator[Any], columns: list[str], name: str, skipped: Skipped, number: int = 0) -> Iterator[Record]:
    """The rows of record batches, counted from `number`. pyarrow checks nothing of a damaged page until it gets
    there.
    """
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            step = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
            batch = batch.select(columns)
            pieces = [batch.slice(i, step) for i in range(0, batch.num_rows, step)]
        except MoaiError:
            raise
        except Exception as error:
            raise Broken(f"{name}: row {number + 1}", "damaged", f": {error}") from None
        for piece in pieces:
            try:
                rows = piece.to_pylist()
            except Exception:  # text that is not UTF-8, a time out of range
                rows = _one_by_one(piece, name, number, skipped)
            for row in rows:
                number += 1
                if row is not None:
                    yield Record(row, f"{name}: row {number}", name)


def _one_by_one(piece: Any, name: str, before: int, skipped: Skipped) -> Iterator[dict[str, Any] | None]:
    for i in range(piece.num_rows):
        try:
            (row,) = piece.slice(i, 1).to_pylist()
        except Exception as error:
            skipped.bad(name, f"{name}: row {before + i + 1}", "unreadable values", f": {error}")
            row = None
        yield row


# ---------------------------------------------------------------- what datasets' save_to_disk writes


def is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a saved data set, in order.

    Raises:
        Broken: its list of files cannot be read, or names files elsewhere.
    """
    state = folder / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Broken(str(state), "not the state of a saved data set", f": {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise Broken(str(state), "names a file outside its folder", f": {name!r}")
        if not (folder / name).is_file():
            raise Broken(str(folder / name), "missing", f", though {state} names it")
    return [folder / name for name in names]


def read_saved(folder: Path, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """The rows of a folder that `Dataset.save_to_disk` wrote."""
    for path in saved_files(folder):
        with path.open("rb") as file:
            yield from read_arrow(counted(file, reading), str(path), reading, skipped)
