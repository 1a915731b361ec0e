"""Unigram: lossless, also where sentencepiece's own defaults are not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.train import SPECIAL_TOKENS
from moai_llm.tokenizer.unigram import train_unigram
from moai_llm.tokenizer.words import WordCounts, count_words

pytest.importorskip("sentencepiece", reason="needs the extra unigram")
TEXTS = [
    "The quick brown fox jumps over the lazy dog. Interest is paid on the deposit, and a loan costs interest. " * 5,
    "복리는 이자에 이자가 붙는 방식이에요. 예금과 적금은 은행에서 가입할 수 있어요. 대출에는 이자를 내요. " * 5,
    "日本の首都は東京です。銀行の利子は毎年変わります。中国的首都是北京。银行存款的利息每年都会变化。 " * 5,
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n" * 5,
]


@pytest.fixture(scope="module")
def words() -> WordCounts:
    return count_words(TEXTS)


@pytest.fixture(scope="module")
def unigram(words: WordCounts) -> Tokenizer:
    return train_unigram(words, 380)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_lossless_on_any_text(unigram: Tokenizer, text: str) -> None:
    assert unigram.decode(unigram.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["<0x41>", "\u2581a\u2581 b", "<unk>", "  two  spaces ", "ﬁ ② Å", "\x00\t\r\n", "👩‍👩‍👧‍👦", "<|endoftext|>"]
)
def test_lossless_where_sentencepiece_is_not(unigram: Tokenizer, text: str) -> None:
    assert unigram.decode(unigram.encode(text)) == text
    assert not set(unigram.special_ids.values()) & set(unigram.encode(text))


def test_sentencepiece_itself_is_not(tmp_path: Path) -> None:
    """The control: its defaults normalise."""
    import sentencepiece

    (tmp_path / "t.txt").write_text("".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "t.txt"), model_prefix=str(tmp_path / "m"), vocab_size=120, minloglevel=2
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert theirs.decode(theirs.encode("  two  spaces ﬁ ②")) != "  two  spaces ﬁ ②"


def test_layout_and_disk(unigram: Tokenizer, words: WordCounts, tmp_path: Path) -> None:
    assert unigram.vocab_size == 380
    assert sorted(unigram.special_ids.values())[-len(SPECIAL_TOKENS) :] == list(range(380 - len(SPECIAL_TOKENS), 380))
    loaded = load_tokenizer(unigram.save(tmp_path / "t"))
    assert [loaded.encode(text) for text in TEXTS] == [unigram.encode(text) for text in TEXTS]
    assert train_unigram(words, 380).fingerprint == unigram.fingerprint
    assert sum(map(len, map(unigram.encode, TEXTS))) < sum(map(len, TEXTS))


@pytest.mark.parametrize(("size", "message"), [(100_000, r"use --vocab-size \d+ or less"), (260, "leaves no room")])
def test_sizes_that_do_not_fit(words: WordCounts, size: int, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        train_unigram(words, size)


def test_no_text_and_the_largest_size(words: WordCounts) -> None:
    with pytest.raises(MoaiError, match="got no text"):
        train_unigram(count_words([]), 380)
    with pytest.raises(MoaiError) as error:
        train_unigram(words, 100_000)
    supported = int(str(error.value).split("--vocab-size ")[1].split()[0])
    assert train_unigram(words, supported).vocab_size == supported
