"""Sources to a token store: read, tokenise, write, count what was kept and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from moai_llm.data.clean import Cleaner, cleaned_texts
from moai_llm.data.code import CodeOptions, encode_documents
from moai_llm.data.sft import ChatOptions, encode_record, read_conversations, read_pairs
from moai_llm.data.sft.encode import Dropped, refuse_all_dropped
from moai_llm.data.shards import Kind, Manifest
from moai_llm.data.sources import Reading, Skipped, Source, expand, read_records, read_texts
from moai_llm.data.writer import StoreWriter
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

BATCH, BATCH_SIZE = 256, 16 << 20  # documents tokenised at a time, or characters: whichever is reached first
Part = Literal["train", "valid"]
Document = TypeVar("Document")
Progress = Callable[[int, int], None]  # documents and tokens so far


@dataclass
class Report:
    """What `prepare` did; `dropped` counts records by reason, `skipped` what could not be read, `code` and `filled`
    documents of the store.
    """

    manifest: Manifest
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    code: int = 0  # in a language that is known
    filled: int = 0  # of them, rearranged to fill in the middle
    cut: int = 0  # conversations that were too long and lost a part


def prepare(
    sources: Iterable[str | Path | Source],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    kind: Kind = "text",
    reading: Reading | None = None,
    part: Part | None = None,
    valid_share: float = 0.02,
    code: CodeOptions | None = None,
    chat: ChatOptions | None = None,
    clean: Cleaner | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Tokenise sources into a store. Text documents end with the end-of-text token; conversations keep their mask.

    Args:
        reading: how to read: the columns' names, whether what is broken is skipped, ...
        part: only the documents that are held out (`valid`) or only the others (`train`); all when None.
        valid_share: of the documents, which are held out.
        chat: what to learn of conversations, and what to do with long ones.
        clean: texts go through it first; the report's `dropped` names the rules.
        code: what to do with source code. What is held out is never rearranged: it measures plain text.

    Raises:
        MoaiError: unreadable sources, no documents, a tokenizer that training cannot use, or conversations in which no
            assistant says anything.
    """
    if code is not None and kind != "text":
        raise MoaiError("fill-in-the-middle and chunks are for documents of source code, not for conversations")
    if clean is not None and kind != "text":
        raise MoaiError("the rules of cleaning are for documents, not for conversations")
    if not 0 < valid_share <= 0.5:
        raise MoaiError(f"the share to hold out must lie between 0 and 0.5, got {valid_share}")
    reading, every = reading or Reading(), round(1 / valid_share)
    skipped = Skipped(reading.skip_bad)
    sources = expand(sources, skipped=skipped)
    origins = list(dict.fromkeys(source.origin for source in sources))
    if kind == "text":
        texts: Iterable[tuple[str, str]] = read_texts(sources, reading=reading, skipped=skipped)
        texts = texts if part is None else split_texts(texts, part, every)
        if code is not None and part == "valid":
            code = replace(code, fim=None)
        unclean = Counter[str]()
        texts = texts if clean is None else cleaned_texts(texts, clean, unclean)
        report = prepare_texts(
            texts, tokenizer, out, origins, skipped=skipped, code=code, overwrite=overwrite, progress=progress
        )
        report.read, report.dropped = report.read + unclean.total(), report.dropped + unclean
        return report
    records = read_records(sources, reading, skipped=skipped)
    read = read_pairs if kind == "preference" else read_conversations
    conversations: Iterable[tuple[Any, str]] = read(records, skipped, reading.mapping)
    conversations = conversations if part is None else split(conversations, part, every)
    return prepare_chats(
        conversations,
        tokenizer,
        out,
        origins,
        kind=kind,
        options=chat,
        skipped=skipped,
        overwrite=overwrite,
        progress=progress,
    )


def split(documents: Iterable[Document], part: Part, every: int) -> Iterator[Document]:
    """The first of every so many documents for evaluation (`valid`), the others for training."""
    yield from (document for i, document in enumerate(documents) if (i % every == 0) == (part == "valid"))


def split_texts(texts: Iterable[tuple[str, str]], part: Part, every: int) -> Iterator[tuple[str, str]]:
    """`split`, but where there are fewer texts than that, the end of each is held out."""
    texts = iter(texts)
    first = list(islice(texts, every))
    if len(first) == every:
        yield from split(chain(first, texts), part, every)
        return
    for text, place in first:
        border = len(text) - len(text) // every
        yield (text[border:] if part == "valid" else text[:border]), place


def prepare_texts(
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    skipped: Skipped | None = None,
    code: CodeOptions | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A text store from (text, place) pairs; `skipped` is the account of whoever reads them."""
    skipped = Skipped() if skipped is None else skipped
    code = code or CodeOptions()
    code.check(tokenizer)
    read, dropped, is_code, is_filled = 0, Counter[str](), 0, 0
    with StoreWriter(out, tokenizer, "text", overwrite=overwrite) as writer:
        for batch in _batched(texts):
            kept = [(read + i, text, place) for i, (text, place) in enumerate(batch) if text.strip()]
            read += len(batch)
            dropped["empty"] += len(batch) - len(kept)
            for document in encode_documents(tokenizer, kept, code):
                writer.add(document.ids, document.text_bytes)
                is_code += document.is_code
                is_filled += document.is_filled
            if progress is not None:
                progress(read, writer.tokens)
        _refuse_nothing(read, skipped)
        return Report(writer.close(sources), read, +dropped, skipped, is_code, is_filled)


def prepare_chats(
    conversations: Iterable[tuple[Any, str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    kind: Literal["chat", "preference"] = "chat",
    options: ChatOptions | None = None,
    skipped: Skipped | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A chat store from (messages, place), by the tokenizer's chat template; messages may have `tools`. Or a store of
    preference from (pair, place), two documents each. `skipped` is the account of whoever reads them, and of what
    cannot be rendered.
    """
    skipped = Skipped() if skipped is None else skipped
    read, dropped, cut = 0, Counter[str](), 0
    with StoreWriter(out, tokenizer, kind, overwrite=overwrite) as writer:
        for record, place in conversations:
            read += 1
            try:
                encoded = encode_record(tokenizer, record, options)
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            except MoaiError as error:
                skipped.bad(place.rpartition(":")[0], place, "no form in the chat template", f": {error}")
                read -= 1
                continue
            for document in encoded:
                writer.add(document.ids, document.text_bytes, document.learn)
            cut += encoded[0].cut
            if progress is not None:
                progress(read, writer.tokens)
        refuse_all_dropped(read, dropped)
        _refuse_nothing(read, skipped)
        return Report(writer.close(sources), read, dropped, skipped, cut=cut)


def _refuse_nothing(read: int, skipped: Skipped) -> None:
    if not read and skipped.bad_count:
        first = skipped.broken()[0].example
        raise MoaiError(f"nothing could be read: {skipped.bad_count:,} skipped; the first: {first}")


def _batched(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text[0])
        if len(batch) == BATCH or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
