"""Checks on the embedded multilingual instruction set: counts, schema, lengths, distinctness and script."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "moai_llm" / "data" / "embedded" / "instructions.jsonl"
RECORDS = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]
MIN_RECORDS = {"ko": 120, "en": 110, "ja": 90, "zh": 90}
TOPICS = {"finance", "everyday", "science", "geography", "language", "computing", "arithmetic", "identity"}
CJK_LIMITS = {"system": 60, "user": 60, "assistant": 110}
EN_LIMITS = {"system": 90, "user": 90, "assistant": 180}
REQUIRED = [("ko", "복리가 뭐예요?"), ("en", "What is inflation?"), ("ja", "日本の首都はどこですか?")]
HANGUL, KANA, HAN = re.compile("[가-힣]"), re.compile("[ぁ-ゖァ-ヺ]"), re.compile("[\u4e00-\u9fff]")
FORBIDDEN = re.compile(
    r"<\||\|>|</?s>|\[/?INST\]|\*\*|__|`|^#|^[-*] |[\n\r\t\ufffd\u200b\ufeff]|[\U0001f000-\U0001faff\u2600-\u27bf]"
)


def turns(record, role):
    return [message["content"] for message in record["messages"] if message["role"] == role]


def test_counts():
    langs = Counter(record["lang"] for record in RECORDS)
    assert len(RECORDS) >= 420 and set(langs) == set(MIN_RECORDS)
    assert all(langs[lang] >= least for lang, least in MIN_RECORDS.items())
    topics = Counter((record["lang"], record["topic"]) for record in RECORDS)
    assert all(topics[lang, "finance"] >= 0.3 * langs[lang] for lang in langs)
    assert all(topics[lang, topic] >= 6 for lang in langs for topic in TOPICS)
    assert sum(len(turns(record, "user")) == 2 for record in RECORDS) >= 20
    assert sum(record["messages"][0]["role"] == "system" for record in RECORDS) >= 10


def test_schema_and_roles():
    for record in RECORDS:
        assert list(record) == ["lang", "topic", "messages"] and record["topic"] in TOPICS
        assert all(list(message) == ["role", "content"] for message in record["messages"])
        roles = [message["role"] for message in record["messages"]]
        roles = roles[1:] if roles[0] == "system" else roles
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)


def test_text_is_short_and_clean():
    for record in RECORDS:
        limits = EN_LIMITS if record["lang"] == "en" else CJK_LIMITS
        for message in record["messages"]:
            text = message["content"]
            assert 0 < len(text) <= limits[message["role"]], text
            assert text == text.strip() == unicodedata.normalize("NFC", text), text
            assert not FORBIDDEN.search(text), text


def test_same_question_has_same_answer():
    asked, answers = set(), {}
    for record in RECORDS:
        for question, answer in zip(turns(record, "user"), turns(record, "assistant")):
            assert (record["lang"], question) not in asked, question
            asked.add((record["lang"], question))
            key = (record["lang"], re.sub(r"[\W_]", "", question).casefold())
            assert answers.setdefault(key, answer) == answer, question


@pytest.mark.parametrize("lang, question", REQUIRED)
def test_demo_question_is_present(lang, question):
    assert any(r["lang"] == lang and r["messages"][0]["content"] == question for r in RECORDS)


def test_answers_use_the_script_of_their_language():
    for record in RECORDS:
        for text in turns(record, "assistant"):
            expected = {"ko": HANGUL, "ja": KANA, "zh": HAN, "en": re.compile("[A-Za-z]")}[record["lang"]]
            assert expected.search(text), text
            assert record["lang"] != "zh" or not KANA.search(text), text
