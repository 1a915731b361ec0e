"""`moai tokenizer train` and `extend`: languages, speed modes, saved words, stages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.commands.tokenizer_train import by_language
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import load_tokenizer
from tests.commands.conftest import Moai

TEXTS = {
    "ko": "복리는 이자에 이자가 붙는 방식이에요. 예금과 적금은 은행에서 가입할 수 있어요. {} 번째 문장입니다.\n",
    "en": "The quick brown fox jumps over the lazy dog. Sentence number {} tells of interest on deposits.\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for language, text in TEXTS.items():
        (tmp_path / language).mkdir()
        for part in range(3):
            content = "".join(text.format(100 * part + i) for i in range(100))
            (tmp_path / language / f"{part}.txt").write_text(content, encoding="utf-8")
    return tmp_path


def test_languages_in_one_run(moai: Moai, folder: Path) -> None:
    out = folder / "tok"
    source = f"{folder}/{{language}}"
    output = moai("tokenizer", "train", source, "--languages", "ko", "en", "--vocab-size", 400, "--out", out)
    assert "for each of 2 languages" in output and "bytes per token" in output
    assert "measured on what it was learned from" in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line[:2] in TEXTS}
    assert set(rows) == {"ko", "en"} and all(float(row[1]) > 1.5 and row[-1] == "0" for row in rows.values())
    (stage,) = json.loads((out / "stages.json").read_text())
    assert stage["added"] == 400 and stage["corpus"]["ko"]["documents"] == 3
    labelled = folder / "labelled"
    moai("tokenizer", "train", f"ko={folder}/ko", f"en={folder}/en", "--fast", "--vocab-size", 400, "--out", labelled)
    assert load_tokenizer(labelled).fingerprint == load_tokenizer(out).fingerprint  # also the default and --fast


def test_the_words_are_kept_for_another_size(moai: Moai, fails: Moai, folder: Path) -> None:
    first, second, direct = folder / "a", folder / "b", folder / "c"
    moai("tokenizer", "train", folder / "en", "--vocab-size", 320, "--out", first, "--fast")
    counts = first / "word_counts.npz"
    moai("tokenizer", "train", "--counts", counts, "--vocab-size", 335, "--out", second)
    moai("tokenizer", "train", folder / "en", "--vocab-size", 335, "--out", direct)
    assert load_tokenizer(second).fingerprint == load_tokenizer(direct).fingerprint
    assert "leave them out" in fails("tokenizer", "train", folder / "en", "--counts", counts, "--out", folder / "d")
    assert "no such table" in fails("tokenizer", "train", "--counts", folder / "nothing.npz", "--out", folder / "d")


@pytest.mark.parametrize("mode", ["--turbo", "--ultrafast"])
def test_a_part_of_the_text(moai: Moai, tmp_path: Path, mode: str) -> None:
    with (tmp_path / "t.jsonl").open("w") as file:
        for i in range(4000):
            file.write(json.dumps({"text": TEXTS["en"].format(i) * 3}) + "\n")
    output = moai("tokenizer", "train", tmp_path / "t.jsonl", mode, "--vocab-size", 330, "--out", tmp_path / "tok")
    assert "measured on held-out text" in output and ("for tests only" in output) == (mode == "--ultrafast")
    (stage,) = json.loads((tmp_path / "tok" / "stages.json").read_text())
    share = stage["corpus"]["text"]["bytes_learned_from"] / stage["corpus"]["text"]["bytes_read"]
    assert abs(share / (0.2 if mode == "--turbo" else 0.02) - 1) < 0.3


def test_code_is_measured_on_request(moai: Moai, folder: Path) -> None:
    output = moai("tokenizer", "train", folder / "en", "--vocab-size", 340, "--out", folder / "a", "--code", "--fast")
    python = next(line for line in output.splitlines() if line.startswith("Python"))
    assert float(python.split()[2]) > 1


def test_unigram(moai: Moai, folder: Path) -> None:
    pytest.importorskip("sentencepiece", reason="needs the extra unigram")
    out = folder / "u"
    moai("tokenizer", "train", folder / "en", "--algorithm", "unigram", "--vocab-size", 320, "--out", out)
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer.encode("The fox <0x41> 이자")) == "The fox <0x41> 이자"


def test_extended_in_stages(moai: Moai, fails: Moai, folder: Path) -> None:
    base, first, second = folder / "base", folder / "first", folder / "second"
    moai("tokenizer", "train", folder / "en", "--vocab-size", 330, "--out", base, "--fast")
    moai("tokenizer", "extend", base, "--source", folder / "ko", "--vocab-size", 360, "--out", first)
    output = moai("tokenizer", "extend", first, "--source", folder / "en", "--vocab-size", 370, "--out", second)
    assert "every id below 360 means what it did" in output
    stages = json.loads((second / "stages.json").read_text())
    assert [(s["kind"], s["first_id"], s["added"]) for s in stages] == [
        ("train", 0, 330), ("extend", 330, 30), ("extend", 360, 10),
    ]  # fmt: skip
    old, new = load_tokenizer(base), load_tokenizer(second)
    assert new.special_ids == old.special_ids and new.vocab_size == 370
    assert len(new.encode("복리는 이자에")) < len(old.encode("복리는 이자에"))
    again = ("tokenizer", "extend", second, "--source", folder / "en", "--out", folder / "x", "--vocab-size")
    assert "has 370 tokens already" in fails(*again, 370)
    assert "supports only" in fails(*again, 9000)
    assert "holds a tokenizer already" in fails(*again[:-3], "--out", first, "--vocab-size", 400)
    assert not (folder / "x").exists()


def test_options_that_cannot_be(fails: Moai, folder: Path) -> None:
    train = ("tokenizer", "train", folder / "en", "--out", folder / "x")
    assert "--sample-mb must be positive, got -1" in fails(*train, "--sample-mb", -1)
    assert "not allowed with argument" in fails(*train, "--fast", "--turbo", code=2)
    assert "256 bytes and 5 special tokens need 261" in fails(*train, "--vocab-size", 260, "--special-tokens", "<|x|>")
    assert "not blank, got ' '" in fails(*train, "--special-tokens", " ")
    assert "name what to learn from" in fails("tokenizer", "train", "--out", folder / "x")


@pytest.mark.parametrize(
    ("sources", "languages", "message"),
    [
        (["ko=a"], ["en"], "ko is not among --languages en"),
        (["ko=a"], ["ko", "en"], "names en, but no source is given for it: en=PATH"),
        (["plain"], ["ko"], "say its language, ko=plain"),
        (["{language}/x"], None, "stands for each of --languages"),
    ],
)
def test_languages_and_sources_that_do_not_fit(sources: list[str], languages: list[str] | None, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        by_language(sources, languages)


def test_sources_by_language(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_language(["ko=a", "en=b", "ko=c"], None) == {"ko": ["a", "c"], "en": ["b"]}
    assert by_language(["w-{language}"], ["ja", "zh"]) == {"ja": ["w-ja"], "zh": ["w-zh"]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").mkdir()
    assert by_language(["year=2020"], None) == {"text": ["year=2020"]}  # a path that is there is a path
