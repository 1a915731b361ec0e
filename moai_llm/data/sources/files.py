"""Which reader a file's name asks for, whether it lies in a folder, an archive or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from moai_llm.data.sources.archives import read_tar, read_zip
from moai_llm.data.sources.formats import read_csv, read_jsonl, read_text
from moai_llm.data.sources.json_values import read_json
from moai_llm.data.sources.languages import CODE, PROSE
from moai_llm.data.sources.records import Reading, Record, Skipped, printable
from moai_llm.data.sources.streams import COMPRESSIONS, counted, on_disk
from moai_llm.data.sources.tables import read_arrow, read_parquet

Reader = Callable[[BinaryIO, str, Reading, Skipped], Iterator[Record]]
FORMATS: dict[str, Reader] = {
    **dict.fromkeys((*PROSE, *CODE), read_text),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
JUMPS = (".parquet", ".arrow", ".feather", ".zip")  # read from the end, so the whole file must be at hand
ARCHIVES = (".zip", ".tar")
SHORT = {".tgz": (".tar", ".gz"), ".tbz2": (".tar", ".bz2"), ".txz": (".tar", ".xz"), ".tzst": (".tar", ".zst")}


class Kind(NamedTuple):
    format: str  # a key of FORMATS, or of ARCHIVES
    compression: str | None


def kind_of(name: str) -> Kind | None:
    """The format that a name's suffixes stand for, None for an unknown one."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes[-2:]]
    if suffixes and suffixes[-1] in SHORT:
        return Kind(*SHORT[suffixes[-1]])
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    known = bool(suffixes) and (suffixes[-1] in FORMATS or suffixes[-1] in ARCHIVES)
    return Kind(suffixes[-1], compression) if known else None


def suffix_of(name: str) -> str:
    """The suffix of a file that cannot be read, for a message."""
    suffixes = PurePosixPath(name).suffixes
    pair = "".join(suffixes[-2:]) if suffixes and suffixes[-1].lower() in COMPRESSIONS else "".join(suffixes[-1:])
    return printable(pair) or "files without a suffix"


def read_file(
    file: BinaryIO, name: str, size: int | None, reading: Reading, skipped: Skipped, inside: bool = False
) -> Iterator[Record]:
    """The records of an open file.

    Args:
        size: its bytes as stored, where they are known.
        inside: the file lies in an archive: it has no beginning to go back to, and is counted with its archive.
    """
    kind = kind_of(name)
    assert kind is not None, name
    stream = file if inside else counted(file, reading)
    if kind.compression:
        stream = COMPRESSIONS[kind.compression](stream)
    with ExitStack() as stack:
        if kind.format in JUMPS and (kind.compression or inside or not file.seekable()):
            stream = stack.enter_context(on_disk(stream, name, size))
        if kind.format in ARCHIVES:
            archive = read_zip if kind.format == ".zip" else read_tar

            def member(opened: BinaryIO, place: str, stored: int) -> Iterator[Record]:
                return read_file(opened, place, stored, reading, skipped, inside=True)

            yield from archive(stream, name, why_not_inside, member, skipped)
        else:
            yield from FORMATS[kind.format](stream, name, reading, skipped)


def why_not_inside(name: str) -> str | None:
    """Why a member of an archive is left out, None for one to read."""
    path = PurePosixPath(name)
    kind = kind_of(name)
    if any(part.startswith((".", "__MACOSX")) for part in path.parts):
        return "hidden"
    if kind is None:
        return suffix_of(name)
    return "an archive in an archive" if kind.format in ARCHIVES else None
