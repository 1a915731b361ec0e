"""The token store on disk ("data cache"): what is in it, and its reader. `writer.py` makes one.

    store/
      manifest.json          what is in it, written last
      tokenizer/             the tokenizer that made it
      shards/00000.bin       little-endian uint16 or uint32 token ids, document after document
      shards/00000.idx.npy   int64 document borders, from 0 to the number of tokens
      shards/00000.mask.bin  all but text stores: uint8, 1 where the token is one to learn; see `embedding_store.py`

A merged store (`merge.py`) has no shards: its manifest names other stores, its parts, and their shares of the rows. It
reads as their documents one after the other.

A store is written beside its final name and renamed, so a directory with a manifest is complete. What is damaged is
refused where it is met: manifest and sizes when a store is opened, borders by their checksum when a document is first
read, and ids that the vocabulary does not have with the document that holds them. Damage inside tokens and masks that
leaves valid ones shows in the checksums alone, and only `verify.py` reads those.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from moai_llm.data.borders import border_problems, open_borders
from moai_llm.data.manifest import BYTES, FORMAT, damaged, read_manifest, sha256_of
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer

# documents, conversations, pairs of them (`preference.py`), texts that belong together (`embedding_store.py`)
Kind = Literal["text", "chat", "preference", "embedding"]


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
    parts: list[dict[str, Any]] = field(default_factory=list)  # of a merged store: path, weight, manifest, ...
    strategy: str = ""  # that gave the parts their weights
    tokenizer_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    digest: str = ""  # of the manifest without it; none in stores of older versions


class Part(NamedTuple):
    store: Store
    weight: float  # its share of the rows; those of all parts sum to 1


class Store:
    """Reads a store through memory maps; nothing is loaded before it is needed.

    Raises:
        MoaiError: not a store, a damaged one, or one merged of stores that are not there or not the same any more.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content, self.fingerprint = read_manifest(self.path / "manifest.json")
        try:
            self.manifest = Manifest(**content)
        except TypeError as error:
            raise damaged(self.path / "manifest.json", str(error)) from None
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        for shard in self.manifest.shards:
            for name, described in shard["files"].items():
                self._check_size(name, described["bytes"])
            stem = self.path / shard["stem"]
            self._tokens.append(np.memmap(f"{stem}.bin", dtype=dtype, mode="r").view(np.ndarray))
            if self.manifest.kind != "text":
                self._masks.append(np.memmap(f"{stem}.mask.bin", dtype=np.uint8, mode="r").view(np.ndarray))
        self._parts = [Part(self._open_part(part), part["weight"]) for part in self.manifest.parts]
        members = self.manifest.shards or self.manifest.parts
        self._first = np.cumsum([0, *(member["documents"] for member in members)])
        self._may_overflow = self.manifest.vocab_size < 2 ** (8 * BYTES[self.manifest.dtype])

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        actual = file.stat().st_size if file.is_file() else -1
        if actual != expected:
            what = "is missing" if actual < 0 else f"has {actual:,} bytes instead of {expected:,}"
            raise MoaiError(f"{file} {what}: the store is damaged, prepare the data again")

    def _open_part(self, part: dict[str, Any]) -> Store:
        """A plain store that this merged one names: recognised by the checksum of its manifest, wherever it lies."""
        path = part_path(self.path, part["path"])
        if not (path / "manifest.json").is_file():
            raise MoaiError(f"{self.path} is merged of {path}, and there is no store: put it back, or merge again")
        store = None if sha256_of(path / "manifest.json") != part["manifest"] else Store(path)
        if store is None or store.merged:
            raise MoaiError(f"{path} is not the store that {self.path} was merged of: merge again")
        ours, theirs = self.manifest, store.manifest
        kinds = ("text", "chat") if ours.kind == "chat" else (ours.kind,)
        if theirs.kind not in kinds or any(
            getattr(ours, key) != getattr(theirs, key) for key in ("tokenizer", "vocab_size", "dtype")
        ):
            raise MoaiError(f"{self.path} cannot be merged of {path}, of another kind or tokenizer: merge again")
        return store

    def __len__(self) -> int:
        return self.manifest.documents

    @property
    def merged(self) -> bool:
        """Whether it has no documents of its own and draws from other stores."""
        return bool(self._parts)

    def lengths(self) -> np.ndarray:
        """(documents,) int64 tokens of each document."""
        if self._parts:
            return np.concatenate([part.store.lengths() for part in self._parts])
        return np.concatenate([np.diff(borders) for borders in self._borders])

    def document(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids start..stop of document i, a view of the file.

        Raises:
            MoaiError: the file is damaged, and holds what is no token.
        """
        member, i = self._find(i)
        if self._parts:
            return self._parts[member].store.document(i, start, stop)
        a, b = self._span(member, i, start, stop)
        ids = self._tokens[member][a:b]
        if self._may_overflow and ids.size and ids.max() >= self.manifest.vocab_size:
            at = a + int((ids >= self.manifest.vocab_size).argmax())
            raise damaged(
                self.path / f"{self.manifest.shards[member]['stem']}.bin",
                f"token {at:,} is {self._tokens[member][at]:,}, and the vocabulary has {self.manifest.vocab_size:,}",
            )
        return ids

    def learn(self, i: int, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """The mask of what to learn in document i; None in a text store, where it is everything."""
        if self.manifest.kind == "text":
            return None
        member, i = self._find(i)
        if self._parts:
            store = self._parts[member].store
            mask = store.learn(i, start, stop)
            if mask is None:  # a text among conversations
                return np.ones(len(store.document(i, start, stop)), np.uint8)
            return mask
        a, b = self._span(member, i, start, stop)
        return self._masks[member][a:b]

    def _find(self, i: int) -> tuple[int, int]:
        """(the shard or part that holds document i, its number there)."""
        member = int(np.searchsorted(self._first, i, side="right")) - 1
        return member, i - int(self._first[member])

    def _span(self, shard: int, i: int, start: int, stop: int | None) -> tuple[int, int]:
        begin, end = self._borders[shard][i : i + 2]
        return int(begin) + start, int(end) if stop is None else int(begin) + stop

    @cached_property
    def _borders(self) -> list[np.ndarray]:
        """Of the documents in each shard. They are compared with their checksum: one that is off by a token would shift
        what is learned without a sign.
        """
        borders = []
        for shard in self.manifest.shards:
            name = f"{shard['stem']}.idx.npy"
            of_shard = open_borders(self.path / name)
            problem = next(border_problems(of_shard, shard["documents"], shard["tokens"]), None)
            if problem is None and sha256_of(self.path / name) != shard["files"][name]["sha256"]:
                problem = "", "content does not match its checksum"
            if problem is not None:
                raise damaged(self.path / name, " ".join(problem).strip())
            borders.append(of_shard)
        return borders

    def parts(self) -> list[Part]:
        """The plain stores that this one draws from, with their shares; a plain store draws from itself."""
        return self._parts or [Part(self, 1.0)]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store.

        Raises:
            MoaiError: it is not the one whose fingerprint the manifest holds, or one of its files changed.
        """
        folder = self.path / "tokenizer"
        for name, described in self.manifest.tokenizer_files.items():
            file = self.path / name
            if not file.is_file() or sha256_of(file) != described["sha256"]:
                raise MoaiError(
                    f"{folder} is not the tokenizer that made this store ({file.name} is missing or changed): prepare "
                    "the data again"
                )
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise MoaiError(f"{folder} is not the tokenizer that made this store: prepare the data again")
        return tokenizer

    def problems(self) -> Iterator[str]:
        """What is wrong with the files, by checksum; nothing for a sound store."""
        for part in self._parts:
            yield from part.store.problems()
        for shard in self.manifest.shards:
            for name, described in shard["files"].items():
                if sha256_of(self.path / name) != described["sha256"]:
                    yield f"{self.path / name}: content does not match its checksum"


def part_path(merged: Path, path: str) -> Path:
    """Where a part lies that a merged store names: beside it, or anywhere by an absolute path."""
    return Path(os.path.normpath(merged.resolve() / path))


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises `MoaiError` where writing to `out` would replace something."""
    if out.exists() and not overwrite:
        raise MoaiError(f"{out} exists already: choose another place or pass --overwrite")


def close_synced(file: IO[bytes]) -> None:
    """Close a file whose bytes are then on disk, not only in the system's cache."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
