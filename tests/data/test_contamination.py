"""Overlap with evaluation sets: planted passages are found in every script, and what is merely alike is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.data.clean import Cleaner, Drop, config_from_tree
from moai_llm.data.contamination import COMMON, EvaluationIndex, check_contamination, index_evaluations
from moai_llm.data.documents import Document, read_documents
from moai_llm.data.sources import Reading
from moai_llm.data.units import reference_grams, split_units
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data
from tests.data.test_clean import GOOD

SETS = ("HumanEval.jsonl", "TruthfulQA.csv", "arc_challenge.jsonl", "gsm8k_test.jsonl", "hellaswag_val_2000.txt",
        "lambada_openai.jsonl", "mmlu.jsonl")  # fmt: skip


@pytest.mark.parametrize("language", GOOD)
def test_a_planted_passage_is_found_and_a_shorter_one_is_not(language: str) -> None:
    index = EvaluationIndex()
    index.add("set", [GOOD[language]])
    text = GOOD[language]
    units, n = split_units(text), 13 if language == "en" else 26
    assert index.items_in(text) == [0] and index.items_in("前 " + text.upper() + " x") == [0]
    cut = text
    while len(split_units(cut)) > n:
        cut = cut[:-1]
    assert len(split_units(cut)) == n < len(units)
    assert index.items_in(cut) == [0]
    assert index.items_in(cut[1:] if language != "en" else cut.split(" ", 1)[1]) == [], "one unit less"
    assert index.items_in(GOOD["en" if language != "en" else "ko"]) == []


def test_overlap_is_that_of_the_definition() -> None:
    index, texts = EvaluationIndex(4, 6), [GOOD["en"][:100], GOOD["ko"][:60], GOOD["ko"][30:], "too short"]
    index.add("a", texts[:2])
    index.add("b", texts[2:])
    assert index.sizes == [2, 2] and index.too_short == [0, 1] and [index.set_of(i) for i in range(4)] == [0, 0, 1, 1]

    def grams(text: str) -> set[tuple[str, ...]]:
        return {g for g in reference_grams(split_units(text), 4, 6) if len(g) == (4 if g[0].isascii() else 6)}

    for text in [*texts, GOOD["en"], GOOD["ko"][40:80], GOOD["ja"], "", "lies at the end of"]:
        assert index.items_in(text) == [i for i, item in enumerate(texts) if grams(text) & grams(item)], text


def test_phrases_of_the_form_do_not_count() -> None:
    form = "which of the following answers to the question is the right one choose from a to d"
    items = [f"{form} {GOOD['en'][i * 15 : i * 15 + 9]} item{i} of the set" for i in range(COMMON + 1)]
    for count, expected in ((COMMON, list(range(COMMON))), (COMMON + 1, [])):
        index = EvaluationIndex()
        index.add("set", items[:count])
        assert index.items_in(f"Xx {form} zz") == expected


def test_a_corpus_is_checked_and_the_rest_is_written(tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    questions = [GOOD["ko"], GOOD["en"], GOOD["zh"]]
    rows = [{"id": i, "question": question, "choices": ["a", "b"]} for i, question in enumerate(questions)]
    exam.write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = index_evaluations([exam])
    clean = Document("nothing of the kind", "f:1", {"id": 1})
    dirty = Document(f"This stood on the web. {GOOD['ko'][20:80]} So it did.", "f:2", {})
    report = check_contamination([clean, dirty], index, tmp_path / "out.jsonl")
    assert (report.read, report.contaminated) == (2, 1)
    assert [tuple(row) for row in report.sets] == [(str(exam), 3, 0, 1)]
    assert report.examples[0][:2] == ("f:2", str(exam)) and report.examples[0][2] in GOOD["ko"]
    assert [d.text for d in read_documents([tmp_path / "out.jsonl"], Reading())] == [clean.text]
    assert check_contamination([clean, dirty], index).contaminated == 1
    cleaner = Cleaner(config_from_tree({"language": "script", "contamination": {"against": [str(exam)]}}))
    assert cleaner(GOOD["ko"]) == Drop("contamination", str(exam)) and cleaner(GOOD["ja"]) == GOOD["ja"]
    only = index_evaluations([exam], Reading(mapping={"text": "question"}))
    assert only.sizes == [3] and only.items_in(GOOD["zh"]) == [2]
    with pytest.raises(MoaiError, match="as long as an n-gram"):
        index_evaluations([exam], Reading(mapping={"text": "choices"}))
    with pytest.raises(MoaiError, match="no column 'nothing'"):
        index_evaluations([exam], Reading(mapping={"text": "nothing"}))
    with pytest.raises(MoaiError, match="at least 2 units"):
        EvaluationIndex(words=1)


def test_the_evaluation_sets_are_found_where_they_are_planted_and_nowhere_else() -> None:
    paths = [shared_data(f"eval/{name}") for name in SETS]
    index = index_evaluations(paths)
    assert [Path(name).name for name in index.names] == list(SETS)
    corpus = [d for d in read_documents([shared_data("en/wikitext2_valid.txt")], Reading())]
    pieces = [Document(d.text[i : i + 4000], d.place, {}) for d in corpus for i in range(0, len(d.text), 4000)]
    before = check_contamination(pieces, index)
    assert before.contaminated <= 0.05 * len(pieces)
    planted = []
    for k, path in enumerate(paths):
        text = next(iter(read_items_of(path)))
        planted.append(pieces[k]._replace(text=pieces[k].text[:2000] + "\n" + text + "\n" + pieces[k].text[2000:]))
    after = check_contamination(planted, index)
    assert after.contaminated == len(planted) and all(row.found >= 1 for row in after.sets)


def read_items_of(path: Path) -> list[str]:
    from moai_llm.data.contamination import read_items

    return [text for _, text in read_items(path, Reading()) if len(text.split()) > 40][:1]
