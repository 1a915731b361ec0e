"""Units, n-grams, MinHash: the compiled code against its definition, and the promise of the bands."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from moai_llm.data import units_compiled
from moai_llm.data.minhash import NO_KEY, MinHash, MinHashOptions, jaccard
from moai_llm.data.units import gram_hashes, located_grams, reference_grams, reference_hash, split_units, unit_hashes
from moai_llm.runtime import MoaiError

TEXTS = [
    "", "...", "a", "Hello, World! don't STOP 2,000 times", "ＡＢＣ full-width １２",
    "한국어 문장은 이렇게 나눕니다. OK?",
    "日本語のテキスト、カタカナ ﾊﾝｶｸ と English", "中文没有空格。", "ไทยไม่มีช่องว่าง",
    "é e\u0301 x\ud800y 👍🏽 z", "a b\tc\nd  e\u00a0f",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("words", "characters"), [(1, 1), (2, 3), (5, 8)])
def test_ngrams_are_those_of_the_definition(text: str, words: int, characters: int) -> None:
    units = split_units(unicodedata.normalize("NFC", text))
    expected = [reference_hash(gram) for gram in reference_grams(units, words, characters)]
    assert gram_hashes(text, words, characters).tolist() == expected
    assert units_compiled.gram_hashes(text, words, characters).tolist() == expected


def test_what_makes_no_difference_to_units_and_what_does() -> None:
    same = "the CAT sat: on a mat", "The cat  sat on\na (mat)!", "ｔｈｅ cat sat on a mat"
    assert len({tuple(unit_hashes(text)[0].tolist()) for text in same}) == 1
    assert unit_hashes("the cat sat on the mat")[0].tolist() != unit_hashes(same[0])[0].tolist()
    assert split_units("한국어 日本語 mixed한글x") == ["한", "국", "어", "日", "本", "語", "mixed", "한", "글", "x"]


def test_ngrams_know_where_they_stand() -> None:
    text = "One, two; three four. 다섯여섯"
    grams, spans = located_grams(text, 3, 2)
    pieces = [text[a:b] for a, b in spans]
    assert pieces == ["One, two; three", "two; three four", "three four. 다", "four. 다섯", "다섯", "섯여", "여섯"]
    assert grams.tolist() == gram_hashes(text, 3, 2).tolist()


def reference_signature(minhash: MinHash, text: str) -> list[int]:
    grams = gram_hashes(text, minhash.options.words, minhash.options.characters).tolist()
    return [
        min((((a * (g >> 32) + b) & (2**64 - 1)) >> 32 for g in grams), default=2**32 - 1)
        for a, b in zip(minhash._a.tolist(), minhash._b.tolist())
    ]


@pytest.mark.parametrize("text", ["", "x", "a few words make a few shingles here", "한국어 문장은 글자로 나눕니다"])
def test_signature_is_the_least_value_of_each_permutation(text: str) -> None:
    minhash = MinHash()
    assert minhash.signature(text).tolist() == reference_signature(minhash, text)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    minhash, rng = MinHash(MinHashOptions(bands=64, rows=8)), random.Random(0)
    words = [f"w{i}" for i in range(400)]
    for changed in (0, 5, 20, 60):
        left, right = words[:], words[:]
        for i in rng.sample(range(400), changed):
            right[i] = "other"
        a, b = " ".join(left), " ".join(right)
        true = jaccard(minhash.shingles(a), minhash.shingles(b))
        estimate = (minhash.signature(a) == minhash.signature(b)).mean()
        assert abs(true - estimate) < 4 * np.sqrt(true * (1 - true) / 512) + 1e-9, (true, estimate)
    sets = np.array([1, 2, 3], np.uint64), np.array([2, 3, 4], np.uint64)
    assert jaccard(*sets) == 0.5 and jaccard(sets[0], sets[0]) == 1 and jaccard(sets[0], sets[1][:0]) == 0


def test_bands_meet_as_often_as_their_formula_says() -> None:
    """1 - (1 - J^r)^b, over signatures whose agreement is drawn."""
    minhash, rng = MinHash(MinHashOptions(bands=4, rows=2, words=1)), random.Random(1)
    met, expected = 0, 0.0
    for trial in range(400):
        shared = [f"s{trial}x{i}" for i in range(30)]
        a = " ".join([*shared, *(f"a{trial}x{i}" for i in range(20))])
        b = " ".join([*shared, *(f"b{trial}x{i}" for i in range(rng.randrange(5, 40)))])
        met += bool((minhash.band_keys(a) == minhash.band_keys(b)).any())
        expected += 1 - (1 - jaccard(minhash.shingles(a), minhash.shingles(b)) ** 2) ** 4
    assert 100 < expected < 300 and abs(met - expected) < 40, (met, expected)  # four standard deviations


def test_no_text_is_like_no_other() -> None:
    assert (MinHash().band_keys("... !!") == NO_KEY).all()
    with pytest.raises(MoaiError, match="bands must be at least 1"):
        MinHashOptions(bands=0)


def test_the_same_on_every_machine() -> None:
    """Against values written down once, in a process with another hash seed."""
    code = "from moai_llm.data.minhash import MinHash\n"
    code += "print(MinHash().signature('quick brown fox 한국어 문장')[:3].tolist())"
    done = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **changed})
        for changed in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2", "NUMBA_CPU_NAME": "generic"})
    ]
    assert [d.stdout.strip() for d in done] == ["[2071932200, 811627281, 208861460]"] * 2, done[0].stderr
