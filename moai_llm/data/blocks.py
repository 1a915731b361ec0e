"""What is done to the records of a source on their way into a store, and the blocks of tokens that come of it.

A block is a few hundred documents, with all that is to be counted of them. It depends on the job and on its slice of
the sources alone, never on which process makes it, or on what was made before.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from moai_llm.data.code import CodeOptions, encode_documents
from moai_llm.data.shards import Kind
from moai_llm.data.sources import Piece, Reading, Record, Skipped, Source, read_piece, read_records
from moai_llm.data.sources.columns import reading_of_texts, rename, text_of
from moai_llm.data.sources.records import Account
from moai_llm.data.writer import token_dtype
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moai_llm.data.clean import Cleaner
    from moai_llm.data.embedding_records import EmbeddingOptions
    from moai_llm.data.sft import ChatOptions, Detected, Encoded

BATCH, BATCH_SIZE = 256, 1 << 20  # records in a block, or their characters: whichever is reached first
CODE, FILLED, CUT = 1, 2, 4  # marks of documents: source code, rearranged to fill in the middle, a part is missing
Part = Literal["train", "valid"]
Item = tuple[Any, str]  # a text, a conversation, a pair or texts that belong together; and its place


@dataclass(frozen=True)
class Job:
    """What to do with records; it can be pickled.

    Attributes:
        every: of so many documents the first is held out; 0 for none.
        few: there are fewer texts than that, and the end of each is held out.
        part: only what is held out, or only what is not; both when None.
    """

    tokenizer: Tokenizer
    kind: Kind = "text"
    reading: Reading = field(default_factory=Reading)
    code: CodeOptions = field(default_factory=CodeOptions)
    chat: ChatOptions | None = None
    embedding: EmbeddingOptions | None = None
    clean: Cleaner | None = None
    every: int = 0
    few: bool = False
    part: Part | None = None

    @property
    def needs_numbers(self) -> bool:
        """Whether the work on a document depends on its number."""
        return self.code.fim is not None or self.part is not None

    def held_out(self, numbers: np.ndarray) -> np.ndarray:
        """(records,) bool by their numbers."""
        return numbers % self.every == 0 if self.every else np.zeros(len(numbers), bool)


class Block(NamedTuple):
    """Documents of consecutive records, and what is to be counted.

    Attributes:
        records: how many of the source they were.
        held: (records,) whether they are held out, where their numbers do not say it: then each stands twice, what is
            left of it and, behind all those, what is held out of it.
        ids: (tokens,) of all documents, one after the other.
        learn: (tokens,) uint8; None in a store of text.
        lengths, text_bytes, record, marks: (documents,) tokens; bytes of text; which of the records; see `CODE`.
        dropped: (record, reason).
        broken: records that turned out broken only when they were to be encoded, and are counted as skipped.
        of: the file and where in it, if lines are counted from the beginning of a piece.
        unclean: by the rule that dropped them; they are not among the records.
        bytes_read: of the source as it is stored.
        lines: that its piece of the source has; known in the last block.
        is_last: of its slice.
    """

    records: int
    held: np.ndarray | None
    ids: np.ndarray
    learn: np.ndarray | None
    lengths: np.ndarray
    text_bytes: np.ndarray
    record: np.ndarray
    marks: np.ndarray
    dropped: list[tuple[int, str]]
    broken: list[int]
    of: tuple[str, int] = ("", 0)
    skipped: Account = Account([], [])
    unclean: dict[str, int] = {}
    bytes_read: int = 0
    lines: int = 0
    is_last: bool = False


class PieceError(MoaiError):
    """A mistake in a piece of a file; what the message says of a line is counted from the beginning of the piece."""

    def __init__(self, message: str, of: tuple[str, int]) -> None:
        super().__init__(message)
        self.of = of


class Tally:
    """What happens beside the records while they are read."""

    def __init__(self, reading: Reading, skipped: Skipped | None = None) -> None:
        self.skipped = Skipped(reading.skip_bad) if skipped is None else skipped
        self.unclean: Counter[str] = Counter()
        self.bytes_read = self.lines = 0
        self.reading = replace(reading, progress=self._read)

    def _read(self, count: int) -> None:
        self.bytes_read += count

    def take(self) -> dict[str, Any]:
        """What was counted since the last time, as fields of a block."""
        taken = {"skipped": self.skipped.take(), "unclean": dict(self.unclean), "bytes_read": self.bytes_read}
        self.unclean.clear()
        self.bytes_read = 0
        return taken


class Encoder:
    """Slices to blocks.

    Args:
        threads: for tokenising.
    """

    def __init__(self, job: Job, threads: int = 1) -> None:
        self.job, self._threads = job, threads
        self._shapes: dict[str, Detected] = {}  # of the source that was read last, if it was cut

    def blocks(self, pieces: Sequence[Piece], *, number: int = 0, skip: int = 0) -> Iterator[Block]:
        """The blocks of a slice; at least one, the last.

        Args:
            number: of its first record in the whole, where the job needs it.
            skip: so many records were seen to by an earlier run, which counted what lay between them.
        """
        of = (pieces[0].source.name, pieces[0].begin) if pieces[0].unit == "bytes" else ("", 0)
        tally = Tally(self.job.reading)
        items = self.items(pieces, tally)
        try:
            if sum(1 for _ in islice(items, skip)) < skip:
                raise MoaiError(f"{pieces[0].source.name} has fewer records than a moment ago: --fresh begins anew")
            tally.take()
            for block in encode_items(self.job, items, tally.skipped, number=number + skip, threads=self._threads):
                yield block._replace(of=of, **tally.take())
        except MoaiError as error:
            if not of[0]:
                raise
            raise PieceError(str(error), of) from None
        yield _Found(self.job).block(0)._replace(of=of, **tally.take(), lines=tally.lines, is_last=True)

    def count(self, pieces: Sequence[Piece]) -> int:
        """The records of a slice. What is broken is not counted; it is an error when its turn comes."""
        return sum(1 for _ in self.items(pieces, Tally(replace(self.job.reading, skip_bad=True))))

    def items(self, pieces: Sequence[Piece], tally: Tally) -> Iterator[Item]:
        """The records of a slice as what is to be encoded."""
        job, mapping = self.job, self.job.reading.mapping
        if job.kind == "text":
            texts = _texts(pieces, tally)
            return texts if job.clean is None else _cleaned(texts, job.clean, tally.unclean)
        from moai_llm.data.sft import read_conversations, read_pairs

        records = _records(pieces, tally)
        if job.kind == "preference":
            return read_pairs(records, tally.skipped, mapping)
        if job.kind == "embedding":
            from moai_llm.data.embedding_records import read_related

            return read_related(records, tally.skipped, mapping, job.embedding)
        return read_conversations(records, tally.skipped, mapping, dict(self._known_shapes(pieces[0])))

    def _known_shapes(self, piece: Piece) -> dict[str, Detected]:
        """The shape of a source whose first records are in another piece of it."""
        if piece.begin == 0:
            return {}
        if piece.source.name not in self._shapes:
            from moai_llm.data.sft.detect import detect, first_records

            reading = replace(self.job.reading, progress=None)
            records = first_records(read_records([piece.source], reading))
            self._shapes = {piece.source.name: detect(records, reading.mapping)} if records else {}
        return self._shapes


def _texts(pieces: Sequence[Piece], tally: Tally) -> Iterator[Item]:
    reading = reading_of_texts(tally.reading, None)
    for record in _all(pieces, tally, reading):
        text = text_of(record, reading, tally.skipped)
        if text is not None:
            yield text, record.place


def _records(pieces: Sequence[Piece], tally: Tally) -> Iterator[Record]:
    reading = tally.reading
    for record in _all(pieces, tally, reading):
        renamed = rename(record, reading.mapping, tally.skipped) if reading.mapping else record
        if renamed is not None:
            yield renamed


def _all(pieces: Sequence[Piece], tally: Tally, reading: Reading) -> Generator[Record, None, None]:
    for piece in pieces:
        tally.lines += yield from read_piece(piece, reading, tally.skipped)


def _cleaned(texts: Iterable[Item], clean: Cleaner, unclean: Counter[str]) -> Iterator[Item]:
    for text, place in texts:
        cleaned = clean(text, place)
        if isinstance(cleaned, str):
            yield cleaned, place
        else:
            unclean[cleaned.rule] += 1


# ---------------------------------------------------------------- encoding


def encode_items(
    job: Job, items: Iterable[Item], skipped: Skipped, *, number: int = 0, threads: int = 1
) -> Iterator[Block]:
    """Blocks of texts, conversations or pairs.

    Args:
        skipped: is told of conversations that the chat template has no form for.
        number: of the first one.
    """
    for batch in _batched(items):
        if job.kind == "text":
            yield _encode_texts(job, batch, number, threads)
        else:
            yield _encode_chats(job, batch, number, skipped)
        number += len(batch)


def _batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item[0]) if isinstance(item[0], str) else 0
        if len(batch) == BATCH or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_texts(job: Job, batch: list[Item], number: int, threads: int) -> Block:
    numbers = np.arange(number, number + len(batch))
    held = job.held_out(numbers)
    texts = [text for text, _ in batch]
    if job.few:
        cut = [len(text) - len(text) // job.every for text in texts]
        texts = [text[:at] for text, at in zip(texts, cut)] + [text[at:] for text, at in zip(texts, cut)]
        batch, numbers = [*batch, *batch], np.concatenate([numbers, numbers])
        held = np.arange(len(batch)) >= len(batch) // 2
    elif job.every:
        numbers = numbers - numbers // job.every - 1  # among those that are not held out
    wanted = held == (job.part == "valid") if job.part else np.ones(len(batch), bool)
    kept = [i for i in np.flatnonzero(wanted).tolist() if texts[i].strip()]
    given = [(None if held[i] else int(numbers[i]), texts[i], batch[i][1]) for i in kept]
    documents = list(encode_documents(job.tokenizer, given, job.code, threads=threads))
    found = _Found(job)
    for document in documents:
        mark = CODE * document.is_code + FILLED * document.is_filled
        found.add(document.ids, None, document.text_bytes, kept[document.text], mark)
    missing = set(np.flatnonzero(wanted).tolist()) - set(kept)
    records = len(batch) // 2 if job.few else len(batch)
    return found.block(records, held if job.few else None, [(i, "empty") for i in sorted(missing)])


def _encode_chats(job: Job, batch: list[Item], number: int, skipped: Skipped) -> Block:
    from moai_llm.data.sft.encode import Dropped

    encode, batch = _record_encoder(job, batch)
    held = job.held_out(np.arange(number, number + len(batch)))
    found, dropped, broken = _Found(job), list[tuple[int, str]](), list[int]()
    for i, (record, place) in enumerate(batch):
        if job.part and held[i] != (job.part == "valid"):
            continue
        try:
            encoded = encode(record)
        except Dropped as reason:
            dropped.append((i, str(reason)))
        except MoaiError as error:
            skipped.bad(place.rpartition(":")[0], place, "no form in the chat template", f": {error}")
            broken.append(i)
        else:
            for one in encoded:
                mark = CUT if one.cut and one is encoded[0] else 0
                found.add(np.array(one.ids, np.uint32), np.array(one.learn, np.uint8), one.text_bytes, i, mark)
    return found.block(len(batch), None, dropped, broken)


def _record_encoder(job: Job, batch: list[Item]) -> tuple[Callable[[Any], list[Encoded]], list[Item]]:
    """What makes documents of a record, and the records."""
    if job.kind != "embedding":
        from moai_llm.data.sft import encode_record

        return lambda record: encode_record(job.tokenizer, record, job.chat), batch
    from moai_llm.data.embedding_records import Augmenter
    from moai_llm.data.embedding_store import encode_related

    if job.embedding is not None and job.embedding.augment:
        made = Augmenter(job.embedding.augment)([record for record, _ in batch])
        batch = [(record, place) for record, (_, place) in zip(made, batch)]
    return lambda record: encode_related(job.tokenizer, record, job.embedding), batch


class _Found:
    """The documents of a block, as they are found."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._ids: list[np.ndarray] = []
        self._learn: list[np.ndarray] = []
        self._facts: list[tuple[int, int, int, int]] = []

    def add(self, ids: np.ndarray, learn: np.ndarray | None, text_bytes: int, record: int, mark: int) -> None:
        self._ids.append(ids)
        if learn is not None:
            self._learn.append(learn)
        self._facts.append((len(ids), text_bytes, record, mark))

    def block(
        self, records: int, held: np.ndarray | None = None, dropped: Sequence[tuple[int, str]] = (),
        broken: Sequence[int] = (),
    ) -> Block:  # fmt: skip
        facts = np.array(self._facts, np.int64).reshape(-1, 4).T
        dtype = token_dtype(self._job.tokenizer)
        ids = np.concatenate([np.zeros(0, dtype), *self._ids], dtype=dtype, casting="unsafe")
        learn = None
        if self._job.kind != "text":
            learn = np.concatenate([np.zeros(0, np.uint8), *self._learn])
        lengths, text_bytes, record, marks = facts
        return Block(records, held, ids, learn, lengths, text_bytes, record, marks, list(dropped), list(broken))


@contextmanager
def few_collections() -> Iterator[None]:
    """Records have no cycles; looking for them as often as Python does by itself is 7 % of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def read_ahead(source: Source) -> Source:
    """A source that can be read once, so that its first records can be looked at before: a second reading begins with
    them. What follows them is not kept.
    """
    kept = _Kept(source)
    return source._replace(read=kept.read)


class _Kept:
    def __init__(self, source: Source) -> None:
        self._source, self._seen, self._readings = source, list[tuple[Record | None, Account]](), 0

    def read(self, reading: Reading, skipped: Skipped) -> Iterator[Record]:
        if not self._readings:
            self._own = Skipped(reading.skip_bad)
            self._records = iter(self._source.read(reading, self._own))
        self._readings += 1
        for record, account in self._seen:
            skipped.absorb(account)
            if record is not None:
                yield record
        while True:
            record = next(self._records, None)
            account = self._own.take()
            if self._readings == 1:
                self._seen.append((record, account))
            skipped.absorb(account)
            if record is None:
                return
            yield record
