"""Which patterns both regex engines read alike, and what goes wrong with the others."""

from __future__ import annotations

import sys
import unicodedata

import pytest
import tiktoken
from tokenizers import Regex, pre_tokenizers

from moai_llm.tokenizer import split
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT, read_alike, strangers


@pytest.mark.parametrize(
    "pattern",
    [
        GPT2_SPLIT,
        CL100K_SPLIT,
        O200K_SPLIT,
        CL100K_SPLIT.replace("{1,3}", ""),
        r"[A-Za-z]+|\d|[^A-Za-z\d]{1,16}",
        r"\p{L}+(?:'s|'t)?|\s+(?!\S)|\s|\S",
        r"\s+|\S+",
        r"[^x]|x",
    ],
)
def test_safe_patterns(pattern: str) -> None:
    assert read_alike(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        r"\s+|\S+|",
        r"\s*|\S*",
        r"\p{L}+",
        r"\s+(?!\S)|\S+",
        r"\p{N}{1,3}+|\P{N}+",
        r"\s+?|\S",
        r"\w+|\W+",
        r".|\n",
        r"^\S+|\S+|\s+",
        r"\s+$|\s|\S",
        r"(?i:ss)|\s|\S",
        r"(?i)a|\s|\S",
        r"[a&&b]|\s|\S",
        r"\p{Han}+|\P{Han}+",
        r"(a)|\s|\S",
        r"(?<=a)b|\s|\S",
        r"[\s\S",
        "é|[^é]",
        r"(?:\p{L}\p{M}*)+|\s|\S",  # safe, but not known to be
    ],
)
def test_unsafe_patterns(pattern: str) -> None:
    assert not read_alike(pattern)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [(r"\p{N}{1,3}+|\P{N}+", "123456"), (r"\s+$|\s|\S+", "a  \nb"), (r"\p{L}+", "a1b"), (r"\w+|\W+", "a²")],
)
def test_control_unsafe_patterns_do_differ(pattern: str, text: str) -> None:
    theirs = [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]
    assert pieces_of_tiktoken(pattern, text) != theirs


def pieces_of_tiktoken(pattern: str, text: str) -> list[str]:
    """Every piece is merged into one token, since each of its prefixes is a token."""
    starts = {text[i:j].encode() for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {start: 256 + i for i, start in enumerate(sorted(starts, key=len)) if len(start) > 1}
    encoding = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return [token.decode() for token in encoding.decode_tokens_bytes(encoding.encode_ordinary(text))]


def test_every_kind_of_character_is_tried() -> None:
    kinds = {unicodedata.category(character) for character in split._EVERY_KIND}
    assert kinds == {unicodedata.category(chr(i)) for i in range(sys.maxunicode + 1)} - {"Cs"}
    spaces = {unicodedata.category(character) for character in split._EVERY_KIND if character.isspace()}
    assert spaces == {"Zs", "Zl", "Zp", "Cc"}


def test_both_engines_know_the_same_unicode_here() -> None:
    assert strangers() == frozenset()


def test_a_newer_unicode_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tiktoken did not know two letters yet."""
    real, new = split._members_tiktoken, set("\u1c89\u1c8a")

    def older(atom: str, characters: str) -> str:
        members = {*real(atom, characters)} - new | (new if atom == r"\p{Cn}" else set())
        return "".join(character for character in characters if character in members)

    monkeypatch.setattr(split, "_members_tiktoken", older)
    assert strangers.__wrapped__() == new
