"""Train a tokenizer: byte-level BPE from a table of words, and the layout every tokenizer of ours has.

Ids: 256 bytes, then merges in the order they were learned, then special tokens. So id == merge rank, which is what
lets a tiktoken twin encode with the same ids. No normaliser: text comes back byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import tokenizers
from tokenizers import AddedToken, trainers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import BYTE_OF, CHARACTER_OF, build_bpe
from moai_llm.tokenizer.chat import CHATML_JINJA
from moai_llm.tokenizer.load import END_OF_TEXT, PAD, TURN_END, TURN_START, Tokenizer
from moai_llm.tokenizer.merges import MIN_COUNT, Pairs, learn_merges
from moai_llm.tokenizer.split import O200K_SPLIT
from moai_llm.tokenizer.words import WordCounts, count_words

SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
Engine = Literal["words", "tokenizers"]


def train_tokenizer(
    texts: Iterable[str] | WordCounts,
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    engine: Engine = "words",
    fewer: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Learn `vocab_size` tokens: 256 bytes, the special tokens, and merges for the rest.

    Args:
        texts: documents, or a table of words counted before.
        engine: what learns the merges: our trainer over the words, or the `tokenizers` library, which is slower and
            gives the same merges (tests/tokenizer/test_merges.py); it needs the texts themselves.
        fewer: be content with the merges the text supports, where it supports fewer.
        progress: called with the number of merges so far.

    Raises:
        MoaiError: no text, a vocabulary too small to hold the bytes and special tokens, or larger than the text
            supports.
    """
    merges = check_vocab_size(vocab_size, special_tokens)
    seen = 0
    if engine == "tokenizers" and not isinstance(texts, WordCounts):
        pairs, seen = _by_tokenizers(texts, merges)
    else:
        words = texts if isinstance(texts, WordCounts) else count_words(texts)
        seen = words.text_bytes
        pairs = learn_merges(words, merges, progress=progress)
    if seen == 0:
        raise MoaiError("the tokenizer got no text: the sources are empty")
    if len(pairs) < merges and not fewer:
        supported = 256 + len(pairs) + len(special_tokens)
        raise MoaiError(
            f"vocab_size {vocab_size} is larger than this text supports ({seen:,} bytes give {supported}): "
            f"use --vocab-size {supported} or more text"
        )
    return build_tokenizer(pairs, special_tokens)


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> int:
    """How many merges fit beside the bytes and the special tokens.

    Raises:
        MoaiError: they do not fit, or a special token is empty or named twice.
    """
    bad = [t for t in special_tokens if not t.strip() or list(special_tokens).count(t) > 1]
    if bad:
        raise MoaiError(f"special tokens must be distinct and not blank, got {bad[0]!r} among {list(special_tokens)}")
    merges = vocab_size - 256 - len(special_tokens)
    if merges < 0:
        raise MoaiError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need "
            f"{256 + len(special_tokens)}"
        )
    return merges


def build_tokenizer(pairs: Pairs, special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A tokenizer from merges as pairs of ids (256 bytes first) and special tokens behind them."""
    names = [CHARACTER_OF[byte] for byte in range(256)]
    for left, right in pairs:
        names.append(names[left] + names[right])
    merges = [(names[left], names[right]) for left, right in pairs]
    backend = build_bpe({name: i for i, name in enumerate(names)}, merges, O200K_SPLIT)
    return with_special_tokens(backend, special_tokens)


def with_special_tokens(backend: tokenizers.Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """Special tokens last, and the roles of those whose names we know."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    roles = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD}
    roles = {role: token for role, token in roles.items() if token in special_tokens}
    chats = {TURN_START, TURN_END} <= set(special_tokens)
    return Tokenizer(backend, roles, CHATML_JINJA if chats else None)


def _by_tokenizers(texts: Iterable[str], merges: int) -> tuple[Pairs, int]:
    """(merges, bytes of text) by the `tokenizers` library, its ids mapped to ours."""
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            clean = text.encode("utf-8", "replace")
            seen += len(clean)
            yield clean.decode()

    backend = build_bpe({}, [], O200K_SPLIT)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=MIN_COUNT,
        initial_alphabet=list(BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator(counted(), trainer)
    ids = {name: byte for name, byte in BYTE_OF.items()}
    pairs = []
    for left, right in json.loads(backend.to_str())["model"]["merges"]:
        pairs.append((ids[left], ids[right]))
        ids.setdefault(left + right, len(ids))
    return pairs, seen
