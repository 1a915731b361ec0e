"""moai data clean, dedup and contamination, and cleaning on the way into a store."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moai_llm.data.shards import Store
from moai_llm.tokenizer import Tokenizer
from tests.data.test_clean import GOOD

Moai = Callable[..., str]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Four good texts, a short one, a copy, a near copy; and the clean.yaml that needs no library."""
    texts = [*GOOD.values(), "too short\x1b[31m", GOOD["ko"], GOOD["en"].replace("storm", "gale") + " And so on."]
    rows = [{"body": text, "id": i} for i, text in enumerate(texts)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "clean.yaml").write_text("language: script\npii: simple\n")
    return tmp_path / "in.jsonl"


def rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_clean(moai: Moai, fails: Moai, corpus: Path, tmp_path: Path) -> None:
    command = ["data", "clean", corpus, "--map", "text=body", "--config", tmp_path / "clean.yaml", "--out"]
    output = moai(*command, tmp_path / "out.jsonl", "--report", tmp_path / "report.json")
    assert "read" in output and "kept" in output and "6" in output and f"written to {tmp_path}/out.jsonl" in output
    assert f"dropped: min_words 1 14.3% {corpus}:5: too short\\x1b[31m" in " ".join(output.split())
    assert "\x1b" not in output, "what would drive the terminal is shown as it is written"
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["read"] == 7 and report["kept"] == 6 and report["dropped"] == {"min_words": 1}
    assert report["examples"]["min_words"][0]["document"] == f"{corpus}:5"
    kept = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in kept] == [0, 1, 2, 3, 5, 6]
    assert kept[0] == {"text": GOOD["en"], "source": f"{corpus}:1", "id": 0}
    assert "--overwrite" in fails(*command, tmp_path / "out.jsonl")
    assert "both a source and the output" in fails(
        "data",
        "clean",
        tmp_path / "out.jsonl",
        "--out",
        tmp_path / "out.jsonl",
        "--config",
        tmp_path / "clean.yaml",
        "--overwrite",
    )
    assert rows(tmp_path / "out.jsonl") == kept
    (tmp_path / "clean.yaml").write_text("rules: {min_word: 3}\n")
    assert "did you mean 'min_words'" in fails(*command, tmp_path / "new.jsonl")


def test_dedup(moai: Moai, fails: Moai, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["data", "dedup", corpus, "--map", "text=body", "--report", tmp_path / "r.json", "--overwrite", "--out"]
    output = moai(*command, tmp_path / "out", "--bands", 32, "--rows", 4)
    assert "dropped: equal" in output and "dropped: near-duplicate" in output
    assert f"equal: {corpus}:6 is like {corpus}:2" in output and f"near: {corpus}:7 is like {corpus}:1" in output
    assert json.loads((tmp_path / "r.json").read_text())["near"] == 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["part-00000.jsonl.zst"]
    report = moai(*command, tmp_path / "out", "--no-near")
    assert "near-duplicate" not in report
    moai(*command, tmp_path / "out.jsonl", "--verify", "--threshold", 0.99, "--bands", 32, "--rows", 4)
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == [0, 1, 2, 3, 4, 6]
    for arguments, words in (
        (("--threshold", 0.5), "without --verify"),
        (("--verify", "--no-near"), "looks for none"),
        (("--python",), "without --code"),
        (("--bands", 0), "bands must be at least 1"),
        (("--memory", "much"), "not a size"),
    ):
        assert words in fails(*command, tmp_path / "o.jsonl", *arguments)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    assert "read once" in fails("data", "dedup", "-", "--out", tmp_path / "o.jsonl")


def test_contamination(moai: Moai, fails: Moai, corpus: Path, tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": "Read this. " + GOOD["ja"], "id": "x"}) + '\n{"question": "short"}\n')
    command = ["data", "contamination", corpus, "--map", "text=body", "--against", exam]
    output = moai(*command, "--report", tmp_path / "r.json")
    assert "1 of 7 documents share an n-gram with an evaluation set (14.3%)" in output
    assert f"{corpus}:3 has of {exam}: 古い港は" in output and "written to" not in output
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["sets"] == [{"name": str(exam), "items": 2, "too_short": 1, "found": 1}]
    moai(*command, "--out", tmp_path / "out.jsonl")
    assert [row["id"] for row in rows(tmp_path / "out.jsonl")] == [0, 1, 3, 4, 5, 6]
    assert "no column 'answer'" in fails(*command, "--eval-text", "answer")


def test_cleaning_on_the_way_into_a_store(
    moai: Moai, fails: Moai, corpus: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    command = ["data", "prepare", corpus, "--map", "text=body", "--tokenizer", tokenizer.save(tmp_path / "tok")]
    output = " ".join(moai(*command, "--out", tmp_path / "store", "--clean", tmp_path / "clean.yaml").split())
    assert "7 6 1 min_words 0" in output and len(Store(tmp_path / "store")) == 6
    assert "7 7 0 0" in " ".join(moai(*command, "--out", tmp_path / "control").split())
    (tmp_path / "clean.yaml").write_text("language: script\nkeep_languages: [th]\n")
    assert "drop all documents: 7 keep_languages" in fails(
        *command, "--out", tmp_path / "none", "--clean", tmp_path / "clean.yaml"
    )
    assert not (tmp_path / "none").exists()
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"question": "a", "answer": "b"}\n')
    base = ["data", "prepare", chat, "--chat", "--tokenizer", tmp_path / "tok", "--out", tmp_path / "c"]
    assert "not for conversations" in fails(*base, "--clean", tmp_path / "clean.yaml")
