"""Extend a tokenizer with new merges learned on a domain's text: continued BPE.

The old merges keep their rank and every old id its meaning. New merges are learned on what the old tokenizer leaves of
the words, and get the ids after the last one, special tokens included. So the new tokenizer only joins what the old one
gave: expanding the new ids of any text gives its old ids exactly. Adding whole words as "added tokens" instead cuts
words of the general language in two, and costs tokens there (benchmarks/tokenizer.py measures both).

Works on any byte-level BPE in the format of `tokenizers`: ours, o200k_base and its kin, Qwen, Llama 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import read_bpe, spell
from moai_llm.tokenizer.load import Tokenizer
from moai_llm.tokenizer.merges import Pairs, Segment, learn_merges
from moai_llm.tokenizer.words import WordCounts, count_words

CHECKED = 20_000  # of the most frequent words, on which the result is compared with the old tokenizer


def extend_tokenizer(
    base: Tokenizer,
    texts: Iterable[str] | WordCounts,
    vocab_size: int,
    *,
    fewer: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Grow `base` to `vocab_size` ids by merges learned on `texts`.

    Args:
        texts: documents of the domain, or a table of their words that `word_counter` filled.
        fewer: be content with the merges the text supports, where it supports fewer.

    Raises:
        MoaiError: the base is not a byte-level BPE, has that many tokens already, or the text supports fewer merges.
    """
    room = new_tokens(base, vocab_size)
    words = texts if isinstance(texts, WordCounts) else WordCounts()
    if not isinstance(texts, WordCounts):
        add = word_counter(base, words)
        for text in texts:
            add(text)
    if len(words) == 0:
        raise MoaiError("the extension got no text: the sources are empty")
    tokens = [base.token_bytes(i) for i in range(base.vocab_size)]
    pairs = learn_merges(words, room, tokens=tokens, segment=_segmenter(base), progress=progress)
    if len(pairs) < room and not fewer:
        supported = base.vocab_size + len(pairs)
        raise MoaiError(
            f"--vocab-size {vocab_size:,} asks for {room:,} new tokens, but this text supports only {len(pairs):,}: "
            f"use --vocab-size {supported} or more text"
        )
    extended = _with_merges(base, pairs)
    _check(base, extended, words)
    return extended


def new_tokens(base: Tokenizer, vocab_size: int) -> int:
    """How many tokens there are to learn.

    Raises:
        MoaiError: the base is not a byte-level BPE, or has that many tokens already.
    """
    read_bpe(base.backend)
    if vocab_size <= base.vocab_size:
        raise MoaiError(
            f"the base has {base.vocab_size:,} tokens already: --vocab-size counts all tokens of the result, "
            f"so it must be larger, got {vocab_size:,}"
        )
    return vocab_size - base.vocab_size


def word_counter(base: Tokenizer, table: WordCounts) -> Callable[[str], object]:
    """What adds the words of a text to a table, split as the base splits them, its normalisation included."""
    normalizer, pattern = base.backend.normalizer, read_bpe(base.backend).pattern

    def add(text: str) -> None:
        if normalizer is not None:
            text = normalizer.normalize_str(text.encode("utf-8", "replace").decode("utf-8"))
        count_words([text], pattern, table)

    return add


def _segmenter(base: Tokenizer) -> Segment:
    """Bytes of a word to ids, by the base's own model."""
    model = base.backend.model

    def segment(word: bytes) -> list[int]:
        return [token.id for token in model.tokenize(spell(word))]

    return segment


def _with_merges(base: Tokenizer, pairs: Pairs) -> Tokenizer:
    """The base's tokenizer.json with merges at the end of its list and tokens after its last id."""
    spec: dict[str, Any] = json.loads(base.backend.to_str())
    model = spec["model"]
    vocab: dict[str, int] = model["vocab"]
    # Special tokens that follow the old vocabulary would be numbered anew behind the new tokens: name their ids
    for token in spec["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    names = {i: name for name, i in vocab.items()}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    for i, (left, right) in enumerate(pairs):
        names[base.vocab_size + i] = names[left] + names[right]
        vocab[names[base.vocab_size + i]] = base.vocab_size + i
        merges.append([names[left], names[right]])
    model["merges"] = merges
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))
    return Tokenizer(backend, dict(base.roles), base.chat_template)


def _check(base: Tokenizer, extended: Tokenizer, words: WordCounts) -> None:
    """Nothing is written that breaks the promise: old ids keep their meaning, new ones expand to what was there."""
    kept = (
        all(extended.backend.id_to_token(i) == base.backend.id_to_token(i) for i in range(base.vocab_size))
        and extended.special_ids == base.special_ids
    )
    old, new = _segmenter(base), _segmenter(extended)
    expanded = old_ids(base, extended)
    frequent = sorted(words.items(), key=lambda item: -item[1])[:CHECKED]
    broken = next((w for w, _ in frequent if [o for i in new(w) for o in expanded.get(i, (i,))] != old(w)), None)
    if not kept or broken is not None:
        raise MoaiError(
            "the extension would change what old tokens mean"
            + (f", e.g. in {broken.decode('utf-8', 'replace')!r}" if broken is not None else "")
            + ": the base's merges are not in the order of its ids, so it cannot be extended"
        )


def old_ids(base: Tokenizer, extended: Tokenizer) -> dict[int, tuple[int, ...]]:
    """New id -> the ids of the base it stands for, by the merges that make it."""
    bpe = read_bpe(extended.backend)
    table: dict[int, tuple[int, ...]] = {}
    for left, right in bpe.merges:
        joined = bpe.ids[bpe.tokens[left] + bpe.tokens[right]]
        if joined >= base.vocab_size:
            table[joined] = table.get(left, (left,)) + table.get(right, (right,))
    return table
