"""Counting words: the compiled split is the regular expression, nothing is lost, the table is bounded and saved."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import words as module
from moai_llm.tokenizer.split import CL100K_SPLIT
from moai_llm.tokenizer.words import (
    LONGEST_WORD,
    WordCounts,
    character_classes,
    count_words,
    load_word_counts,
    split_words,
)

# every class the split knows, contractions, and what only looks like them
ALPHABET = list(
    "aAbBsStTrReEvVlLmMdDkK''’  \n\r\t/.,1239٣Ⅷ²가나あーア漢ǅʰΣςßİı\u0301\u0903ſ_-=>\u3000\x85\xa0\u2028\x1c\x00😀"
)


def split(text: str) -> list[str]:
    raw = np.frombuffer(text.encode(), np.uint8)
    ends, count = module._split(raw, character_classes())
    starts = [0, *ends[: count - 1].tolist()]
    return [raw[a:b].tobytes().decode() for a, b in zip(starts, ends[:count].tolist())] if count else []


@settings(max_examples=2000, deadline=None)
@given(st.text(st.sampled_from(ALPHABET), max_size=24))
def test_the_compiled_split_is_the_pattern(text: str) -> None:
    assert split(text) == list(split_words(text))


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
def test_also_on_any_characters(text: str) -> None:
    assert split(text) == list(split_words(text))


def test_another_pattern_is_seen() -> None:
    """The control: a split that is not ours gives other pieces on this alphabet."""
    assert split("don't HTTPServer") != list(split_words("don't HTTPServer", CL100K_SPLIT))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.sampled_from(ALPHABET), max_size=60), max_size=12))
def test_counts(texts: list[str]) -> None:
    expected = Counter(word.encode() for text in texts for word in split_words(text))
    table = count_words(texts)
    assert dict(table.items()) == expected
    assert table.text_bytes == sum(len(text.encode()) for text in texts)


def test_counts_by_another_pattern() -> None:
    texts = ["it's 12345 HTTPServer", "12345"]
    expected = Counter(word.encode() for text in texts for word in split_words(text, CL100K_SPLIT))
    assert dict(count_words(texts, CL100K_SPLIT).items()) == expected


@pytest.mark.parametrize(
    "text", ["x" * 5000, "가" * 3000, " " * 70000, "a\ud800b", "", "=" * 2500 + "\n", "9" * 4000], ids=repr
)
def test_hard_texts_lose_nothing(text: str) -> None:
    table = count_words([text])
    assert table.text_bytes == len(text.encode("utf-8", "replace"))
    assert all(len(word) <= LONGEST_WORD for word in table.words())


def test_the_table_grows_and_forgets_the_rarest() -> None:
    letters = str.maketrans("0123456789", "abcdefghij")
    many = [f" {i}".translate(letters) * (1 + i % 3) for i in range(20000)]
    full = count_words(many)
    assert len(full) == 20000 and full.forgotten == 0
    small = WordCounts(most_words=1000)
    for _ in range(50):
        small.add(" common")
    for text in many:
        small.add(text)
    kept = dict(small.items())
    assert len(kept) <= 1000 and kept[b" common"] == 50
    assert small.forgotten + sum(kept.values()) == 50 + int(full.counts.sum())


def test_saved_and_loaded(tmp_path: Path) -> None:
    table = count_words(["이자가 붙어요. the cat the mat 123", "the cat"])
    table.save(tmp_path / "w.npz")
    loaded = load_word_counts(tmp_path / "w.npz")
    assert dict(loaded.items()) == dict(table.items())
    assert sorted(loaded.counts, reverse=True) == loaded.counts.tolist()
    loaded.add("the cat")
    assert dict(loaded.items())[b" cat"] == 3


@pytest.mark.parametrize("damage", ["missing", "text", "short", "split", "counts"])
def test_a_bad_table(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "w.npz"
    if damage == "text":
        file.write_text("not a table")
    elif damage != "missing":
        count_words(["the cat sat on the mat"]).save(file)
        if damage == "short":
            file.write_bytes(file.read_bytes()[:-40])
        else:
            saved = dict(np.load(file))
            saved.update({"split": np.array("other")} if damage == "split" else {"counts": saved["counts"] * 0})
            np.savez(file, **saved)
    with pytest.raises(MoaiError, match="w.npz"):
        load_word_counts(file)
