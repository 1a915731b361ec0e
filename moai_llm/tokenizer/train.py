"""Train a byte-level BPE tokenizer from an iterator of strings.

Ids: 256 bytes, then merges in the order they were learned, then special tokens. So id == merge rank, which is what
lets a tiktoken twin encode with the same ids. No normaliser: text comes back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import rustbpe
from tokenizers import AddedToken

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import build_bpe, recover_merges, spell
from moai_llm.tokenizer.chat import CHATML_JINJA
from moai_llm.tokenizer.load import END_OF_TEXT, PAD, TURN_END, TURN_START, Tokenizer
from moai_llm.tokenizer.split import O200K_SPLIT

SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
PIECE = 1 << 16  # characters handed to the trainer at a time; a document of one endless word is cut here


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = SPECIAL_TOKENS, fewer: bool = False
) -> Tokenizer:
    """Learn `vocab_size` tokens: 256 bytes, the special tokens, and merges for the rest.

    Args:
        fewer: be content with the merges the text supports, where it supports fewer.

    Raises:
        MoaiError: no text, a vocabulary too small to hold the bytes and special tokens, or larger than the text
            supports.
    """
    merges = vocab_size - 256 - len(special_tokens)
    if merges < 0:
        raise MoaiError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(special_tokens)} special tokens need "
            f"{256 + len(special_tokens)}"
        )
    seen = [0]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_pieces(texts, seen), 256 + merges, pattern=O200K_SPLIT)
    if seen[0] == 0:
        raise MoaiError("the tokenizer got no text: the sources are empty")
    tokens = [bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])]
    if len(tokens) < 256 + merges and not fewer:
        supported = len(tokens) + len(special_tokens)
        raise MoaiError(
            f"vocab_size {vocab_size} is larger than this text supports ({seen[0]:,} characters give {supported}): "
            f"use --vocab-size {supported} or more text"
        )
    return build_tokenizer(tokens, special_tokens)


def build_tokenizer(tokens: Sequence[bytes], special_tokens: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """A tokenizer from tokens in rank order (the 256 bytes first) and special tokens behind them."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    backend = build_bpe({spell(token): rank for token, rank in ranks.items()}, merges, O200K_SPLIT)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    roles = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD}
    roles = {role: token for role, token in roles.items() if token in special_tokens}
    chats = {TURN_START, TURN_END} <= set(special_tokens)
    return Tokenizer(backend, roles, CHATML_JINJA if chats else None)


def _pieces(texts: Iterable[str], seen: list[int]) -> Iterator[str]:
    """Texts in bounded pieces, counted, with lone surrogates replaced (they have no UTF-8)."""
    for text in texts:
        seen[0] += len(text)
        text = text.encode("utf-8", "replace").decode("utf-8")
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]
