"""A tiktoken encoder of the same merges: ids equal to those of `tokenizers`, several times faster.

`tokenizers` joins the pairs its file lists. tiktoken knows no pairs: it joins any two neighbours whose bytes together
are a token. That both give equal ids rests on two facts.

1. As long as nothing was joined across the two ends of a stretch of text, merging did inside it what it would do to
   that stretch alone, since the next join is always the lowest rank there, the leftmost of equals. So two neighbours
   that together spell a token are, in any text, the two parts that merging leaves of the bytes of that token just
   before the last join. A token has one such pair, or none.
2. A token that merging does not make of its own bytes therefore never comes out of merging: it is dead, and the twin is
   built without it. Of any other token the one pair that occurs is a listed one. So, step for step, the pairs that are
   listed and the pairs whose bytes are a token are the same, and the same one is joined next.

Which tokens are dead is found by merging each token's bytes once, by `tokenizers` itself. This holds for vocabularies
that were extended, for merges in another order than the ids, and for files that list several pairs for one token. The
split in front of the merges must be one that both engines read alike, see split.py.
"""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import models

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import ByteLevelBPE, parse_bpe, spell
from moai_llm.tokenizer.split import read_alike, strangers

# tiktoken's regex engine keeps a note for each character of a run of spaces and fails at a million of them; texts that
# may hold a run of twice this many go to `tokenizers`.
SPACES = 100_000
MANY_ADDED = 64  # with more added tokens than this, looking for each of them would cost more than the twin saves
FORMS = ("NFC", "NFD", "NFKC", "NFKD")
NO_TOKEN = "<|no token|>"  # nobody asks for it; a text that holds these characters is ordinary text


class Twin:
    """Made by `make_twin`, which knows that the merges are the same."""

    def __init__(
        self, pattern: str, ranks: dict[bytes, int], ids: list[int] | None, normalizer: Any, added: list[str]
    ) -> None:
        """Args:
        pattern: how text is split.
        ranks: tokens and what tiktoken calls them; lower ranks are merged first.
        ids: the id of each rank; None where they are the same.
        normalizer: of `tokenizers`, applied first; None for nothing.
        added: texts that `tokenizers` takes out before anything else.
        """
        import tiktoken

        self._made_of = pattern, _Flat.of(ranks), ids, normalizer, added
        self._ids, self._normalizer, self._added = ids, normalizer, added
        self._table = None if ids is None else np.array(ids, dtype=np.uint32)
        self._keeps_ascii = type(normalizer).__name__ in FORMS
        self._strangers = strangers()
        # without any control token tiktoken would try each place of a text for one, in `encode_to_numpy`
        self._core = tiktoken.Encoding(
            "moai", pat_str=pattern, mergeable_ranks=ranks, special_tokens={NO_TOKEN: 1 + max(ranks.values())}
        )
        vars(self._core)["_mergeable_ranks"] = {}  # kept for its own pickle alone, at 130 bytes a token

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpacked, self._made_of

    def encode(self, text: str) -> list[int] | None:
        """Ids of ordinary text without lone surrogates; None for the rare text that only `tokenizers` encodes surely:
        one that holds an added token, a character that one of the two regex engines does not know yet, or a run of
        spaces that is too long for tiktoken.
        """
        plain = self._plain(text)
        if plain is None:
            return None
        ids = self._core.encode_ordinary(plain)
        table = self._ids
        return ids if table is None else [table[i] for i in ids]

    def encode_array(self, text: str) -> np.ndarray | None:
        """`encode` as uint32: faster, and a tenth of the memory."""
        plain = self._plain(text)
        if plain is None:
            return None
        ids = self._core.encode_to_numpy(plain, disallowed_special=())
        return ids if self._table is None else self._table[ids]

    def _plain(self, text: str) -> str | None:
        """The text that tiktoken is given; None for one that is not for it."""
        if any(token in text for token in self._added):
            return None
        if self._normalizer is not None and not (self._keeps_ascii and text.isascii()):
            text = self._normalizer.normalize_str(text)
            if any(token in text for token in self._added):
                return None
        if self._strangers and not self._strangers.isdisjoint(text):
            return None
        if len(text) >= SPACES and any(
            text[i : i + SPACES].isspace() for i in range(0, len(text) - SPACES + 1, SPACES)
        ):
            return None
        return text


class _Flat(NamedTuple):
    """Tokens and their ranks, in a tenth of the memory of a dict."""

    joined: bytes
    lengths: np.ndarray
    ranks: np.ndarray

    @classmethod
    def of(cls, ranks: dict[bytes, int]) -> _Flat:
        return cls(
            b"".join(ranks), np.fromiter(map(len, ranks), np.uint32, len(ranks)),
            np.fromiter(ranks.values(), np.uint32, len(ranks)),
        )  # fmt: skip

    def as_dict(self) -> dict[bytes, int]:
        ends = np.cumsum(self.lengths, dtype=np.int64).tolist()
        return {self.joined[a:b]: rank for a, b, rank in zip([0, *ends], ends, self.ranks.tolist())}


def _unpacked(pattern: str, ranks: _Flat, ids: list[int] | None, normalizer: Any, added: list[str]) -> Twin:
    return Twin(pattern, ranks.as_dict(), ids, normalizer, added)


def make_twin(backend: tokenizers.Tokenizer) -> Twin | None:
    """The twin of a byte-level BPE tokenizer; None for other kinds, and where equal ids are not certain."""
    spec = json.loads(backend.to_str())
    try:
        bpe = parse_bpe(spec)
    except MoaiError:
        return None
    added = [token["content"] for token in spec["added_tokens"] if not token["special"]]
    if len(added) > MANY_ADDED or not read_alike(bpe.pattern):
        return None
    if backend.normalizer is not None:
        added += [backend.normalizer.normalize_str(content) for content in added]
    found = _ranks(bpe, backend)
    if found is None:
        return None
    ranks, ids = found
    if all(rank == i for rank, i in zip(ranks.values(), ids)):
        return Twin(bpe.pattern, ranks, None, backend.normalizer, added)
    return Twin(bpe.pattern, ranks, ids, backend.normalizer, added)


def _ranks(bpe: ByteLevelBPE, backend: tokenizers.Tokenizer) -> tuple[dict[bytes, int], list[int]] | None:
    """Tokens and their ranks for tiktoken, and the id of each in the same order."""
    model = backend.model
    if bpe.ignore_merges:  # of the merges alone, else every token would seem to be made of its bytes
        names = {spell(token): i for token, i in bpe.ids.items()}
        pairs = [(spell(bpe.tokens[left]), spell(bpe.tokens[right])) for left, right in bpe.merges]
        model = models.BPE(vocab=names, merges=pairs)
    parts = {token: len(model.tokenize(spell(token))) for token in bpe.ids if len(token) > 1}

    last = {pair: rank for rank, pair in enumerate(bpe.merges)}  # of a pair that is listed twice the last one counts
    joined = (bpe.tokens[left] + bpe.tokens[right] for left, right in sorted(last, key=last.__getitem__))
    alive = [token for token, _ in groupby(token for token in joined if parts[token] == 1)]
    if len(set(alive)) < len(alive):
        return None  # pairs of one token in different places of the order: which of them counts would have to be found
    dead = [token for token, count in parts.items() if count > 1] if bpe.ignore_merges else []
    if any(parts[token] == 2 for token in dead):
        return None  # a token only as a whole piece, which tiktoken would also join
    tokens = [bytes([byte]) for byte in range(256)] + alive + dead
    ids = [bpe.ids[token] for token in tokens]
    in_order = all(a < b for a, b in zip(ids[256:], ids[257 : 256 + len(alive)]))
    ranks = ids if in_order else list(range(len(ids)))
    return dict(zip(tokens, ranks)), ids
