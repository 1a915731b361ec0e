"""The embedded text that tokenizers are measured on: what it holds, and that its languages are translations."""

from __future__ import annotations

import json
import unicodedata

import pytest

from moai_llm.data.embedded import PARALLEL, SAMPLE, sample_texts

TEXTS = sample_texts()
SCRIPTS = {"ko": ("HANGUL",), "en": ("LATIN",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "zh": ("CJK",)}


def test_labels_and_sizes() -> None:
    assert list(TEXTS) == ["ko", "en", "ja", "zh", "code", "finance", "mixed"]
    sizes = {label: sum(len(text.encode()) for text in texts) for label, texts in TEXTS.items()}
    assert all(2000 <= size <= 6000 for size in sizes.values()), sizes
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert all(set(record) == {"label", "text"} for record in records)
    assert len({record["text"] for record in records}) == len(records)


@pytest.mark.parametrize("label", SCRIPTS)
def test_each_language_is_in_its_script(label: str) -> None:
    letters = [unicodedata.name(c).split()[0] for text in TEXTS[label] for c in text if c.isalpha()]
    assert sum(name in SCRIPTS[label] for name in letters) / len(letters) > 0.95
    assert all(text == unicodedata.normalize("NFC", text) for text in TEXTS[label])


def test_translations_stand_side_by_side() -> None:
    """As many documents, in one order: numbers that are written in digits are the same in all."""
    documents = list(zip(*(TEXTS[label] for label in PARALLEL), strict=True))
    assert len(documents) == 8
    for number in ("1840", "300", "360", "204", "25"):
        holding = [[number in text for text in document] for document in documents]
        assert [all(held) for held in holding] == [any(held) for held in holding] and any(map(any, holding))


def test_code_is_code() -> None:
    python = next(text for text in TEXTS["code"] if "dataclass" in text)
    compile(python, "sample", "exec")
    json.loads(next(text for text in TEXTS["code"] if text.startswith("{")))
