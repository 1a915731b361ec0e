"""Lines that many documents share: menus, cookie notices, headers. Counted over a corpus, then taken out.

After the paragraph deduplication of CCNet (arXiv 1911.00359, section 3.1), with one digest of 64 bits a line. Pass one
writes the digests to a file and counts them a range at a time, so memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np

MEMORY = 256 << 20  # bytes that counting may take
SHORTEST = 20  # characters; shorter lines repeat by chance


def line_digest(line: str, shortest: int = SHORTEST) -> int | None:
    """Of a line, whatever its case and the spaces around it; None for a line too short to count."""
    line = unicodedata.normalize("NFC", line).strip().lower()
    if len(line) < shortest:
        return None
    return int.from_bytes(hashlib.blake2b(line.encode("utf-8", "replace"), digest_size=8).digest(), "little")


class LineCounts:
    """In how many documents each line stands.

    Args:
        file: where to keep the digests meanwhile.
        most: documents that may hold the same line.
    """

    def __init__(self, file: Path, most: int, shortest: int = SHORTEST, memory: int = MEMORY) -> None:
        self._path, self.most, self.shortest, self.memory = file, most, shortest, memory
        self._waiting: list[int] = []
        self._total = 0
        self._left: dict[int, int] = {}  # digest of a line that is too frequent -> how often it may still stand
        self.removed: Counter[str] = Counter()
        file.write_bytes(b"")

    def count(self, text: str) -> None:
        """Count the lines of a document, each once."""
        self._waiting += {d for line in text.split("\n") if (d := line_digest(line, self.shortest)) is not None}
        if len(self._waiting) >= 1 << 16:
            self._flush()

    def _flush(self) -> None:
        with self._path.open("ab") as file:
            np.array(self._waiting, np.uint64).tofile(file)
        self._total += len(self._waiting)
        self._waiting.clear()

    def finish(self) -> int:
        """Find the lines that stand in too many documents; returns how many lines those are."""
        self._flush()
        parts = max(1, -(-self._total * 24 // self.memory))
        width = 2**64 // parts
        for part in range(parts):
            low, high = np.uint64(part * width), np.uint64((part + 1) * width - 1 if part < parts - 1 else 2**64 - 1)
            found = []
            with self._path.open("rb") as file:
                while len(block := np.fromfile(file, np.uint64, max(1024, min(1 << 20, self.memory // 32)))):
                    found.append(block[(block >= low) & (block <= high)])
            values, counts = np.unique(np.concatenate(found or [np.zeros(0, np.uint64)]), return_counts=True)
            self._left.update((int(value), self.most) for value in values[counts > self.most])
        self._path.unlink()
        return len(self._left)

    def remove(self, text: str) -> str:
        """The text without the lines that stood in `most` documents before."""
        if not self._left:
            return text
        kept, seen = [], set()
        for line in text.split("\n"):
            digest = line_digest(line, self.shortest)
            if digest in self._left:
                if self._left[digest] <= 0:
                    self.removed[line.strip()[:100]] += 1
                    if len(self.removed) > 1000:
                        self.removed = Counter(dict(self.removed.most_common(500)))
                    continue
                seen.add(digest)
            kept.append(line)
        for digest in seen:
            self._left[digest] -= 1
        return "\n".join(kept)
