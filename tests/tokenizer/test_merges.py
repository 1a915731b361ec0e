"""Learning merges: equal to the definition, to the `tokenizers` library, and a coarsening when continued."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.merges import learn_merges, learn_merges_slowly
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.tokenizer.words import count_words
from tests.conftest import shared_data

TEXT = st.lists(st.text("aab bc\nÄ가", max_size=60), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_equal_to_the_definition(texts: list[str]) -> None:
    words = count_words(texts)
    assert learn_merges(words, 40) == learn_merges_slowly(words, 40)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT)
def test_continued_like_the_definition(first: list[str], second: list[str]) -> None:
    base = train_tokenizer([*first, "a"], 275, fewer=True)
    tokens = [base.token_bytes(i) for i in range(base.vocab_size)]

    def segment(word: bytes) -> list[int]:
        return base.encode(word.decode())

    words = count_words(second)
    fast = learn_merges(words, 20, tokens=tokens, segment=segment)
    assert fast == learn_merges_slowly(words, 20, tokens=tokens, segment=segment)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_vocabulary_as_the_tokenizers_library(seed: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoin shrdlu가나다라マミム汉字", k=rng.randint(1, 9))) for _ in range(300)]
    texts = [" ".join(rng.choices(words, k=50)) for _ in range(40)]
    ours = train_tokenizer(texts, 700, fewer=True)
    assert ours.fingerprint == train_tokenizer(texts, 700, engine="tokenizers", fewer=True).fingerprint
    assert ours.fingerprint != train_tokenizer(texts[1:], 700, fewer=True).fingerprint  # a control


def test_the_same_on_real_text_of_four_languages() -> None:
    texts = [
        shared_data(f"{language}/rust_book.jsonl").read_text(encoding="utf-8")[start : start + 2000]
        for language in ("ko", "en", "ja", "zh")
        for start in range(0, 160_000, 2000)
    ]
    ours = train_tokenizer(texts, 6000)
    assert ours.fingerprint == train_tokenizer(texts, 6000, engine="tokenizers").fingerprint


def test_from_counted_words_of_any_size(tokenizer: Tokenizer) -> None:
    texts = ["the cat sat on the mat, the cat sat. 이자가 이자를 낳아요."] * 4
    words = count_words(texts)
    for size in (275, 290):
        assert train_tokenizer(words, size).fingerprint == train_tokenizer(texts, size).fingerprint
    with pytest.raises(MoaiError, match="got no text"):
        train_tokenizer(count_words([]), 300)


def test_progress_is_told_and_the_end_reached() -> None:
    seen: list[int] = []
    pairs = learn_merges(count_words(["abcabcabd" * 4] * 3), 5, progress=seen.append)
    assert len(pairs) == 5 and seen and seen[-1] == 5


def test_hard_words_take_linear_time() -> None:
    """100,000 repeats of a letter, and text without a space, in the time of a test."""
    words = count_words(["a" * 100_000, "".join(random.Random(0).choices("abcd", k=1_000_000))])
    assert len(learn_merges(words, 200)) == 200
