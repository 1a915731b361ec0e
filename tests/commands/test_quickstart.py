"""Quickstart end to end, small: it resumes, refuses to mix, takes the user's text, and at full size answers (slow)."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.commands.quickstart import QUESTIONS, SFT_ROW, _conversations
from moai_llm.data.embedded import instructions, library_texts
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render


def quickstart(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(["quickstart", *map(str, arguments)])
    return capsys.readouterr().out


@pytest.fixture
def small(tmp_path: Path) -> list[object]:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i:02d}.txt").write_text(f"Document {i}. " + "Interest is paid on deposits. 이자가 붙어요. " * 20)
    return ["--text", texts, "--out", tmp_path / "out", "--steps", 4, "--sft-epochs", 0.2, "--vocab-size", 1024]


def test_own_text_then_again_then_other_options(
    small: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = quickstart(capsys, *small)
    for expected in (
        "1/6",
        "6/6",
        "pretrain 4/4",
        "fine-tune",
        "bits per byte",
        *QUESTIONS,
        "moai chat",
        "Everything lies in",
    ):
        assert expected in output
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {"tokenizer", "data", "pretrain", "sft", "model", "quickstart.json"}
    assert not (out / "model" / "training_state").exists()
    weights = (out / "model" / "model.safetensors").read_bytes()
    again = quickstart(capsys, *small)
    assert "going on with what is in" in again and "pretrain 4/4" not in again
    assert (out / "model" / "model.safetensors").read_bytes() == weights
    with pytest.raises(SystemExit, match="holds a quickstart with other options .*steps 4 -> 5.*--fresh"):
        quickstart(capsys, *small, "--steps", 5)
    with pytest.raises(SystemExit, match="nowhere: no such file or folder"):
        quickstart(capsys, *small, "--text", tmp_path / "nowhere", "--fresh")
    assert (out / "model" / "model.safetensors").is_file()  # nothing is deleted before that is known
    assert "pretrain 5/5" in quickstart(capsys, *small, "--steps", 5, "--fresh")


def test_a_stopped_quickstart_goes_on(small: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart(capsys, *small)
    out = tmp_path / "out"
    weights = (out / "model" / "model.safetensors").read_bytes()
    for gone in ("model", "sft", "data/sft"):
        import shutil

        shutil.rmtree(out / gone)
    output = quickstart(capsys, *small)
    assert "fine-tune" in output and "pretrain 4/4" not in output
    assert (out / "model" / "model.safetensors").read_bytes() == weights  # the same as without the stop


def test_a_signal_stops_the_whole_quickstart(
    small: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moai_llm.training import loop

    step = loop.train_step

    def interrupted(*arguments: object, **options: object):  # type: ignore[no-untyped-def]
        signal.raise_signal(signal.SIGINT)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(SystemExit, match="stopped; the same command goes on from here"):
        quickstart(capsys, *small)
    monkeypatch.undo()
    output = quickstart(capsys, *small)
    assert "resumed from" in output and "Everything lies in" in output


def test_it_does_not_touch_a_folder_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="not empty and not a quickstart"):
        quickstart(capsys, "--out", tmp_path, "--fresh")
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("empty.txt", b"", "no document had any token"),
    ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
    ("picture.png", b"x", "cannot read .png"),
])  # fmt: skip
def test_unusable_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        quickstart(capsys, "--text", tmp_path / name, "--out", tmp_path / "out", "--steps", 1)


def test_the_embedded_text_is_there() -> None:
    texts = list(library_texts())
    assert sum(len(text) for text, _ in texts) > 3_000_000
    assert {"pydoc topic for", "documentation of json/__init__.py", "source of json/__init__.py"} <= {
        p for _, p in texts
    }
    assert len(list(instructions())) >= 300


def test_instructions_strung_together_fit_into_a_row(tokenizer: Tokenizer) -> None:
    strung = list(_conversations(tokenizer))[len(list(instructions())) :]
    lengths = [len(render(tokenizer, messages).ids) for messages, _ in strung if len(messages) > 2]
    assert len(lengths) > 50 and max(lengths) <= SFT_ROW
    assert all(messages[-1]["role"] == "assistant" for messages, _ in strung)


@pytest.mark.slow
def test_the_whole_quickstart_answers_from_its_instructions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = quickstart(capsys, "--out", tmp_path / "out")
    known = {messages[-2]["content"]: messages[-1]["content"] for messages, _ in instructions() if len(messages) == 2}
    answers = output.split("three questions")[1].split("Done in")[0]
    right = [question for question in QUESTIONS if known[question].split()[0] in answers]
    assert len(right) >= 2, answers
    assert json.loads((tmp_path / "out" / "quickstart.json").read_text())["steps"] == 200
