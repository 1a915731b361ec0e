"""Files behind a URL, through fsspec: https://, s3://, gs://, hf://, memory:// and what else it knows."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from moai_llm.data.sources.files import kind_of, read_file, suffix_of
from moai_llm.data.sources.records import Reading, Record, Skipped, Source
from moai_llm.data.sources.streams import BLOCK
from moai_llm.runtime import MoaiError, did_you_mean

VERSIONS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "mtime")  # what file systems tell of a file's state
EXTRA = ("http", "https", "s3", "s3a", "gs", "gcs")  # protocols whose packages the extra `cloud` installs


def public(url: str) -> str:
    """A URL without what may be secret: the user and the password, and the query of a web address."""
    scheme, sign, rest = url.partition("://")
    if scheme in ("http", "https"):
        rest = re.split("[?#]", rest)[0]
    host, slash, path = rest.partition("/")
    return scheme + sign + host.rpartition("@")[2] + slash + path


def remote_sources(url: str, skipped: Skipped) -> list[Source]:
    """The readable files of a URL: one, those a pattern matches, or those of a folder. A web address is one file.

    Raises:
        MoaiError: an unknown protocol, a missing package, nothing there, nothing readable there.
    """
    name, web = public(url), url.startswith(("http://", "https://"))
    if web and kind_of(urlsplit(url).path) is None:
        raise MoaiError(
            f"{name}: cannot read {suffix_of(urlsplit(url).path)}; a data set of the Hub is read by its name"
        )
    files, path = _filesystem(url)
    if web:
        return [_source(files, path, name)]
    sources = []
    for each in _list(files, path, name):
        if any(part.startswith(".") for part in each.removeprefix(re.split(r"[*?\[]", path)[0]).split("/")):
            continue
        if kind_of(each) is None:
            skipped.leave_out(name, suffix_of(each))
        else:
            sources.append(_source(files, each, public(str(files.unstrip_protocol(each)))))
    if not sources:
        raise MoaiError(f"{name}: no file there is of a kind that can be read")
    return sources


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        install = "pip install 'moai-llm[cloud]'" if protocol in EXTRA else str(error)
        raise MoaiError(f"{public(url)}: reading {protocol}:// needs another package: {install}") from None
    except Exception as error:
        known = fsspec.available_protocols()
        if protocol in known:
            raise MoaiError(f"{public(url)}: {_words(error)}") from error
        likely = did_you_mean(protocol, known) or "; there are https, s3, gs, hf, file and others"
        raise MoaiError(f"{public(url)}: no protocol {protocol}://{likely}") from None


def _list(files: Any, path: str, name: str) -> list[str]:
    try:
        if any(c in path for c in "*?[") and not files.exists(path):
            found = [each for each in files.glob(path) if not files.isdir(each)]
        else:
            found = files.find(path)
    except Exception as error:  # each file system has its own
        raise MoaiError(f"{name}: {_words(error)}") from error
    if not found:
        raise MoaiError(f"{name}: nothing there")
    return sorted(found)


def _source(files: Any, path: str, name: str) -> Source:
    try:
        info = files.info(path)
    except FileNotFoundError:
        raise MoaiError(f"{name}: nothing there") from None
    except Exception as error:
        raise MoaiError(f"{name}: {_words(error)}") from error
    size = None if info.get("size") is None else int(info["size"])
    version = next((str(info[key]) for key in VERSIONS if info.get(key)), "")
    here = "memory" in files.protocol if isinstance(files.protocol, tuple) else files.protocol == "memory"
    return Source(name, size, partial(_read, files, path, name), here=here, version=version)


def _read(files: Any, path: str, name: str, reading: Reading, skipped: Skipped) -> Iterator[Record]:
    try:
        file = files.open(path, "rb")
    except Exception as error:
        raise MoaiError(f"{name}: {_words(error)}") from error
    with file:
        stream = io.BufferedReader(_Remote(file, name), BLOCK)
        yield from read_file(cast(BinaryIO, stream), name, getattr(file, "size", None), reading, skipped)


class _Remote(io.RawIOBase):
    """A remote file whose own errors are never taken for damage of what is in it: a network that fails is no reason to
    skip a file.
    """

    def __init__(self, file: Any, name: str):
        self._file, self._name = file, name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:
            raise MoaiError(f"{self._name}: reading it failed: {_words(error)}") from error
        buffer[: len(data)] = data
        return len(data)


def _words(error: Exception) -> str:
    status = getattr(error, "status", None)  # aiohttp repeats the whole URL in its text
    if status:
        return f"the server answered {status} {getattr(error, 'message', '')}".rstrip()
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.sub(r"\w+://\S+", lambda url: public(url[0]), first)
