"""Tokenizers side by side: how short they make a text, whether they give it back, and what their vocabulary is.

One pass over the texts, in which the tokenizers take turns on the same batches. The texts may be endless: counts are
kept, and a short excerpt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.counts import Meter, Row, Text, ratio
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.pieces import Piece, Vocabulary

BATCH_DOCUMENTS, BATCH_CHARACTERS = 256, 1 << 19  # encoded at a time
LONGEST_BAR = 24  # bytes; longer tokens are counted together in a histogram of lengths
ALL = "all"  # the label of the sum
# (before, after): what makes the split of a text take other pieces, such as a letter of another kind or a sign
BESIDE = (("", "s"), ("", "S"), ("", "の"), ("", "1"), (";", ""), ("a", ""), ("1", ""), (" ", ""), ("", "\n"))
Progress = Callable[[str, int], None]  # the label being read and its bytes so far


@dataclass(frozen=True)
class Entry:
    """One tokenizer of a report.

    Attributes:
        rows: one a label, in the order of the texts; `total` is their sum.
        unreachable: ids that their own text does not give, alone or beside another character (after Land and Bartolo
            2024, "Fishing for Magikarp"); None where tokens are not plain bytes of the text.
        longest: the longest ordinary token of the vocabulary.
        vocabulary_lengths: tokens of the vocabulary by length, 1 .. LONGEST_BAR bytes, the last for all that are
            longer too.
        text_lengths: tokens of the texts by length, likewise.
        coverage: (k, share of all tokens that the k most frequent ids make up), k in steps up to all ids used.
        ids_for_share: how many of the most frequent ids make up half, nine tenths, and all but a hundredth of the
            tokens.
        parity: tokens of translations of the same text, relative to the first of them.
        samples: label -> the tokens of its excerpt.
    """

    name: str
    kind: str
    vocab_size: int
    special_tokens: int
    fingerprint: str
    rows: list[Row]
    total: Row
    unreachable: int | None
    longest: Piece
    longest_bytes: int
    vocabulary_lengths: list[int]
    text_lengths: list[int]
    coverage: list[tuple[int, float]]
    ids_for_share: dict[str, int]
    parity: dict[str, float]
    samples: dict[str, list[Piece]]

    @property
    def unused_share(self) -> float:
        """Share of the vocabulary that is in none of the texts."""
        return 1 - self.total.ids_used / self.vocab_size

    @property
    def lossless(self) -> bool:
        return self.total.round_trip_failures == 0

    def to_dict(self) -> dict[str, Any]:
        known = ("name", "kind", "vocab_size", "special_tokens", "fingerprint", "unused_share", "unreachable",
                 "vocabulary_lengths", "text_lengths", "coverage",
                 "ids_for_share", "parity")  # fmt: skip
        longest = {"id": self.longest.id, "text": self.longest.text, "bytes": self.longest_bytes}
        samples = {label: [[piece.id, piece.text] for piece in pieces] for label, pieces in self.samples.items()}
        rows = {"rows": [row.to_dict() for row in self.rows], "total": self.total.to_dict()}
        return {**{name: getattr(self, name) for name in known}, "longest": longest, **rows, "samples": samples}


@dataclass(frozen=True)
class Report:
    """Tokenizers side by side on the same texts. `timed` is false where speeds were left out."""

    texts: list[Text]
    entries: list[Entry]
    parallel: list[str] = field(default_factory=list)
    timed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Everything in the report, as JSON holds it; a number that is not defined is None."""
        texts = [{**asdict(text), "unspaced": text.unspaced} for text in self.texts]
        words = "segments between the word boundaries of UAX #29 that begin with a letter, digit or connector"
        entries = [entry.to_dict() for entry in self.entries]
        return {"words_are": words, "parallel": self.parallel, "texts": texts, "tokenizers": entries}


def measure(tokenizer: Tokenizer, texts: Mapping[str, Iterable[str]]) -> list[Row]:
    """What a tokenizer does to texts, one row a label and the sum as the last.

    Args:
        texts: label, such as a language or a domain -> documents.

    Raises:
        MoaiError: a label has no text, or the tokenizer cannot encode it.
    """
    entry = compare({"under test": tokenizer}, texts, details=False).entries[0]
    return [*entry.rows, entry.total]


def compare(
    tokenizers: Mapping[str, Tokenizer],
    texts: Mapping[str, Iterable[str]],
    *,
    parallel: Sequence[str] = (),
    timed: bool = True,
    details: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Measure tokenizers on the same texts, batch by batch in turns.

    Args:
        tokenizers: name -> tokenizer.
        texts: label -> documents; read once, never held as a whole.
        parallel: labels whose texts are translations of each other; the first is what the others are compared with.
        timed: false leaves the speeds out, and the report of the same texts is the same each time.
        details: false leaves out what costs a look at the whole vocabulary (unreachable ids, fingerprint).

    Raises:
        MoaiError: a label has no text or is the name of the sum, or a tokenizer cannot encode.
    """
    if ALL in texts:
        raise MoaiError(f"{ALL!r} is the name of the sum of all texts: give another label")
    vocabularies = {name: Vocabulary(tokenizer) for name, tokenizer in tokenizers.items()}
    check(tokenizers)
    stats: list[Text] = []
    meters: dict[str, list[Meter]] = {name: [] for name in tokenizers}
    for label, documents in texts.items():
        text = Text(label)
        turn = [Meter(name, tokenizers[name], vocabularies[name]) for name in tokenizers]
        for batch in _batches(documents):
            text.add(batch)
            for meter in turn:
                meter.add(batch)
            if progress is not None:
                progress(label, text.bytes)
        if text.bytes == 0:
            raise MoaiError(f"{label}: there is no text to measure")
        stats.append(text)
        for meter in turn:
            meters[meter.name].append(meter)
    parallel = [label for label in parallel if label in texts]
    entries = [_entry(meters[name], stats, parallel, timed, details) for name in tokenizers]
    return Report(stats, entries, list(parallel) if len(parallel) > 1 else [], timed)


def check(tokenizers: Mapping[str, Tokenizer]) -> None:
    """Encode and decode a little with each, which also builds what they build on first use.

    Raises:
        MoaiError: one of them cannot; the message names it.
    """
    for name, tokenizer in tokenizers.items():
        try:
            tokenizer.decode(tokenizer.encode("a 가 あ 中 1\n"))
        except Exception as error:  # the libraries raise plain Exception
            raise MoaiError(f"tokenizer {name} cannot encode text: {error}") from None


def _entry(meters: list[Meter], texts: list[Text], parallel: Sequence[str], timed: bool, details: bool) -> Entry:
    tokenizer, vocabulary = meters[0].tokenizer, meters[0].vocabulary
    rows = [meter.row(text, timed) for meter, text in zip(meters, texts)]
    counts = sum((meter.counts for meter in meters), np.zeros(len(vocabulary), dtype=np.int64))
    lengths = np.asarray([len(data) for data in vocabulary.bytes_of], dtype=np.int64)
    bars = np.minimum(lengths, LONGEST_BAR)
    coverage, ids_for_share = _coverage(counts)
    longest = int(lengths.argmax()) if len(lengths) else 0
    tokens = {row.label: row.tokens for row in rows}
    return Entry(
        name=meters[0].name,
        kind=vocabulary.kind,
        vocab_size=tokenizer.vocab_size,
        special_tokens=len(tokenizer.special_ids),
        fingerprint=tokenizer.fingerprint if details else "",
        rows=rows,
        total=_sum(rows, int((counts > 0).sum())),
        unreachable=_unreachable(tokenizer, vocabulary) if details else None,
        longest=vocabulary.piece(longest),
        longest_bytes=int(lengths[longest]),
        vocabulary_lengths=np.bincount(bars, minlength=LONGEST_BAR + 1)[1:].tolist(),
        text_lengths=np.bincount(bars, weights=counts, minlength=LONGEST_BAR + 1)[1:].astype(int).tolist(),
        coverage=coverage,
        ids_for_share=ids_for_share,
        parity={label: ratio(tokens[label], tokens[parallel[0]]) for label in parallel},
        samples={text.label: list(vocabulary.pieces(tokenizer.encode(text.excerpt))) for text in texts},
    )


def _sum(rows: list[Row], ids_used: int) -> Row:
    names = ("documents", "bytes", "characters", "words", "tokens", "round_trip_failures", "unknown_tokens",
             "byte_tokens", "cpu_seconds", "wall_seconds")  # fmt: skip
    sums = {name: sum(getattr(row, name) for row in rows) for name in names}
    failure = next((row.first_failure for row in rows if row.first_failure), None)
    return Row(label=ALL, ids_used=ids_used, first_failure=failure, **sums)


def _unreachable(tokenizer: Tokenizer, vocabulary: Vocabulary) -> int | None:
    """See `Entry.unreachable`. Tokens that are not whole characters cannot be asked for by text and are not counted."""
    if not vocabulary.exact:
        return None
    texts_of = {}
    for i, data in enumerate(vocabulary.bytes_of):
        with suppress(UnicodeDecodeError):
            texts_of[i] = data.decode("utf-8")
    ids = [i for i, text in texts_of.items() if text]
    lost = 0
    for start in range(0, len(ids), 8192):
        some = ids[start : start + 8192]
        for own, tokens in zip(some, tokenizer.encode_batch([texts_of[i] for i in some])):
            if b"".join(vocabulary.bytes_of[i] for i in tokens) != vocabulary.bytes_of[own]:
                return None  # it changes the text first, for instance by a space in front
            lost += tokens != [own] and not any(own in tokenizer.encode(a + texts_of[own] + b) for a, b in BESIDE)
    return lost


def _coverage(counts: np.ndarray) -> tuple[list[tuple[int, float]], dict[str, int]]:
    """See `Entry.coverage` and `Entry.ids_for_share`."""
    used = np.sort(counts[counts > 0])[::-1]
    if not len(used):
        return [], {}
    share = np.cumsum(used) / used.sum()
    steps = sorted({min(len(used), round(10 ** (i / 6))) for i in range(6 * 7)})
    wanted = {str(part): int(np.searchsorted(share, part)) + 1 for part in (0.5, 0.9, 0.99)}
    return [(k, round(float(share[k - 1]), 6)) for k in steps], wanted


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in batches of bounded size. A lone surrogate, which UTF-8 cannot hold, is counted as U+FFFD."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        characters += len(document)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def price_table(rows: Sequence[Row]) -> Table:
    """The rows of `measure` for a terminal: what each label costs in tokens, and what did not come back."""
    table = Table(box=None, pad_edge=False)
    for name in (
        "text",
        "bytes per token",
        "tokens per word",
        "tokens per character",
        "single bytes",
        "not given back",
    ):
        table.add_column(name, justify="left" if name == "text" else "right")
    for row in rows:
        failures = f"{row.round_trip_failures:,} of {row.documents:,}" if row.round_trip_failures else "0"
        numbers = (row.bytes_per_token, row.tokens_per_word, row.tokens_per_character)
        table.add_row(row.label, *map(decimal, numbers), percent(row.byte_share), failures)
    return table


def decimal(value: float) -> str:
    """Two places; – where the number is not defined."""
    return f"{value:.2f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    return f"{value:.1%}" if math.isfinite(value) else "–"
