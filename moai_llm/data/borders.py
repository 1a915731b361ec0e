"""Where each document of a shard begins: the file `*.idx.npy`, read without trusting it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moai_llm.data.manifest import damaged

BLOCK = 1 << 20  # borders looked at together
HEADER = re.compile(rb"\{'descr': '<i8', 'fortran_order': False, 'shape': \((\d+),\), \}\s*\n")  # what np.save writes


def open_borders(file: Path) -> np.ndarray:
    """(documents + 1,) int64, mapped. Of the formats of .npy only the one that we write is read, and nothing evaluated.

    Raises:
        MoaiError: it is not that.
    """
    with file.open("rb") as opened:
        head = opened.read(1 << 12)
    start = 10 + int.from_bytes(head[8:10], "little")
    found = HEADER.fullmatch(head[10:start]) if head.startswith(b"\x93NUMPY\x01\x00") else None
    if found is None:
        raise damaged(file, "its header is not that of an array of borders")
    count, size = int(found[1]), file.stat().st_size
    if not count or start + 8 * count != size:
        raise damaged(file, f"{size:,} bytes do not hold {count:,} borders")
    return np.memmap(file, dtype="<i8", mode="r", offset=start, shape=(count,)).view(np.ndarray)


def border_problems(borders: np.ndarray, documents: int, tokens: int) -> Iterator[tuple[str, str]]:
    """(position, what is wrong) of the borders of a shard, read in blocks."""
    if len(borders) != documents + 1:
        yield "", f"borders of {len(borders) - 1:,} documents, where the manifest has {documents:,}"
    if borders[0] != 0:
        yield "border 0", f"is {borders[0]:,}, not 0"
    if borders[-1] != tokens:
        yield f"border {len(borders) - 1:,}", f"is {borders[-1]:,}, where the shard has {tokens:,} tokens"
    first, count = -1, 0
    for start in range(0, len(borders) - 1, BLOCK):
        block = borders[start : start + BLOCK + 1]
        falling = np.flatnonzero(block[1:] <= block[:-1])  # not the difference: it may overflow
        if len(falling):
            first, count = (start + int(falling[0]) if first < 0 else first), count + len(falling)
    if count:
        yield (
            f"border {first + 1:,}",
            f"is {borders[first + 1]:,} after {borders[first]:,}; {count:,} in all do not rise",
        )
