"""What the shards of a store hold, read in blocks: checksums, borders, ids, masks, ends of texts, and statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moai_llm.data.borders import border_problems, open_borders
from moai_llm.data.digests import Digests
from moai_llm.data.manifest import sha256_of
from moai_llm.runtime import MoaiError

BLOCK = 1 << 20  # tokens, or borders, looked at together
Progress = Callable[[int], None]  # so many more bytes are done


class Problem(NamedTuple):
    file: str
    place: str  # in the file; "" where it is all of it
    what: str

    def __str__(self) -> str:
        return ": ".join(filter(None, self))


def check_file(file: Path, described: dict[str, Any], *, read: bool = True) -> Iterator[Problem]:
    """Whether a file is there, as large as the manifest says, and, where it is to be read, with its checksum."""
    size, expected = file.stat().st_size if file.is_file() else -1, described["bytes"]
    if size < 0:
        yield Problem(str(file), "", "is missing")
    elif size != expected:
        yield Problem(str(file), f"byte {min(size, expected):,}", f"has {size:,} bytes instead of {expected:,}")
    elif read and sha256_of(file) != described["sha256"]:
        yield Problem(str(file), "", "content does not match its checksum")


class ShardCheck:
    """Takes the shards of a store one after the other; `end` says what only all of them show.

    Args:
        eos: the end-of-text token; None where the tokenizer does not say.
        digests: gets the documents; without it only sizes are looked at.

    Attributes:
        lengths: tokens of a document -> how many documents have so many.
        used: (vocabulary,) bool, the ids that are there.
        learned: tokens that the masks mark.
    """

    def __init__(
        self, path: Path, content: dict[str, Any], eos: int | None, digests: Digests | None, progress: Progress
    ) -> None:
        self.path, self.content, self.eos, self.digests, self.progress = path, content, eos, digests, progress
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self.lengths: dict[int, int] = {}
        self.used = np.zeros(content["vocab_size"], bool)
        self.learned = self.bytes = 0
        self._documents = 0  # of the shards before
        self._inside, self._open, self._first_open, self._last_open = 0, 0, 0, False
        self._first_inside: tuple[Path, int] | None = None

    def _wrong(self, file: Path, place: str, what: str) -> None:
        self.problems.append(Problem(str(file), place, what))

    def check(self, shard: dict[str, Any]) -> None:
        """A file that is missing or of a wrong size is not read any further."""
        readable = {}
        for name, described in shard["files"].items():
            file = self.path / name
            self.problems += check_file(file, described, read=self.digests is not None)
            readable[name] = file.is_file() and file.stat().st_size == described["bytes"]
            self.bytes += described["bytes"]
            self.progress(described["bytes"])
        if self.digests is not None:
            self._contents(shard, readable, self.digests)
        self._documents += shard["documents"]

    def _contents(self, shard: dict[str, Any], readable: dict[str, bool], digests: Digests) -> None:
        stem = shard["stem"]
        files = {suffix: self.path / f"{stem}.{suffix}" for suffix in ("bin", "idx.npy", "mask.bin")}
        borders = tokens = None
        if readable.get(f"{stem}.idx.npy"):
            borders = self._borders(files["idx.npy"], shard)
        if readable.get(f"{stem}.bin"):
            dtype = np.dtype(self.content["dtype"]).newbyteorder("<")
            tokens = np.memmap(files["bin"], dtype=dtype, mode="r").view(np.ndarray)
            self._ids(files["bin"], tokens)
        if tokens is not None and borders is not None and len(tokens) == borders[-1]:
            digests.add(tokens, borders)
            if self.content["kind"] == "text" and self.eos is not None:
                self._texts(files["bin"], tokens, borders, self.eos)
        if self.content["kind"] != "text" and readable.get(f"{stem}.mask.bin"):
            self._mask(files["mask.bin"], np.memmap(files["mask.bin"], dtype=np.uint8, mode="r").view(np.ndarray))

    def _borders(self, file: Path, shard: dict[str, Any]) -> np.ndarray | None:
        """The borders, where they can be used."""
        try:
            borders = open_borders(file)
        except MoaiError:
            self._wrong(file, "byte 0", "is no array of borders that fills the file")
            return None
        problems = list(border_problems(borders, shard["documents"], shard["tokens"]))
        for place, what in problems:
            self._wrong(file, place, what)
        if problems:
            return None
        for start in range(0, len(borders) - 1, BLOCK):
            lengths = np.diff(borders[start : start + BLOCK + 1])
            for length, count in zip(*(column.tolist() for column in np.unique(lengths, return_counts=True))):
                self.lengths[length] = self.lengths.get(length, 0) + count
        return borders

    def _ids(self, file: Path, tokens: np.ndarray) -> None:
        first, count, size = -1, 0, len(self.used)
        for start, block in _blocks(tokens):
            if int(block.max()) < size:
                self.used[block] = True
                continue
            over = np.flatnonzero(block >= size)
            first, count = start + int(over[0]) if first < 0 else first, count + len(over)
            self.used[block[block < size]] = True
        if count:
            what = f"is {tokens[first]:,}, and the vocabulary has {size:,}; {count:,} such ids in all"
            self._wrong(file, f"token {first:,}", what)

    def _texts(self, file: Path, tokens: np.ndarray, borders: np.ndarray, eos: int) -> None:
        """Where end-of-text tokens stand. No text becomes one, so a document that goes on behind one is two."""
        ended = 0
        for start, block in _blocks(tokens):
            behind = np.flatnonzero(block == eos) + start + 1
            at_end = borders[np.searchsorted(borders, behind)] == behind
            ended += int(at_end.sum())
            if not at_end.all():
                self._first_inside = self._first_inside or (file, int(behind[~at_end][0]) - 1)
                self._inside += int((~at_end).sum())
        without = len(borders) - 1 - ended
        if without and not self._open:
            self._first_open = self._documents + int((tokens[borders[1:] - 1] != eos).argmax())
        self._open += without
        self._last_open = bool(tokens[-1] != eos)

    def _mask(self, file: Path, mask: np.ndarray) -> None:
        first, count, most = -1, 0, 255 if self.content["kind"] == "embedding" else 1
        for start, block in _blocks(mask):
            over = np.flatnonzero(block > most)
            if len(over):
                first, count = start + int(over[0]) if first < 0 else first, count + len(over)
            self.learned += int(np.count_nonzero(block))
        if count:
            self._wrong(file, f"token {first:,}", f"is {mask[first]}, neither 0 nor 1; {count:,} such in all")

    def end(self) -> None:
        """A chunk of source code has no end-of-text token, but the last of its file has: so has the last document."""
        if self._first_inside is not None:
            file, at = self._first_inside
            what = f"ends a text inside of a document; {self._inside:,} such in all: borders and tokens disagree"
            self._wrong(file, f"token {at:,}", what)
        if self._last_open:
            last = self.content["shards"][-1]
            what = "is the last of all texts, and not the end-of-text token"
            self._wrong(self.path / f"{last['stem']}.bin", f"token {last['tokens'] - 1:,}", what)
        if self._open:
            self.notes.append(
                f"{self._open:,} documents do not end with the end-of-text token, the first is document "
                f"{self._first_open:,}: right for chunks of source code, and for nothing else"
            )
        known = {name for shard in self.content["shards"] for name in shard["files"]}
        there = [file.relative_to(self.path).as_posix() for file in (self.path / "shards").rglob("*") if file.is_file()]
        if strays := sorted(set(there) - known):
            self.notes.append(f"{len(strays):,} files that the manifest does not name, such as {strays[0]}")


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), BLOCK):
        yield start, array[start : start + BLOCK]
