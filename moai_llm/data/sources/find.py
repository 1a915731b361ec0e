"""From what the user wrote to single sources: files, folders, patterns, URLs, data sets, repositories, stdin."""

from __future__ import annotations

import glob
import os
import re
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

from moai_llm.data.sources.files import kind_of, read_file, suffix_of
from moai_llm.data.sources.formats import read_text
from moai_llm.data.sources.git import git_source
from moai_llm.data.sources.hub import NAME, hub_source, saved_source
from moai_llm.data.sources.json_values import read_json
from moai_llm.data.sources.records import Reading, Record, Skipped, Source, printable
from moai_llm.data.sources.remote import public, remote_sources
from moai_llm.data.sources.streams import buffered, counted, unpacked
from moai_llm.data.sources.tables import is_saved
from moai_llm.runtime import MoaiError, did_you_mean

STDIN = "-"
JSON_START = re.compile(rb'(\xef\xbb\xbf)?\s*(\[\s*)?\{\s*"')
MAIN_FORMATS = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")


def expand(sources: Iterable[str | Path | Source], *, skipped: Skipped | None = None) -> list[Source]:
    """Every single source, in the order given, folders and patterns in sorted order. Nothing is read yet.

    Args:
        skipped: where to count what is left out of folders.

    Raises:
        MoaiError: a source that is not there or of no known kind, a folder or pattern without anything readable.
    """
    skipped = Skipped() if skipped is None else skipped
    found: list[Source] = []
    for given in sources:
        if isinstance(given, Source):
            found.append(given)
        else:
            origin = public(str(given)) if "://" in str(given) else str(given)
            found += [source._replace(origin=source.origin or origin) for source in _expand(str(given), skipped)]
    return found


def _expand(given: str, skipped: Skipped) -> list[Source]:
    if not given.strip():
        raise MoaiError("a source is empty: write a file, a folder, a data set's name, or - for standard input")
    if "\0" in given:
        raise MoaiError(f"{printable(given)}: a path cannot have NUL in it")
    if given == STDIN:
        return [Source("standard input", None, _read_stdin, once=True, here=True)]
    if given.startswith("hf:") and not given.startswith("hf://"):
        return [hub_source(given)]
    if given.startswith(("git:", "git+")):
        return [git_source(given)]
    if given.startswith("file://"):
        given = unquote(urlsplit(given).path)
    elif "://" in given:
        return remote_sources(given, skipped)
    path = Path(os.path.expanduser(given))
    if path.is_dir():
        return _folder(path, skipped)
    if path.exists() or path.is_symlink():
        if kind_of(path.name) is None:
            raise MoaiError(
                f"{path}: cannot read {suffix_of(path.name)}; known are {', '.join(MAIN_FORMATS)} and source code, "
                f"also compressed. Plain text or JSON lines of another name: moai ... - < {path.name}"
            )
        return _file(path, str(path), skipped)
    if glob.has_magic(given):
        return _pattern(path, skipped)
    if NAME.fullmatch(given) and not Path(given.split("/")[0]).exists() and kind_of(given) is None:
        return [hub_source(given)]
    raise MoaiError(f"{given}: no such file or folder{_near(path)}")


def _near(path: Path) -> str:
    """ " (did you mean ...?)" from the names beside a path that is not there."""
    folder = path.parent
    while not folder.is_dir() and folder != folder.parent:
        folder, path = folder.parent, folder
    try:
        names = [name for name, _ in zip(os.listdir(folder), range(10_000))]
    except OSError:
        return ""
    return did_you_mean(path.name, names)


def _file(path: Path, root: str, skipped: Skipped) -> list[Source]:
    """A file, if there is something in it; `root` is what the user named."""
    try:
        status = path.stat()
    except OSError as error:  # a link that leads nowhere, or to itself
        link = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
        skipped.bad(str(path), str(path), "cannot be read", f": {error.strerror}{link}")
        return []
    size, pipe = status.st_size, not stat.S_ISREG(status.st_mode)
    if not size and not pipe:
        skipped.leave_out(root, "an empty file")
        return []
    read = partial(_read_path, path, size)
    if pipe:
        return [Source(str(path), None, read, once=True, here=True)]
    return [Source(str(path), size, read, path=path, version=str(status.st_mtime_ns))]


def _read_path(path: Path, size: int, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from read_file(file, str(path), size, reading, skipped)


def _folder(root: Path, skipped: Skipped) -> list[Source]:
    """Everything readable in a folder and below, without hidden files. Links are followed, each folder visited once."""
    if (root / "dataset_dict.json").is_file() or is_saved(root):
        return [saved_source(root)]
    found = list(_walk(root, str(root), skipped, set()))
    if not found:
        raise MoaiError(f"{root}: no file there ends in {', '.join(MAIN_FORMATS)} or is source code")
    return found


def _walk(folder: Path, root: str, skipped: Skipped, visited: set[tuple[int, int]]) -> Iterator[Source]:
    try:
        status = folder.stat()
        names = sorted(os.listdir(folder))
    except OSError as error:
        skipped.bad(str(folder), str(folder), "cannot be read", f": {error.strerror}")
        return
    if (status.st_dev, status.st_ino) in visited:
        skipped.leave_out(root, "a link to a folder that is read already")
        return
    visited.add((status.st_dev, status.st_ino))
    for name in names:
        path = folder / name
        if name.startswith("."):
            continue
        if path.is_dir():
            if is_saved(path) or (path / "dataset_dict.json").is_file():
                yield saved_source(path)
            else:
                yield from _walk(path, root, skipped, visited)
        else:
            yield from _among_others(path, root, skipped)


def _among_others(path: Path, root: str, skipped: Skipped) -> Iterator[Source]:
    """A file that was found, not named: one of another kind is left out."""
    if kind_of(path.name) is None:
        skipped.leave_out(root, suffix_of(path.name))
    elif path.exists() and not path.is_file():
        skipped.leave_out(root, "a device, pipe or socket")
    else:
        yield from _file(path, root, skipped)


def _pattern(pattern: Path, skipped: Skipped) -> list[Source]:
    """What a shell would put there; `**` stands for any number of folders. Folders are only searched without it."""
    found: list[Source] = []
    matches = [Path(name) for name in sorted(glob.glob(str(pattern), recursive=True))]
    for path in matches:
        if not path.is_dir():
            found += _among_others(path, str(pattern), skipped)
        elif "**" not in str(pattern):
            found += _walk(path, str(pattern), skipped, set())
    if not found:
        what = f"none of the {len(matches)} files it matches can be read" if matches else "no file matches"
        raise MoaiError(f"{pattern}: {what}")
    return found


def _read_stdin(reading: Reading, skipped: Skipped) -> Iterator[Record]:
    """JSON lines or JSON if it begins like that, else one text; compressed or not."""
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or stdin.closed:
        raise MoaiError("there is no standard input to read: it is closed")
    if stdin in _READ:
        raise MoaiError("standard input was read already: write it to a file to read it twice")
    _READ.add(stdin)
    stream = buffered(unpacked(counted(stdin, reading)))
    reader = read_json if JSON_START.match(stream.peek(1024)) else read_text
    yield from reader(cast(BinaryIO, stream), "standard input", reading, skipped)


_READ: weakref.WeakSet[Any] = weakref.WeakSet()
