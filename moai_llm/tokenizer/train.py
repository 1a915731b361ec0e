"""Train a byte-level BPE tokenizer from an iterator of strings.

Ids: 256 bytes, then merges in the order they were learned, then special tokens. So id == merge rank, which is what
lets a tiktoken twin encode with the same ids. No normaliser: text comes back byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import rustbpe
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.chat import CHATML_JINJA
from moai_llm.tokenizer.load import BYTE_OF, END_OF_TEXT, PAD, TURN_END, TURN_START, Tokenizer

SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# The split of o200k_base: words by case and script, digits in groups of up to three, operators with their line end,
# line ends, runs of spaces. A merge never crosses its pieces.
SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _APOSTROPHE,
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _APOSTROPHE,
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
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
    trainer.train_from_iterator(_pieces(texts, seen), 256 + merges, pattern=SPLIT)
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
    names = ["".join(CHARACTER_OF[byte] for byte in token) for token in tokens]
    merges = list(_merge_names(tokens))
    model = models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges)
    backend = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special_tokens])
    roles = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD}
    roles = {role: token for role, token in roles.items() if token in special_tokens}
    chats = {TURN_START, TURN_END} <= set(special_tokens)
    return Tokenizer(backend, roles, CHATML_JINJA if chats else None)


def _merge_names(tokens: Sequence[bytes]) -> Iterator[tuple[str, str]]:
    """The two parts each merge joined: what the earlier merges leave of its bytes."""
    ranks = {token: i for i, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        parts = apply_merges(token, ranks, rank)
        assert len(parts) == 2, f"token {token!r} is not one merge of earlier tokens"
        left, right = ("".join(CHARACTER_OF[byte] for byte in part) for part in parts)
        yield left, right


def apply_merges(text: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encode with the merges whose rank is below a bound; the definition, for short strings."""
    parts = [text[i : i + 1] for i in range(len(text))]
    while len(parts) > 1:
        pairs = [ranks.get(a + b, below) for a, b in zip(parts, parts[1:])]
        best = min(pairs)
        if best >= below:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _pieces(texts: Iterable[str], seen: list[int]) -> Iterator[str]:
    """Texts in bounded pieces, counted, with lone surrogates replaced (they have no UTF-8)."""
    for text in texts:
        seen[0] += len(text)
        text = text.encode("utf-8", "replace").decode("utf-8")
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE]
