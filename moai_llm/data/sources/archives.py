"""Members of zip and tar archives, read where they are. Nothing is ever extracted: the name of a member only names
places in messages, and one that points out of its archive is not read at all.
"""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from moai_llm.data.sources.records import Broken, Record, Skipped
from moai_llm.data.sources.streams import DAMAGE, buffered

MAX_HEADER = 1 << 20  # bytes of a tar header; an extended one may claim any size, and is read into memory
ReadMember = Callable[[BinaryIO, str, int], Iterator[Record]]  # (file, name, stored bytes)
LONG_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
)  # fmt: skip


def read_zip(
    file: BinaryIO, name: str, wanted: Callable[[str], str | None], read: ReadMember, skipped: Skipped
) -> Iterator[Record]:
    """The records of the members of a zip; `file` must be seekable.

    Args:
        wanted: why a member of this name is left out; None for one to read.
        read: the records of one.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.is_dir():
                continue
            why = "a link" if stat.S_ISLNK(member.external_attr >> 16) else wanted(member.filename)
            if _refused(name, member.filename, why, skipped):
                continue
            place = f"{name}/{member.filename}"
            try:
                if member.flag_bits & 1:
                    raise Broken(place, "encrypted", ": unpack it yourself to read it")
                with archive.open(member) as opened:
                    yield from read(cast(BinaryIO, buffered(opened)), place, member.compress_size)
            except Broken as error:
                skipped.add(place, error)
            except (*DAMAGE, RuntimeError) as error:  # a way of compressing that zipfile does not know
                skipped.bad(place, place, "damaged", f": {error}")


def read_tar(
    file: BinaryIO, name: str, wanted: Callable[[str], str | None], read: ReadMember, skipped: Skipped
) -> Iterator[Record]:
    """The records of the members of a tar, in one pass from its beginning to its end."""
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_TarInfo) as archive:
        for member in archive:
            if member.isdir():
                continue
            why = (
                wanted(member.name) if member.isreg() else "a link" if member.issym() or member.islnk() else "a device"
            )
            if _refused(name, member.name, why, skipped):
                continue
            place = f"{name}/{member.name}"
            opened = archive.extractfile(member)
            assert opened is not None  # only what is no regular file has no content
            try:
                yield from read(cast(BinaryIO, opened), place, member.size)
            except Broken as error:
                skipped.add(place, error)


def _refused(archive: str, member: str, why: str | None, skipped: Skipped) -> bool:
    """Whether a member is not read; it is told why."""
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[:1]:
        skipped.bad(archive, f"{archive}/{member}", "a name that points out of its archive")
        return True
    if why is not None:
        skipped.leave_out(archive, why)
    return why is not None


class _TarInfo(tarfile.TarInfo):
    """A header that is refused where it claims more than a name needs."""

    @classmethod
    def frombuf(cls, buf: Any, *arguments: Any, **options: Any) -> Any:
        info = super().frombuf(buf, *arguments, **options)
        if info.type in LONG_HEADERS and info.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {info.size:,} bytes")
        return info
