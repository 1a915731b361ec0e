"""The token store on disk ("data cache"): what is in it, and its reader. `writer.py` makes one.

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
Kind = Literal["text", "chat", "preference"]  # documents, conversations, pairs of them (`preference.py`)


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


class Part(NamedTuple):
    store: Store
    weight: float  # its share of the rows; those of all parts sum to 1


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

    def parts(self) -> list[Part]:
        """The stores that this one draws from, with their shares; a plain store draws from itself."""
        return [Part(self, 1.0)]

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
