"""Bytes on their way from where they are stored to a reader: counted, decompressed, as UTF-8, in lines of bounded
length.

Nothing here holds more than a record: a small file that unpacks to a huge one costs time, not memory.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import zstandard

from moai_llm.data.sources.records import Broken, Reading, Skipped, show_size

BLOCK = 1 << 20
GROWTH = 100  # times a table inside a compressed file may grow; tables are compressed already
# what the standard library raises for bytes that are not what they should be
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)

BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),  # before UTF-16, whose mark begins like it
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# how what is no text begins, what it is, and how its name should end
MAGIC = (
    (b"\x1f\x8b", "gzip", ".gz"), (b"\x28\xb5\x2f\xfd", "Zstandard", ".zst"), (b"\xfd7zXZ\0", "xz", ".xz"),
    (b"PK\x03\x04", "zip", ".zip"), (b"PAR1\x15", "Parquet", ".parquet"), (b"ARROW1\0\0", "Arrow", ".arrow"),
    (b"%PDF-", "PDF", None),
)  # fmt: skip


class Chunks(io.RawIOBase):
    """A file made of an iterator of bytes."""

    def __init__(self, chunks: Iterable[bytes]):
        self._chunks, self._rest = iter(chunks), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


class Counted(io.RawIOBase):
    """A file that reports how much of it is read."""

    def __init__(self, file: BinaryIO, report: Callable[[int], None]):
        self._file, self._report = file, report

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._report(len(data))
        return len(data)


def buffered(file: Any) -> io.BufferedReader:
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, BLOCK)


def counted(file: BinaryIO, reading: Reading) -> BinaryIO:
    return file if reading.progress is None else cast(BinaryIO, buffered(Counted(file, reading.progress)))


# ---------------------------------------------------------------- compression


def _as_it_comes(file: Any) -> BinaryIO:
    """What can be unpacked before a file breaks off is read, too; a full buffer would be lost with the error."""
    return cast(BinaryIO, Chunks(iter(lambda: file.read1(BLOCK), b"")))


def _zstd_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Frames, one after the other. Fed in small pieces, because a block of a few bytes may stand for 128 KB; the
    library's own stream reader is bounded too, but takes a file that is cut off for a whole one.
    """
    unpack = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    try:
        while block := file.read(512):
            while block:
                begun = True
                if chunk := unpack.decompress(block):
                    yield chunk
                block = b""
                if unpack.eof:
                    block, begun = unpack.unused_data, False
                    unpack = zstandard.ZstdDecompressor().decompressobj()
    except zstandard.ZstdError as error:
        raise OSError(f"not Zstandard data, or damaged: {error}") from None
    if begun:
        raise EOFError("the compressed data is cut off")


COMPRESSIONS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: _as_it_comes(gzip.GzipFile(fileobj=file)),
    ".zst": lambda file: cast(BinaryIO, Chunks(_zstd_chunks(file))),
    ".bz2": lambda file: _as_it_comes(bz2.BZ2File(file)),
    ".xz": lambda file: _as_it_comes(lzma.LZMAFile(file)),  # noqa: SIM115
}


def unpacked(file: BinaryIO) -> BinaryIO:
    """A stream without a name, decompressed if it begins like something compressed."""
    stream = buffered(file)
    for magic, _, suffix in MAGIC:
        if suffix in COMPRESSIONS and stream.peek(16).startswith(magic):
            return COMPRESSIONS[suffix](cast(BinaryIO, stream))
    return cast(BinaryIO, stream)


@contextmanager
def on_disk(file: BinaryIO, name: str, stored: int | None) -> Iterator[BinaryIO]:
    """The whole of a stream where a reader can jump around in it: in a file without a name, gone when it is closed.

    Raises:
        Broken: it is `GROWTH` times as large as what is stored.
    """
    limit = max(1 << 26, GROWTH * stored) if stored is not None else None
    size = 0
    with tempfile.TemporaryFile(buffering=0) as spool, io.BufferedReader(cast(io.RawIOBase, spool), BLOCK) as whole:
        while block := file.read(BLOCK):
            size += len(block)
            if limit is not None and size > limit:
                raise Broken(name, f"grows more than {GROWTH} times when unpacked", ": unpack it yourself to read it")
            spool.write(block)
        spool.seek(0)
        yield cast(BinaryIO, whole)


# ---------------------------------------------------------------- text


def as_utf8(file: BinaryIO, name: str, reading: Reading) -> io.BufferedReader:
    """The same text in UTF-8, without a byte order mark.

    Raises:
        Broken: the file begins like something that is no text.
    """
    stream = buffered(file)
    head = stream.peek(16)[:16]
    for magic, what, suffix in MAGIC:
        if head.startswith(magic):
            advice = f": rename it so that it ends in {suffix}" if suffix else ": extract its text first"
            raise Broken(name, f"holds {what} data, not text", advice)
    encoding = reading.encoding
    for bom, marked in BOMS:
        if head.startswith(bom):
            encoding = marked
            if marked == "utf-8":
                stream.read(len(bom))
            break
    return stream if is_utf8(encoding) else buffered(Chunks(_recode(stream, name, encoding)))


def is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


def _recode(stream: BinaryIO, name: str, encoding: str) -> Iterator[bytes]:
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    while True:
        block = stream.read(BLOCK)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = done + error.start
            raise Broken(name, f"not {encoding}", f" (near byte {place})") from None
        if text:
            yield text.encode("utf-8", "surrogatepass")
        if not block:
            return
        done += len(block)


def lines(stream: io.BufferedReader, name: str, reading: Reading, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    """(number, line). A line longer than the limit is bad, and is never in memory as a whole."""
    limit, number = reading.max_record, 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit:
            skipped.bad(name, f"{name}:{number}", *too_long(limit, "a line"))
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK)
            continue
        yield number, line


def too_long(limit: int, what: str) -> tuple[str, str]:
    """Reason and detail of a record that is over the limit."""
    return f"{what} of more than {show_size(limit)}", "; --max-record allows longer ones"


def not_utf8(data: bytes, error: UnicodeDecodeError, reading: Reading, before: int = 0) -> tuple[str, str]:
    """Reason and detail of text that is not UTF-8, with a guess at what it is."""
    sample = data[max(0, error.start - 2048) : error.start + 2048]
    advice = f"; if it is {guess}, pass --encoding {guess}" if (guess := _guess(sample)) else ""
    return "not UTF-8", f" (byte {before + error.start}: 0x{data[error.start]:02x}){advice}"


def _guess(sample: bytes) -> str | None:
    """The East Asian encoding in which a sample reads as its own script; None for none of them.

    Each pair of high bytes is some Chinese character, so the scripts that are told by fewer come first, and Hangul must
    be nearly all there is: of Chinese read as Korean it is half.
    """
    for encoding, (first, last), share in (
        ("shift_jis", (0x3041, 0x30FF), 0.3),
        ("euc_jp", (0x3041, 0x30FF), 0.3),
        ("cp949", (0xAC00, 0xD7A3), 0.9),
        ("gb18030", (0x4E00, 0x9FFF), 0.7),
    ):
        high = [c for c in sample.decode(encoding, "replace") if c > "\x7f"]
        within = sum(first <= ord(c) <= last for c in high)
        # a sample may cut a character at either end
        if high and within >= share * len(high) and high.count("\ufffd") <= 2:
            return encoding
    return None
