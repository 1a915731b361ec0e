"""Byte-level BPE: how its files write bytes, what its merges are, and what applying them means.

Everything that needs the merges of a tokenizer (the tiktoken twin, extension, export) reads them here. Knows nothing of
how text is encoded at run time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.split import GPT2_SPLIT


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE files (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    table.update({chr(256 + i): byte for i, byte in enumerate(hidden)})
    return table


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


class _Unspelled(dict[int, int]):
    def __missing__(self, character: int) -> int:
        return 0xFFFF  # no byte


_UNSPELLED = _Unspelled({ord(character): byte for character, byte in BYTE_OF.items()})


def spell(token: bytes) -> str:
    """Bytes as byte-level BPE files write them."""
    return token.decode("latin-1").translate(CHARACTER_OF)


def unspell(name: str) -> bytes | None:
    """The bytes of a token in a byte-level BPE file; None where it is not written in that alphabet."""
    try:
        return name.translate(_UNSPELLED).encode("latin-1")
    except UnicodeEncodeError:
        return None


@dataclass(frozen=True)
class ByteLevelBPE:
    """What a byte-level BPE tokenizer is made of.

    Attributes:
        pattern: the regular expression that splits text; a merge never crosses its pieces.
        tokens: the bytes of each id of the model; b"" for control tokens, added tokens and ids that stand for nothing.
        merges: pairs of ids, in the order in which they are applied. The pair that stands first is merged first.
        normalizer: what is done to text before it is split, as `tokenizers` writes it; None for nothing.
        ignore_merges: a piece of text that is itself a token is that token, whatever the merges make of it.
    """

    pattern: str
    tokens: list[bytes]
    merges: list[tuple[int, int]]
    normalizer: dict[str, Any] | None
    ignore_merges: bool

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The id of each token's bytes."""
        return {token: i for i, token in enumerate(self.tokens) if token}

    @cached_property
    def ranks(self) -> dict[bytes, int]:
        """For `apply_merges`: single bytes are 0 to 255, what the n-th merge makes is 256 + n (its first, where two
        merges make the same token).
        """
        ranks = {bytes([byte]): byte for byte in range(256)}
        for rank, (left, right) in enumerate(self.merges, 256):
            ranks.setdefault(self.tokens[left] + self.tokens[right], rank)
        return ranks


def read_bpe(backend: tokenizers.Tokenizer) -> ByteLevelBPE:
    """The parts of a byte-level BPE tokenizer.

    Raises:
        MoaiError: it is another kind of tokenizer; the message says which.
    """
    return parse_bpe(json.loads(backend.to_str()))


def parse_bpe(spec: Mapping[str, Any]) -> ByteLevelBPE:
    """`read_bpe` of the content of a tokenizer.json."""
    problem = _other_kind(spec)
    if problem is not None:
        raise MoaiError(
            f"this needs a byte-level BPE tokenizer, and this one is {problem}: take one that "
            "`moai tokenizer train` makes, or one by name such as o200k_base"
        )
    model, pattern = spec["model"], _split_pattern(spec["pre_tokenizer"])
    assert pattern is not None  # else _other_kind has a word for it
    vocab: dict[str, int] = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = {name for left, right in pairs for name in (left, right, left + right)}
    added = {token["content"] for token in spec["added_tokens"]} - merged - set(BYTE_OF)
    tokens = [b""] * (1 + max(vocab.values()))
    for name, i in vocab.items():
        if name not in added:
            tokens[i] = unspell(name) or b""
    merges = [(vocab[left], vocab[right]) for left, right in pairs]
    if not all(tokens[vocab[name]] for name in merged):
        raise MoaiError("this tokenizer lists merges of tokens that are not written as bytes: its file is damaged")
    return ByteLevelBPE(pattern, tokens, merges, spec.get("normalizer"), bool(model.get("ignore_merges")))


def build_bpe(vocab: dict[str, int], merges: list[tuple[str, str]], pattern: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without normaliser and special tokens.

    Args:
        vocab: id of each token, written by `spell`.
        merges: the pairs, in the order in which they are applied.
    """
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def apply_merges(text: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encode with the merges whose rank is below a bound: of the pairs that join to a known token, the one of
    lowest rank is joined, the leftmost of equals, until none is left. The definition, for short strings.
    """
    parts = [text[i : i + 1] for i in range(len(text))]
    pairs = [ranks.get(text[i : i + 2], below) for i in range(len(text) - 1)]  # the rank of parts i and i + 1 joined
    while pairs and (best := min(pairs)) < below:
        i = pairs.index(best)
        joined = parts[i] + parts[i + 1]
        parts[i : i + 2] = [joined]
        del pairs[i]
        if i > 0:
            pairs[i - 1] = ranks.get(parts[i - 1] + joined, below)
        if i < len(pairs):
            pairs[i] = ranks.get(joined + parts[i + 1], below)
    return parts


def recover_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of two bytes or more was joined from, in rank order: what the merges before it leave of
    its bytes.

    Raises:
        MoaiError: a token that is not one merge of tokens of lower rank.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = apply_merges(token, ranks, rank)
            if len(parts) != 2:
                raise MoaiError(
                    f"token {rank}, {token!r}, is not one merge of earlier tokens: these ranks are not those of a "
                    "byte-pair encoding"
                )
            merges.append((parts[0], parts[1]))
    return merges


def _other_kind(spec: Mapping[str, Any]) -> str | None:
    """What a tokenizer is instead of byte-level BPE, in words; None where it is one."""
    model, kind = spec["model"], spec["model"].get("type")
    if kind != "BPE":
        return f"a {kind} tokenizer"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "BPE over characters with marks at the borders of words"
    steps = _steps(spec.get("pre_tokenizer"))
    kinds = [step["type"] for step in steps]
    if "ByteLevel" not in kinds:
        fallback = " (SentencePiece with byte fallback)" if model.get("byte_fallback") else ""
        return f"BPE over characters, not bytes{fallback}"
    if model.get("dropout"):
        return "BPE with dropout, which encodes a text differently each time"
    missing = 256 - sum(character in model["vocab"] for character in BYTE_OF)
    if missing:
        return f"byte-level BPE without {missing} of the 256 bytes"
    if _split_pattern(spec["pre_tokenizer"]) is None:
        return f"byte-level BPE that splits text in a way that is not one pattern ({', '.join(kinds)})"
    return None


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]


def _split_pattern(pre: dict[str, Any] | None) -> str | None:
    """The one pattern by which a pre-tokenizer splits; None where it is not one, or where it changes text."""
    steps = _steps(pre)
    kinds = [step["type"] for step in steps]
    if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        plain = not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]
        return steps[0]["pattern"].get("Regex") if plain else None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return GPT2_SPLIT
    return None
