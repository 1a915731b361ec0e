"""Files to a token store: read, tokenise, write, count what was kept and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from moai_llm.data.sft import read_conversations
from moai_llm.data.shards import Manifest, StoreWriter
from moai_llm.data.sources import read_records, read_texts
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render

BATCH = 256  # documents tokenised at a time
Progress = Callable[[int, int], None]  # documents and tokens so far


@dataclass
class Report:
    """What `prepare` did; `dropped` counts records by reason."""

    manifest: Manifest
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def prepare(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    kind: Literal["text", "chat"] = "text",
    column: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Tokenise files into a store. Text documents end with the end-of-text token; conversations keep their mask.

    Raises:
        MoaiError: unreadable sources, no documents, a tokenizer that training cannot use, or conversations in which no
            assistant says anything.
    """
    if column and kind == "chat":
        raise MoaiError(
            "--column names the text of documents; the columns of conversations are known by their names: rename them"
        )
    files = [str(path) for path in paths]
    if kind == "text":
        return prepare_texts(read_texts(files, column), tokenizer, out, files, overwrite=overwrite, progress=progress)
    conversations = read_conversations(read_records(files))
    return prepare_chats(conversations, tokenizer, out, files, overwrite=overwrite, progress=progress)


def prepare_texts(
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A text store from (text, place) pairs."""
    read, dropped = 0, Counter[str]()
    with StoreWriter(out, tokenizer, "text", overwrite=overwrite) as writer:
        for batch in _batched(texts):
            kept = [text for text, _ in batch if text.strip()]
            read += len(batch)
            dropped["empty"] += len(batch) - len(kept)
            for text, ids in zip(kept, tokenizer.encode_batch(kept)):
                writer.add([*ids, tokenizer.eos_id], len(text.encode("utf-8", "replace")))
            if progress is not None:
                progress(read, writer.tokens)
        return Report(writer.close(sources), read, +dropped)


def prepare_chats(
    conversations: Iterable[tuple[list[dict[str, str]], str]],
    tokenizer: Tokenizer,
    out: str | Path,
    sources: list[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """A chat store from (messages, place) pairs."""
    read, dropped = 0, Counter[str]()
    with StoreWriter(out, tokenizer, "chat", overwrite=overwrite) as writer:
        for messages, place in conversations:
            read += 1
            if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
                dropped["no assistant turn"] += 1
                continue
            try:
                rendered = render(tokenizer, messages)
            except MoaiError as error:
                raise MoaiError(f"{place}: {error}") from None
            writer.add(
                rendered.ids, sum(len(m["content"].encode("utf-8", "replace")) for m in messages), rendered.learn
            )
            if progress is not None:
                progress(read, writer.tokens)
        if read and dropped.total() == read:
            raise MoaiError(f"none of the {read} conversations has an assistant turn to learn from")
        return Report(writer.close(sources), read, dropped)


def _batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
