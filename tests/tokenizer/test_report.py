"""The numbers of a report against counts by hand, and what may go wrong."""

from __future__ import annotations

import io
import json
import math

import pytest
import tokenizers
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.counts import Text
from moai_llm.tokenizer.report import LONGEST_BAR, compare, measure, price_table
from moai_llm.tokenizer.train import build_tokenizer
from tests.tokenizer import foreign

MIXED = {
    "en": ["The bank pays interest.", "Interest is paid twice a year, isn't it?"],
    "ko": ["은행은 이자를 냅니다.", "예금은 안전해요."],
    "ja": ["銀行は利子を払います。"],
    "code": ["def f(x):\n    return x + 1\n"],
}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """256 bytes, and `he`, `ll`, `hell`, `hello`: small enough to cut text by hand."""
    return build_tokenizer([(ord("h"), ord("e")), (ord("l"), ord("l")), (256, 257), (258, ord("o"))])


def test_by_hand(small: Tokenizer) -> None:
    """hello| |hello|\\n and 3 bytes for 가, one for !: 4 + 4 tokens."""
    greeting, korean, total = measure(small, {"greeting": ["hello hello\n"], "ko": ["가!"]})
    assert (greeting.label, greeting.documents, greeting.bytes, greeting.characters) == ("greeting", 1, 12, 12)
    assert (greeting.words, greeting.tokens, greeting.ids_used, greeting.byte_tokens) == (2, 4, 3, 0)
    assert greeting.bytes_per_token == 3.0 and greeting.tokens_per_word == 2.0
    assert greeting.tokens_per_character == 4 / 12 and greeting.byte_share == 0.0
    assert (korean.bytes, korean.characters, korean.words, korean.tokens) == (4, 2, 1, 4)
    assert korean.byte_tokens == 3 and korean.byte_share == 0.75 and korean.tokens_per_character == 2.0
    assert (total.label, total.documents, total.bytes, total.tokens, total.ids_used) == ("all", 2, 16, 8, 7)
    assert total.bytes_per_token == 2.0
    assert not any(row.round_trip_failures or row.unknown_tokens for row in (greeting, korean, total))


def test_the_vocabulary_by_hand(small: Tokenizer) -> None:
    entry = compare({"small": small}, {"text": ["hello hell", "hello"]}).entries[0]  # hello ␣ hell hello
    assert entry.vocab_size == 264 and entry.special_tokens == 4
    assert entry.longest.text == "hello" and entry.longest_bytes == 5
    assert entry.vocabulary_lengths[:6] == [256, 2, 0, 1, 1, 0] and sum(entry.vocabulary_lengths) == 260
    assert entry.text_lengths[:6] == [1, 0, 0, 1, 2, 0] and sum(entry.text_lengths) == 4
    assert len(entry.text_lengths) == len(entry.vocabulary_lengths) == LONGEST_BAR
    assert entry.unused_share == 1 - 3 / 264 and entry.unreachable == 0
    assert entry.coverage == [(1, 0.5), (2, 0.75), (3, 1.0)]
    assert entry.ids_for_share == {"0.5": 1, "0.9": 3, "0.99": 3}
    assert [piece.text for piece in entry.samples["text"]] == ["hello", "·", "hell", "⏎", "hello"]


@pytest.mark.parametrize(
    ("text", "words", "unspaced"),
    [
        ("I can't pay 3.14 dollars.", 5, False),
        ("한국어는 띄어쓰기가 있다.", 3, False),
        ("日本語のカタカナ", 5, True),  # 日 本 語 の カタカナ
        ("中国的首都是北京。", 8, True),
        ("naïve cafe\u0301, x_1 = foo(bar)", 5, False),
        ("👩‍👩‍👧 🇰🇷 … !!", 0, False),
    ],
)
def test_words_are_those_of_unicode(text: str, words: int, unspaced: bool) -> None:
    counted = Text("x")
    counted.add([text])
    assert (counted.words, counted.unspaced) == (words, unspaced)


def test_equal_to_counting_one_by_one(tokenizer: Tokenizer) -> None:
    *rows, total = measure(tokenizer, {label: iter(texts) for label, texts in MIXED.items()})
    for row, texts in zip(rows, MIXED.values()):
        ids = [i for text in texts for i in tokenizer.encode(text)]
        assert row.tokens == len(ids) and row.ids_used == len(set(ids)) and row.documents == len(texts)
        assert row.bytes == sum(len(text.encode()) for text in texts)
        assert row.byte_tokens == sum(
            tokenizer.token_bytes(i)[0] >= 0x80 for i in ids if tokenizer.byte_lengths()[i] == 1
        )
    everything = {i for texts in MIXED.values() for text in texts for i in tokenizer.encode(text)}
    assert total.ids_used == len(everything) < sum(row.ids_used for row in rows)


def test_batches_do_not_show(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare({"t": tokenizer}, MIXED, timed=False).to_dict()
    monkeypatch.setattr("moai_llm.tokenizer.report.BATCH_DOCUMENTS", 1)
    assert compare({"t": tokenizer}, MIXED, timed=False).to_dict() == whole
    monkeypatch.setattr("moai_llm.tokenizer.report.BATCH_CHARACTERS", 1)
    assert compare({"t": tokenizer}, MIXED, timed=False).to_dict() == whole


def test_a_tokenizer_that_loses_text_is_seen(tokenizer: Tokenizer) -> None:
    """And the control: one that does not lose it, and text that even the losing one gives back."""
    lossy = Tokenizer(foreign.wordpiece(), {})
    texts = {"capitals": ["Hello World", "The Bank"], "plain": ["hello world", "the bank"], "unknown": ["☃"]}
    capitals, plain, unknown, total = measure(lossy, texts)
    assert (capitals.round_trip_failures, plain.round_trip_failures) == (2, 0)
    assert (unknown.round_trip_failures, unknown.unknown_tokens, plain.unknown_tokens) == (1, 1, 0)
    assert total.round_trip_failures == 3 and total.first_failure == ("Hello World", "hello world")
    assert plain.first_failure is None
    assert not any(row.round_trip_failures for row in measure(tokenizer, texts))


def test_other_kinds() -> None:
    fallback = Tokenizer(foreign.byte_fallback(), {})
    (row, _) = measure(fallback, {"x": ["he 가나"]})
    assert (row.tokens, row.byte_tokens, row.round_trip_failures, row.unknown_tokens) == (6, 3, 0, 0)
    report = compare({"u": Tokenizer(foreign.unigram(), {}), "f": fallback}, {"x": ["the bank", "☃"]})
    unigram = report.entries[0]
    assert unigram.kind == "Unigram" and unigram.total.unknown_tokens == 1 and unigram.total.round_trip_failures == 1
    assert unigram.unreachable is None


def test_ids_that_no_text_gives(small: Tokenizer) -> None:
    """`zz` has no merge that makes it. With a space put before every text the question cannot be asked."""
    names = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE({**names, "hi": 256, "zz": 257, "Ġh": 258}, [("h", "i"), ("Ġ", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    assert compare({"t": Tokenizer(backend, {})}, {"x": ["hi"]}).entries[0].unreachable == 1
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert compare({"t": Tokenizer(backend, {})}, {"x": ["hi"]}).entries[0].unreachable is None


def test_a_lone_surrogate_counts_as_what_it_is_read_as(small: Tokenizer) -> None:
    (row, _) = measure(small, {"x": ["a\ud800b"]})
    assert (row.bytes, row.characters, row.tokens, row.round_trip_failures) == (5, 3, 5, 0)


def test_parallel_texts(small: Tokenizer) -> None:
    report = compare({"s": small}, {"en": ["hello"], "ko": ["가"], "x": ["y"]}, parallel=["en", "ko"])
    assert report.parallel == ["en", "ko"] and report.entries[0].parity == {"en": 1.0, "ko": 3.0}
    assert compare({"s": small}, {"en": ["a"]}, parallel=["en", "ko"]).parallel == []


def test_speed_is_measured_or_left_out(tokenizer: Tokenizer) -> None:
    timed = compare({"t": tokenizer}, MIXED).entries[0].total
    assert timed.mb_per_cpu_second > 0 and timed.mb_per_second > 0
    still = compare({"t": tokenizer}, MIXED, timed=False).entries[0].total
    assert math.isnan(still.mb_per_second) and still.to_dict()["mb_per_second"] is None


def test_progress(tokenizer: Tokenizer) -> None:
    seen: list[tuple[str, int]] = []
    compare({"t": tokenizer}, MIXED, progress=lambda label, size: seen.append((label, size)))
    assert seen == [(label, sum(len(text.encode()) for text in texts)) for label, texts in MIXED.items()]


def test_json(tokenizer: Tokenizer) -> None:
    report = compare({"t": tokenizer, "w": Tokenizer(foreign.wordpiece(), {})}, MIXED, parallel=["en", "ko"])
    held = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [t["name"] for t in held["tokenizers"]] == ["t", "w"] and held["parallel"] == ["en", "ko"]
    for entry, there in zip(report.entries, held["tokenizers"]):
        assert there["fingerprint"] == entry.fingerprint and there["longest"]["bytes"] == entry.longest_bytes
        for row, kept in zip([*entry.rows, entry.total], [*there["rows"], there["total"]]):
            assert kept["bytes_per_token"] == row.bytes_per_token and kept["tokens"] == row.tokens
    assert [text["unspaced"] for text in held["texts"]] == [False, False, True, False]


@pytest.mark.parametrize("texts", [{"en": []}, {"en": [""]}, {"a": ["x"], "en": iter(())}])
def test_no_text(small: Tokenizer, texts: dict[str, list[str]]) -> None:
    with pytest.raises(MoaiError, match="en: there is no text to measure"):
        measure(small, texts)


def test_the_sum_keeps_its_name(small: Tokenizer) -> None:
    with pytest.raises(MoaiError, match="'all' is the name of the sum"):
        measure(small, {"all": ["x"]})


def test_a_tokenizer_that_cannot_encode_is_named(small: Tokenizer) -> None:
    broken = Tokenizer(foreign.speechless(), {})
    with pytest.raises(MoaiError, match="tokenizer mute cannot encode text: .*UNK"):
        compare({"fine": small, "mute": broken}, {"x": iter(["hello"])})


def test_the_price(small: Tokenizer) -> None:
    file = io.StringIO()
    Console(file=file, width=120).print(price_table(measure(small, {"en": ["hello hello\n"], "ko": ["가!"]})))
    assert [line.split() for line in file.getvalue().splitlines()[1:]] == [
        ["en", "3.00", "2.00", "0.33", "0.0%", "0"], ["ko", "1.00", "4.00", "2.00", "75.0%", "0"],
        ["all", "2.00", "2.67", "0.57", "37.5%", "0"],
    ]  # fmt: skip
    file = io.StringIO()
    Console(file=file, width=120).print(price_table(measure(Tokenizer(foreign.wordpiece(), {}), {"x": ["A", "the"]})))
    assert "1 of 2" in file.getvalue()
