"""Writes a token store; `shards.py` says what is in one and reads it.

Documents go to the files of one open shard, which is finished when it holds enough tokens. At any moment `mark` says
how far the store is, in a few numbers; a writer that is given them goes on from there, whatever else was written since.
So a run that was killed can be continued, and what it makes has the bytes it would have had.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from moai_llm.data.manifest import sealed
from moai_llm.data.shards import Kind, Manifest, close_synced, refuse_existing, sha256_of
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a shard
BORDER = np.dtype("<i8")


class StoreWriter:
    """Appends documents; `close` makes the store visible, an exception leaves nothing behind.

    Args:
        out: directory to create.
        overwrite: replace a store that is there; otherwise that is an error.
        shard_tokens: a shard ends with the document that reaches this.
        work: where the store lies until it is finished, on the same disk; beside `out` when None.
        mark: go on with what lies in `work`, from where this was taken.

    Raises:
        MoaiError: a store that is there, a tokenizer without the tokens that training needs, shards of nearly nothing,
            files in `work` that are not those of the mark.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Tokenizer,
        kind: Kind = "text",
        *,
        overwrite: bool = False,
        shard_tokens: int = SHARD_TOKENS,
        work: Path | None = None,
        mark: dict[str, Any] | None = None,
    ) -> None:
        self.out = Path(out)
        if work is None:
            refuse_existing(self.out, overwrite)
        _ = tokenizer.eos_id, tokenizer.pad_id  # training needs both: a tokenizer without them is refused here
        if shard_tokens < 1:
            raise MoaiError(f"a shard must hold at least one token, got {shard_tokens}")
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        self.manifest = Manifest(kind, tokenizer.fingerprint, tokenizer.vocab_size, token_dtype(tokenizer).name)
        self._work = work or self.out.with_name(f".tmp-{self.out.name}-{os.getpid()}")
        self._files: dict[str, _File] = {}
        self._tokens = self._documents = 0  # of the open shard
        self._is_finished = False
        if mark is None:
            shutil.rmtree(self._work, ignore_errors=True)
            (self._work / "shards").mkdir(parents=True)
        else:
            self._go_on(mark)

    def add(self, ids: list[int], text_bytes: int, learn: list[bool] | None = None) -> None:
        """Append one document; every store but one of text also needs `learn`, as long as ids."""
        mask = None if learn is None else np.asarray(learn, np.uint8)
        self.add_documents(np.asarray(ids, np.int64), np.array([len(ids)]), np.array([text_bytes]), mask)

    def add_documents(
        self, ids: np.ndarray, lengths: np.ndarray, text_bytes: np.ndarray, learn: np.ndarray | None = None
    ) -> None:
        """Append documents, one after the other in `ids`. One without tokens is none.

        Args:
            ids: (tokens,) of any integer type.
            lengths, text_bytes: (documents,).
            learn: (tokens,) 0 or 1.
        """
        assert (learn is None) == (self.manifest.kind == "text")
        assert len(ids) == lengths.sum() and (learn is None or len(learn) == len(ids))
        lengths, text_bytes = lengths[lengths > 0], text_bytes[lengths > 0]
        self.manifest.text_bytes += int(text_bytes.sum())
        ids = ids.astype(token_dtype(self.tokenizer), copy=False)
        ends, document, start = np.cumsum(lengths), 0, 0
        while document < len(ends):
            missing = self.shard_tokens - self._tokens
            stop = min(len(ends), int(np.searchsorted(ends, start + missing)) + 1)
            end = int(ends[stop - 1])
            self._write("bin", ids[start:end])
            if learn is not None:
                self._write("mask.bin", learn[start:end])
            if "idx.npy" not in self._files:
                self._write("idx.npy", np.frombuffer(_header(0), np.uint8))  # its number is known when it is finished
                self._write("idx.npy", np.zeros(1, BORDER))
            self._write("idx.npy", (self._tokens + ends[document:stop] - start).astype(BORDER))
            self._documents += stop - document
            self._tokens += end - start
            document, start = stop, end
            if self._tokens >= self.shard_tokens:
                self._finish_shard()

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self.manifest.tokens + self._tokens

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return self.manifest.documents + self._documents

    def _stem(self) -> str:
        return f"shards/{len(self.manifest.shards):05d}"

    def _write(self, suffix: str, values: np.ndarray) -> None:
        if suffix not in self._files:
            self._files[suffix] = _File(self._work / f"{self._stem()}.{suffix}")
        self._files[suffix].write(values)

    def _finish_shard(self) -> None:
        if not self._documents:
            return
        described = {}
        for suffix, file in sorted(self._files.items()):
            name = f"{self._stem()}.{suffix}"
            if suffix == "idx.npy":
                file.begin_with(_header(self._documents + 1))
            described[name] = {"bytes": file.size, "sha256": file.close()}
        self.manifest.shards.append(
            {"stem": self._stem(), "tokens": self._tokens, "documents": self._documents, "files": described}
        )
        self.manifest.tokens += self._tokens
        self.manifest.documents += self._documents
        self._tokens = self._documents = 0
        self._files = {}

    def mark(self) -> dict[str, Any]:
        """How far the store is, as plain values. What is written so far is then on disk."""
        for file in self._files.values():
            file.sync()
        open_files = {suffix: file.size for suffix, file in self._files.items()}
        counts = {"tokens": self._tokens, "documents": self._documents}
        return {"manifest": asdict(self.manifest), "finished": self._is_finished, "open": open_files, **counts}

    def _go_on(self, mark: dict[str, Any]) -> None:
        """Back to where the mark was taken: what was written behind it is cut off."""
        self.manifest, self._is_finished = Manifest(**mark["manifest"]), mark["finished"]
        if self._is_finished:
            return
        self._tokens, self._documents = mark["tokens"], mark["documents"]
        sizes = {name: d["bytes"] for shard in self.manifest.shards for name, d in shard["files"].items()}
        opened = {f"{self._stem()}.{suffix}": size for suffix, size in mark["open"].items()}
        for name, size in (sizes | opened).items():
            file = self._work / name
            actual = file.stat().st_size if file.is_file() else -1
            if actual < size or (name in sizes and actual != size):
                raise MoaiError(f"{file} is not as the run that was stopped left it: --fresh begins anew")
        for file in (self._work / "shards").iterdir():
            if f"shards/{file.name}" not in sizes | opened:
                file.unlink()
        self._files = {suffix: _File(self._work / f"{self._stem()}.{suffix}", s) for suffix, s in mark["open"].items()}

    def finish(self, sources: Iterable[str] = ()) -> Manifest:
        """Write what is left, the tokenizer and the manifest. The store is whole then, and not in its place.

        Raises:
            MoaiError: no document was added.
        """
        self._finish_shard()
        if not self.manifest.documents:
            raise MoaiError("no document had any token: the sources are empty")
        self.manifest.sources = list(sources)
        self.tokenizer.save(self._work / "tokenizer")
        for path in (self._work / "tokenizer").iterdir():
            with path.open("rb+") as saved:
                os.fsync(saved.fileno())
        file = (self._work / "manifest.json").open("wb")
        content = sealed(asdict(self.manifest), self._work)
        file.write(content)
        close_synced(file)
        self.manifest = Manifest(**json.loads(content))
        for folder in (self._work / "tokenizer", self._work / "shards", self._work):
            sync_folder(folder)
        self._is_finished = True
        return self.manifest

    def publish(self) -> None:
        """Rename a finished store into its place."""
        publish(self._work, self.out)

    def close(self, sources: Iterable[str] = ()) -> Manifest:
        """`finish` and `publish`.

        Raises:
            MoaiError: no document was added.
        """
        try:
            manifest = self.finish(sources)
        except MoaiError:
            self.abort()
            raise
        self.publish()
        return manifest

    def release(self) -> None:
        """Close the files as they are."""
        for file in self._files.values():
            file.drop()

    def abort(self) -> None:
        """Forget everything written so far."""
        self.release()
        shutil.rmtree(self._work, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()


class _File:
    """A file that grows, with the checksum of what is in it. Of one that exists, what is behind `size` is cut off."""

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path, self.size = path, size
        self._digest: Any = hashlib.sha256()
        self._file: IO[bytes] = path.open("rb+" if size else "wb+")
        self._file.truncate(size)
        while block := self._file.read(1 << 20):
            self._digest.update(block)

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values).view(np.uint8).data
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def begin_with(self, data: bytes) -> None:
        """Replace the first bytes."""
        self._file.seek(0)
        self._file.write(data)
        self._digest = None

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> str:
        """Close it and return its checksum; its bytes are then on disk."""
        close_synced(self._file)
        return sha256_of(self.path) if self._digest is None else str(self._digest.hexdigest())

    def drop(self) -> None:
        with suppress(OSError):  # of a full disk, which the caller knows of
            self._file.close()


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Of the ids in a store."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def publish(work: Path, out: Path) -> None:
    """Rename a store that is whole into its place. One that is there makes way for it, and is deleted then."""
    replaced = work.with_name(work.name + "-old")
    if out.exists():
        os.replace(out, replaced)
    os.replace(work, out)
    sync_folder(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """The names in a folder are then on disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(count: int) -> bytes:
    """What `np.save` puts before so many borders; its length does not depend on them."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": BORDER.str, "fortran_order": False, "shape": (count,)})
    return header.getvalue()
