"""The token store on disk ("data cache"): writer and reader.

    store/
      manifest.json          what is in it, written last
      tokenizer/             the tokenizer that made it
      shards/00000.bin       little-endian uint16 or uint32 token ids, document after document
      shards/00000.idx.npy   int64 document borders, from 0 to the number of tokens
      shards/00000.mask.bin  all but text stores: uint8, 1 where the token is one to learn

A store is written beside its final name and renamed, so a directory with a manifest is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
Kind = Literal["text", "chat", "preference"]  # documents, conversations, pairs of them (`preference.py`)
SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a shard


@dataclass
class Manifest:
    kind: Kind
    tokenizer: str  # fingerprint
    vocab_size: int
    dtype: str
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    format: int = FORMAT


class StoreWriter:
    """Appends documents; `close` makes the store visible, an exception leaves nothing behind.

    Args:
        out: directory to create.
        overwrite: replace a store that is there; otherwise that is an error.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Tokenizer,
        kind: Kind = "text",
        *,
        overwrite: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.out = Path(out)
        refuse_existing(self.out, overwrite)
        _ = tokenizer.eos_id, tokenizer.pad_id  # training needs both: a tokenizer without them is refused here
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self.manifest = Manifest(kind, tokenizer.fingerprint, tokenizer.vocab_size, dtype)
        self._token_dtype = np.dtype(dtype).newbyteorder("<")
        self._tmp = self.out.with_name(f".tmp-{self.out.name}-{os.getpid()}")
        shutil.rmtree(self._tmp, ignore_errors=True)
        (self._tmp / "shards").mkdir(parents=True)
        self._borders = [0]
        self._files: dict[str, IO[bytes]] = {}

    def add(self, ids: list[int], text_bytes: int, learn: list[bool] | None = None) -> None:
        """Append one document; every store but one of text also needs `learn`, as long as ids."""
        assert (learn is None) == (self.manifest.kind == "text")
        if not ids:
            return
        self._file("bin").write(np.asarray(ids, dtype=self._token_dtype).tobytes())
        if learn is not None:
            assert len(learn) == len(ids)
            self._file("mask.bin").write(bytes(learn))
        self._borders.append(self._borders[-1] + len(ids))
        self.manifest.text_bytes += text_bytes
        if self._borders[-1] >= self.shard_tokens:
            self._finish_shard()

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self.manifest.tokens + self._borders[-1]

    def _stem(self) -> str:
        return f"shards/{len(self.manifest.shards):05d}"

    def _file(self, suffix: str) -> IO[bytes]:
        if suffix not in self._files:
            self._files[suffix] = (self._tmp / f"{self._stem()}.{suffix}").open("wb")
        return self._files[suffix]

    def _finish_shard(self) -> None:
        if len(self._borders) == 1:
            return
        np.save(self._file("idx.npy"), np.asarray(self._borders, dtype=np.int64))
        described = {}
        for suffix, file in sorted(self._files.items()):
            close_synced(file)
            name = f"{self._stem()}.{suffix}"
            path = self._tmp / name
            described[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        tokens, documents = self._borders[-1], len(self._borders) - 1
        self.manifest.shards.append(
            {"stem": self._stem(), "tokens": tokens, "documents": documents, "files": described}
        )
        self.manifest.tokens += tokens
        self.manifest.documents += documents
        self._borders, self._files = [0], {}

    def close(self, sources: list[str] | None = None) -> Manifest:
        """Write what is left and the manifest, and rename into place.

        Raises:
            MoaiError: no document was added.
        """
        self._finish_shard()
        if not self.manifest.documents:
            self.abort()
            raise MoaiError("no document had any token: the sources are empty")
        self.manifest.sources = sources or []
        self.tokenizer.save(self._tmp / "tokenizer")
        file = (self._tmp / "manifest.json").open("wb")
        file.write(json.dumps(asdict(self.manifest), indent=2, ensure_ascii=False).encode())
        close_synced(file)
        replaced = self._tmp.with_name(self._tmp.name + "-old")
        if self.out.exists():
            os.replace(self.out, replaced)
        os.replace(self._tmp, self.out)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.manifest

    def abort(self) -> None:
        """Forget everything written so far."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._tmp, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()


class Store:
    """Reads a store through memory maps; nothing is loaded before it is needed.

    Raises:
        MoaiError: not a store, an incomplete or truncated one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / "manifest.json"
        if not file.is_file():
            raise MoaiError(
                f"{self.path} is not a prepared store (no manifest.json): make one with `moai data prepare`"
            )
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise MoaiError(f"{self.path}: store format {content.get('format')!r}, this version reads {FORMAT}")
            self.manifest = Manifest(**content)
        except (json.JSONDecodeError, TypeError) as error:
            raise MoaiError(f"{file} is damaged ({error}): prepare the data again") from None
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        borders = []
        for shard in self.manifest.shards:
            for name, described in shard["files"].items():
                self._check_size(name, described["bytes"])
            stem = self.path / shard["stem"]
            dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
            self._tokens.append(np.memmap(f"{stem}.bin", dtype=dtype, mode="r"))
            borders.append(np.load(f"{stem}.idx.npy", mmap_mode="r", allow_pickle=False))
            if self.manifest.kind != "text":
                self._masks.append(np.memmap(f"{stem}.mask.bin", dtype=np.uint8, mode="r"))
        self._borders = borders
        self._first = np.cumsum([0, *(len(b) - 1 for b in borders)])
        self.fingerprint = hashlib.sha256(file.read_bytes()).hexdigest()

    def _check_size(self, name: str, expected: int) -> None:
        if "/../" in f"/{name}/" or name.startswith("/"):
            raise MoaiError(f"{self.path}: manifest names a file outside the store: {name}")
        file = self.path / name
        actual = file.stat().st_size if file.is_file() else -1
        if actual != expected:
            what = "is missing" if actual < 0 else f"has {actual:,} bytes instead of {expected:,}"
            raise MoaiError(f"{file} {what}: the store is damaged, prepare the data again")

    def __len__(self) -> int:
        return self.manifest.documents

    def lengths(self) -> np.ndarray:
        """(documents,) int64 tokens of each document."""
        return np.concatenate([np.diff(b) for b in self._borders])

    def document(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids start..stop of document i, a view of the file."""
        shard, a, b = self._span(i, start, stop)
        return self._tokens[shard][a:b]

    def learn(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The mask of what to learn in document i; None in a text store, where it is everything."""
        if not self._masks:
            return None
        shard, a, b = self._span(i, start, stop)
        return self._masks[shard][a:b]

    def _span(self, i: int, start: int, stop: int | None) -> tuple[int, int, int]:
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        begin, end = self._borders[shard][i - self._first[shard] : i - self._first[shard] + 2]
        return shard, int(begin) + start, int(end) if stop is None else int(begin) + stop

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store.

        Raises:
            MoaiError: it is not the one whose fingerprint the manifest holds.
        """
        tokenizer = load_tokenizer(self.path / "tokenizer")
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise MoaiError(f"{self.path}/tokenizer is not the tokenizer that made this store: prepare the data again")
        return tokenizer

    def problems(self) -> Iterator[str]:
        """What is wrong with the files, by checksum; nothing for a sound store."""
        for shard in self.manifest.shards:
            for name, described in shard["files"].items():
                if sha256_of(self.path / name) != described["sha256"]:
                    yield f"{self.path / name}: content does not match its checksum"


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises `MoaiError` where writing to `out` would replace something."""
    if out.exists() and not overwrite:
        raise MoaiError(f"{out} exists already: choose another place or pass --overwrite")


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def close_synced(file: IO[bytes]) -> None:
    """Close a file whose bytes are then on disk, not only in the system's cache."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
