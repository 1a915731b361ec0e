"""The sample: bounded, balanced, the same every time, and uniform."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.sample import HELD_OUT_SHARE, PIECE, cut, sample_texts

LONG = ["".join(f"sentence {i} of document {d}. " for i in range(400)) for d in range(200)]  # 1.9 MB


def test_pieces_are_the_text() -> None:
    for text in ("", "short", LONG[0], "x" * 5000, "가 나\n" * 3000, " " * 4100):
        pieces = list(cut(text))
        assert "".join(pieces) == text and all(0 < len(piece) <= PIECE for piece in pieces)
    assert all(piece.startswith(" ") for piece in list(cut(LONG[0]))[1:])  # cut between words


def test_bounded_and_balanced_whatever_the_input() -> None:
    def endless(prefix: str, documents: int) -> Iterator[str]:
        return (f"{prefix} {document} " + text for document in range(documents) for text in LONG[:10])

    sample = sample_texts({"ko": endless("가", 10), "en": endless("a", 40)}, 400_000)
    assert all(190_000 < sample.sizes[label] <= 200_000 for label in ("ko", "en"))
    assert sample.read["en"] > 3 * sample.read["ko"] > 2_000_000


def test_a_pure_function_of_the_seed() -> None:
    first, again, other = (sample_texts({"en": LONG}, 200_000, seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)


def test_uniform_over_the_stream() -> None:
    sample = sample_texts({"en": LONG}, 600_000)
    half = sum("of document 1" in piece for piece in sample)  # documents 1, 10-19 and 100-199 of 200
    assert abs(half / len(sample.texts["en"]) - 111 / 200) < 0.1


def test_a_share_of_every_language() -> None:
    whole = sample_texts({"a": LONG, "b": LONG[:100]}, 10**9)
    fifth = sample_texts({"a": LONG, "b": LONG[:100]}, 10**9, share=0.2)
    for label in "ab":
        assert abs(fifth.sizes[label] / whole.sizes[label] - 0.2) < 0.05
        assert set(fifth.texts[label]) < set(whole.texts[label])
        assert fifth.held_out[label] == whole.held_out[label]


def test_what_is_held_out_is_not_learned_from() -> None:
    sample = sample_texts({"en": LONG}, 10**9)
    held = sum(map(len, sample.held_out["en"]))
    assert held and not set(sample.held_out["en"]) & set(sample)
    assert held + sample.sizes["en"] == sample.read["en"] and abs(held / sample.read["en"] - HELD_OUT_SHARE) < 0.02
    assert not sample_texts({"en": LONG[:2]}, 10**9).held_out["en"]  # a short text is used whole


def test_a_sink_gets_everything_and_nothing_is_kept() -> None:
    got: list[str] = []
    sample = sample_texts({"en": LONG}, None, sink=got.append)
    assert not list(sample) and sum(map(len, got)) == sample.sizes["en"]
    assert set(got) == set(sample_texts({"en": LONG}, None))
    short: list[str] = []
    sample_texts({"en": LONG[:3]}, None, sink=short.append)
    assert sum(map(len, short)) == sum(map(len, LONG[:3]))


def test_documents_are_limited_and_counted() -> None:
    told: list[tuple[str, int, int]] = []
    sample = sample_texts({"en": iter(LONG)}, 10**9, most_documents=7, progress=lambda *now: told.append(now))
    assert sample.documents == {"en": 7} and told[-1] == ("en", 7, sample.read["en"])


def test_no_text() -> None:
    with pytest.raises(MoaiError, match="got no text for ja"):
        sample_texts({"en": ["text"], "ja": []}, 1000)
    with pytest.raises(MoaiError, match="a share of 0.001 of 9 bytes of text is too little"):
        sample_texts({"en": ["some text"]}, 1000, share=0.001)
