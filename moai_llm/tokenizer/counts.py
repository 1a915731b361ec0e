"""Count what a tokenizer does to texts. The readable definitions are the properties of `Row`.

Words are segments between the word boundaries of Unicode (UAX #29) that begin with a letter, a digit or a connector.
These rules know no dictionary: where a script writes no spaces, each Han character and each hiragana is a word of its
own (Katakana runs stay whole), so that tokens per word say nothing there and tokens per character take their place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import regex

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.pieces import Vocabulary

WORD = regex.compile(r"\b(?=\w)", regex.WORD)
UNSPACED = regex.compile(r"\b(?=[\p{Han}\p{Hiragana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}])", regex.WORD)
EXCERPT = 170  # characters of each text that are shown token by token


@dataclass
class Text:
    """What was measured: the texts of one label."""

    label: str
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    unspaced_words: int = 0
    excerpt: str = ""

    @property
    def unspaced(self) -> bool:
        """Whether most words of it are single characters of a script without spaces, so that words mean little."""
        return self.unspaced_words * 2 > self.words

    def add(self, documents: Sequence[str]) -> None:
        for document in documents:
            self.documents += 1
            self.bytes += len(document.encode())
            self.characters += len(document)
            self.words += sum(1 for _ in WORD.finditer(document))
            self.unspaced_words += sum(1 for _ in UNSPACED.finditer(document))
            if len(self.excerpt) < EXCERPT // 2:
                self.excerpt = _excerpt(f"{self.excerpt}\n{document[: 4 * EXCERPT]}")


@dataclass(frozen=True)
class Row:
    """What one tokenizer does to the texts of one label.

    Attributes:
        round_trip_failures: documents that do not decode to the string they were encoded from.
        unknown_tokens: tokens that stand for "no token for this".
        byte_tokens: tokens of a single byte that is not a character by itself.
        ids_used: different ids among the tokens.
        cpu_seconds: of encoding, all threads together.
        wall_seconds: of encoding, on the clock.
        first_failure: (what was written, what came back) around the first difference.
    """

    label: str
    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    round_trip_failures: int
    unknown_tokens: int
    byte_tokens: int
    ids_used: int
    cpu_seconds: float
    wall_seconds: float
    first_failure: tuple[str, str] | None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for; NaN where there are no tokens."""
        return ratio(self.bytes, self.tokens)

    @property
    def tokens_per_word(self) -> float:
        """Fertility (Rust et al. 2021, "How Good is Your Tokenizer?"); the head of this file says what a word is."""
        return ratio(self.tokens, self.words)

    @property
    def tokens_per_character(self) -> float:
        """Tokens per Unicode code point."""
        return ratio(self.tokens, self.characters)

    @property
    def byte_share(self) -> float:
        """Share of the tokens that are single bytes of a longer character: the text the vocabulary has no piece of."""
        return ratio(self.byte_tokens, self.tokens)

    @property
    def mb_per_cpu_second(self) -> float:
        return ratio(self.bytes / 1e6, self.cpu_seconds)

    @property
    def mb_per_second(self) -> float:
        return ratio(self.bytes / 1e6, self.wall_seconds)

    def to_dict(self) -> dict[str, Any]:
        derived = ("bytes_per_token", "tokens_per_word", "tokens_per_character", "byte_share", "mb_per_cpu_second",
                   "mb_per_second")  # fmt: skip
        return {**asdict(self), **{name: _finite(getattr(self, name)) for name in derived}}


class Meter:
    """Adds up what one tokenizer does to the texts of one label."""

    def __init__(self, name: str, tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
        self.name, self.tokenizer, self.vocabulary = name, tokenizer, vocabulary
        self.counts = np.zeros(len(vocabulary), dtype=np.int64)  # (ids,)
        self.failures = 0
        self.first_failure: tuple[str, str] | None = None
        self.cpu_seconds = self.wall_seconds = 0.0

    def add(self, documents: Sequence[str]) -> None:
        """Encode documents, decode them again, count.

        Raises:
            MoaiError: the tokenizer cannot encode them; the message names it.
        """
        cpu, wall = time.process_time(), time.perf_counter()
        try:
            encoded = self.tokenizer.encode_batch(documents)
        except Exception as error:  # the libraries raise plain Exception
            raise MoaiError(f"tokenizer {self.name} cannot encode the text: {error}") from None
        self.cpu_seconds += time.process_time() - cpu
        self.wall_seconds += time.perf_counter() - wall
        ids_of_batch = np.fromiter(chain.from_iterable(encoded), dtype=np.int64)
        self.counts += np.bincount(ids_of_batch, minlength=len(self.counts))
        for document, ids in zip(documents, encoded):
            came_back = self.tokenizer.decode(ids)
            if came_back != document:
                self.failures += 1
                self.first_failure = self.first_failure or _difference(document, came_back)

    def row(self, text: Text, timed: bool = True) -> Row:
        unknown, single = self.vocabulary.unknown, self.single_bytes
        return Row(
            text.label, text.documents, text.bytes, text.characters, text.words, int(self.counts.sum()),
            self.failures, 0 if unknown is None else int(self.counts[unknown]), int(self.counts[single].sum()),
            int((self.counts > 0).sum()), self.cpu_seconds if timed else 0.0, self.wall_seconds if timed else 0.0,
            self.first_failure,
        )  # fmt: skip

    @cached_property
    def single_bytes(self) -> np.ndarray:
        """(n,) int64: ids of single bytes that are part of a longer character."""
        found = [i for i, data in enumerate(self.vocabulary.bytes_of) if len(data) == 1 and data[0] >= 0x80]
        return np.asarray(found, dtype=np.int64)


def _excerpt(document: str) -> str:
    """The beginning of a document, cut behind a line, a sentence or a word where one ends near the limit."""
    text = document.strip()
    if len(text) <= EXCERPT:
        return text
    for ends in ("\n", ".。！？!?", " 、，,"):
        cut = max(text.rfind(end, EXCERPT // 2, EXCERPT) for end in ends)
        if cut > 0:
            return text[: cut + 1].rstrip()
    return "".join(regex.findall(r"\X", text[:EXCERPT])[:-1])


def _difference(written: str, came_back: str) -> tuple[str, str]:
    """Both strings around the place where they first differ."""
    pairs = zip(written, came_back)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(written), len(came_back)))
    start = max(0, place - 16)
    return written[start : place + 24], came_back[start : place + 24]


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
