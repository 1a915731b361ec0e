"""Training a tokenizer: lossless, ids in merge order, control tokens last, clear errors."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import apply_merges
from moai_llm.tokenizer.train import SPECIAL_TOKENS, train_tokenizer
from tests.conftest import shared_data

HARD = [
    "",
    " ",
    "\n\n\n",
    "\x00\x01\x7f",
    "e\u0301 é",
    "👩‍👩‍👧‍👦🇰🇷",
    "ᄀ\u1161각",
    "  \t def f():\r\n",
    "1234567",
    "ﷺ",
    "\ufeffbom",
    "a" * 5000,
]


def test_layout(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(65) == b"A" and [tokenizer.token_bytes(i) for i in range(256)] == [
        bytes([i]) for i in range(256)
    ]
    assert sorted(tokenizer.special_ids.values()) == list(
        range(tokenizer.vocab_size - len(SPECIAL_TOKENS), tokenizer.vocab_size)
    )
    assert tokenizer.pad_id != tokenizer.eos_id
    assert tokenizer.padded_vocab_size % 128 == 0 and 0 <= tokenizer.padded_vocab_size - tokenizer.vocab_size < 128
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


@pytest.mark.parametrize("text", HARD)
def test_lossless(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_lossless_on_any_text_and_equal_to_the_file_on_disk(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer._plain.encode(text, add_special_tokens=False).ids == ids
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


def test_bytes_that_are_not_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert "\ufffd" in tokenizer.decode([0xE3])
    assert tokenizer.decode([tokenizer.vocab_size, -1]) == ""


def test_merges_are_rank_order(tokenizer: Tokenizer) -> None:
    ranks = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)}
    word = " 이자가".encode()
    assert [ranks[part] for part in apply_merges(word, ranks, len(ranks))] == tokenizer.encode(" 이자가")


def test_the_vocabulary_is_as_large_as_asked() -> None:
    texts = ["the cat sat on the mat and the bat " * 3, "interest on interest is compound interest"] * 5
    assert train_tokenizer(texts, 280).vocab_size == 280
    assert train_tokenizer(iter(texts), 256 + len(SPECIAL_TOKENS)).vocab_size == 256 + len(SPECIAL_TOKENS)
    assert train_tokenizer(texts, 285).fingerprint == train_tokenizer(texts, 285).fingerprint


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 300, "got no text"),
        (["", ""], 300, "got no text"),
        (["some text"], 259, "too small: 256 bytes and 4 special tokens need 260"),
        (["abc abc abd"], 5000, r"larger than this text supports .*use --vocab-size \d+ or more text"),
    ],
)
def test_wrong_sizes(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        train_tokenizer(texts, size)


def test_more_than_the_text_supports_on_request() -> None:
    assert 260 < train_tokenizer(["abc abc abd"], 5000, fewer=True).vocab_size < 300


@pytest.mark.parametrize("language", ["ko", "ja", "zh", "en"])
def test_real_text(language: str) -> None:
    lines = shared_data(f"{language}/rust_book.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    trained = train_tokenizer(texts[:60], 4096)
    for text in texts[60:]:
        ids = trained.encode(text)
        assert trained.decode(ids) == text
        assert trained._plain.encode(text, add_special_tokens=False).ids == ids
        assert len(ids) < len(text.encode()) / 2
