"""Choose what a tokenizer learns from: a sample of bounded size in which every language has the same share.

Documents are cut into pieces of about 2,000 characters, so that no long document fills the sample. Each piece has a
number in [0, 1) that is a pure function of the seed and its place; a language keeps the pieces with the smallest
numbers that fit its budget (bottom-k sampling). So one pass over a stream of any length, in bounded memory, gives a
uniform sample, the same on every run.
"""

from __future__ import annotations

import hashlib
import heapq
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from moai_llm.runtime import MoaiError

PIECE = 2000  # characters
BYTES_PER_TOKEN = 1500  # of text in the sample for each token to learn; more changes little (docs/tokenizer.md)
HELD_OUT_SHARE, HELD_OUT_BYTES = 0.02, 1 << 18  # of a language, to measure the tokenizer on
SHORT = 1 << 17  # bytes; a language with less text holds nothing out

Progress = Callable[[str, int, int], None]  # label, documents and bytes read so far


@dataclass
class Sample:
    """Pieces of text by label (a language or domain)."""

    texts: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)  # never learned from
    read: dict[str, int] = field(default_factory=dict)  # bytes of text seen
    sizes: dict[str, int] = field(default_factory=dict)  # bytes to learn from
    documents: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """The pieces to learn from."""
        for pieces in self.texts.values():
            yield from pieces


def sample_texts(
    sources: Mapping[str, Iterable[str]],
    budget: int | None,
    *,
    share: float = 1.0,
    most_documents: int | None = None,
    seed: int = 0,
    sink: Callable[[str], object] | None = None,
    progress: Progress | None = None,
) -> Sample:
    """Sample each language once through.

    Args:
        sources: label -> documents.
        budget: bytes of text in the whole sample, None for no bound. Each label gets an equal part; one that has less
            text gives all it has.
        share: of the text to keep, before the budget counts: 0.2 takes a fifth of every language.
        most_documents: stop reading a label after so many.
        sink: gets the pieces as they come instead of the sample, for who need not hold them; without a budget only.
        progress: called after each document.

    Raises:
        MoaiError: a label without text.
    """
    sample = Sample()
    assert budget is None or sink is None
    part = sys.maxsize if budget is None else int(budget * share) // max(1, len(sources))
    for label, texts in sources.items():
        chosen = _Smallest(part) if sink is None else _Through(sink)
        held = _Smallest(HELD_OUT_BYTES)
        read = documents = 0
        for document, text in enumerate(texts):
            if documents == most_documents:
                break
            documents += 1
            for number, piece in enumerate(cut(text)):
                rank = _rank(f"{seed}/{label}/{document}/{number}")
                size = _size(piece)
                read += size
                if rank >= 1 - HELD_OUT_SHARE:
                    held.offer(rank, piece, size)
                elif rank < share * (1 - HELD_OUT_SHARE):
                    chosen.offer(rank, piece, size)
            if progress is not None:
                progress(label, documents, read)
        if read < SHORT:  # too little to set some aside
            for piece in held.kept():
                chosen.offer(0.0, piece, _size(piece))
            held = _Smallest(0)
        if chosen.used == 0:
            raise MoaiError(
                f"the tokenizer got no text for {label}: its sources are empty"
                if read == 0
                else f"the sample of {label} is empty: a share of {share:g} of {read} bytes of text is too little"
            )
        sample.texts[label], sample.held_out[label] = chosen.kept(), held.kept()
        sample.sizes[label], sample.read[label], sample.documents[label] = chosen.used, read, documents
    return sample


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """Pieces of at most `size` characters, at a line end or space where one is near the end of a piece."""
    start = 0
    while len(text) - start > size:
        end = start + size  # a space begins the next piece, as it begins a word
        border = max(text.rfind("\n", start + size // 2, end), text.rfind(" ", start + size * 9 // 10, end))
        stop = border if border > start else end
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _rank(place: str) -> float:
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=7).digest(), "big") / (1 << 56)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


class _Smallest:
    """Keeps what has the smallest ranks within a budget of bytes."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.count, self.full = budget, 0, 0, False
        self.heap: list[tuple[float, int, str, int]] = []  # largest rank first

    def offer(self, rank: float, piece: str, size: int) -> None:
        if self.full and self.heap and rank >= -self.heap[0][0]:
            return
        self.count += 1
        heapq.heappush(self.heap, (-rank, self.count, piece, size))
        self.used += size
        while self.used > self.budget and len(self.heap) > 1:
            self.full = True
            self.used -= heapq.heappop(self.heap)[3]

    def kept(self) -> list[str]:
        """In the order they came."""
        return [piece for _, _, piece, _ in sorted(self.heap, key=lambda entry: entry[1])]


class _Through:
    """Hands on what comes."""

    def __init__(self, sink: Callable[[str], object]) -> None:
        self.sink, self.used = sink, 0

    def offer(self, rank: float, piece: str, size: int) -> None:
        self.sink(piece)
        self.used += size

    def kept(self) -> list[str]:
        return []
