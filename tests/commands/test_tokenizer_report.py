"""moai tokenizer report and show: what they take, what they print and write, and the message each mistake gets."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from moai_llm.commands import tokenizer_report, tokenizer_show
from moai_llm.commands.tokenizer_report import short_names
from moai_llm.commands.tokenizer_show import _with_ids
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.pieces import Piece
from moai_llm.tokenizer.report import decimal
from tests.commands.conftest import Moai
from tests.conftest import shared_data
from tests.tokenizer import foreign


@pytest.fixture
def ours(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return tokenizer.save(tmp_path / "ours")


@pytest.fixture
def lossy(tmp_path: Path) -> Path:
    return foreign.saved(foreign.wordpiece(), tmp_path / "lossy")


# ---------------------------------------------------------------- report


def test_the_built_in_text(moai: Moai, ours: Path, lossy: Path, tmp_path: Path) -> None:
    held, page = tmp_path / "new" / "r.json", tmp_path / "r.html"
    output = moai("tokenizer", "report", ours, lossy, "--json", held, "--html", page)
    assert (
        output.startswith("Measured on ko 8 documents") and "relative to en" in output and "MB per CPU second" in output
    )
    assert f"written to {held}" in output and f"written to {page}" in output
    report = json.loads(held.read_text(encoding="utf-8"))
    assert [t["label"] for t in report["texts"]] == ["ko", "en", "ja", "zh", "code", "finance", "mixed"]
    assert [t["unspaced"] for t in report["texts"]][:4] == [False, False, True, True]
    (line,) = [line for line in output.split("\n\n")[1].splitlines() if line.startswith("ours")]
    rows = [*report["tokenizers"][0]["rows"], report["tokenizers"][0]["total"]]
    assert [n.rstrip("*") for n in line.split()[2:]] == [decimal(row["bytes_per_token"]) for row in rows]
    first, second = report["tokenizers"]
    assert first["total"]["round_trip_failures"] == 0 and second["total"]["round_trip_failures"] == 56
    assert second["kind"] == "WordPiece" and second["total"]["unknown_tokens"] > 0
    assert "lossy does not give text back" in output and "56 of 56" in output
    assert "<svg" in page.read_text(encoding="utf-8")


def test_given_text(moai: Moai, ours: Path, text_file: Path, tmp_path: Path) -> None:
    """Labels, paths without one, two files of one label; the same report each time without speeds."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("Interest is paid.", encoding="utf-8")
    (tmp_path / "more.csv").write_text("text\n이자\n", encoding="utf-8")
    held = tmp_path / "r.json"
    command = ("tokenizer", "report", ours, "--text", f"mine={text_file}", "--text", tmp_path / "notes",
               "--text", f"mine={tmp_path / 'more.csv'}", "--no-speed", "--json", held)  # fmt: skip
    output = moai(*command)
    report = json.loads(held.read_text(encoding="utf-8"))
    assert [(t["label"], t["documents"]) for t in report["texts"]] == [("mine", 41), ("notes", 1)]
    assert "MB per" not in output and "relative to" not in output and report["parallel"] == []
    before = held.read_bytes()
    assert moai(*command) == output and held.read_bytes() == before


def test_translations_of_your_own(moai: Moai, fails: Moai, ours: Path, tmp_path: Path) -> None:
    for label, text in (("en", "interest"), ("ko", "이자")):
        (tmp_path / f"{label}.txt").write_text(text, encoding="utf-8")
    texts = ("--text", tmp_path / "en.txt", "--text", tmp_path / "ko.txt")
    output = moai("tokenizer", "report", ours, *texts, "--parallel", "en,ko")
    assert "relative to en" in output
    message = fails("tokenizer", "report", ours, *texts, "--parallel", "en,kr")
    assert "there is no text 'kr'; the labels are en, ko" in message
    assert "name at least two labels" in fails("tokenizer", "report", ours, *texts, "--parallel", "en")


def test_no_more_than_asked(moai: Moai, ours: Path, text_file: Path, tmp_path: Path) -> None:
    held = tmp_path / "r.json"
    moai("tokenizer", "report", ours, "--text", f"t={text_file}", "--limit-mb", 0.001, "--json", held)
    (text,) = json.loads(held.read_text(encoding="utf-8"))["texts"]
    assert 995 <= text["bytes"] <= 1000  # the last character may not fit


def test_a_folder_of_tokenizers(moai: Moai, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizers"
    for name in ("one", "two"):
        tokenizer.save(folder / name)
    (folder / "notes.md").write_text("not a tokenizer")
    output = moai("tokenizer", "report", folder, "--no-speed")
    assert re.search(r"^one +512 ", output, re.M) and re.search(r"^two +512 ", output, re.M)


def test_names_are_told_apart(moai: Moai, tokenizer: Tokenizer, tmp_path: Path) -> None:
    a, b = tokenizer.save(tmp_path / "a" / "tok"), tokenizer.save(tmp_path / "b" / "tok")
    other = tokenizer.save(tmp_path / "other") / "tokenizer.json"
    assert short_names([str(a), str(b), str(other)]) == ["a/tok", "b/tok", "other"]
    assert short_names([str(a), str(a), str(a)])[0].endswith("a/tok")
    assert [name.endswith(end) for name, end in zip(short_names([str(a)] * 3), ("tok", " (2)", " (3)"))] == [True] * 3
    assert short_names(["o200k_base", "o200k_base"]) == ["o200k_base", "o200k_base (2)"]
    (tmp_path / "cl.tiktoken").write_text("")
    assert short_names([str(tmp_path / "cl.tiktoken")]) == ["cl"]
    assert "b/tok" in moai("tokenizer", "report", a, b, "--no-speed")


def test_a_broken_one_is_named_before_any_work(
    fails: Moai, ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measuring began")

    monkeypatch.setattr("moai_llm.tokenizer.report.Meter.add", never)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    assert "broken" in fails("tokenizer", "report", ours, broken)
    mute = foreign.saved(foreign.speechless(), tmp_path / "mute")
    assert "tokenizer mute cannot encode text" in fails("tokenizer", "report", ours, mute)
    assert "nowhere" in fails("tokenizer", "report", ours, tmp_path / "nowhere")
    report = ("tokenizer", "report", ours)
    assert "nowhere.txt: no such file" in fails(*report, "--text", "ko=nowhere.txt")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl: there is no text in it" in fails(*report, "--text", empty)
    assert "give LABEL=PATH" in fails(*report, "--text", "ko=")
    assert "is a folder: name a file to write" in fails(*report, "--json", tmp_path)
    assert "--limit-mb must be above 0" in fails(*report, "--limit-mb", 0)
    assert "there are none" in fails(*report, "--map", "text=body")


def test_progress_without_a_terminal(
    moai: Moai, ours: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_report, "QUIET_SECONDS", -1.0)
    with caplog.at_level("INFO", logger="moai_llm"):
        moai("tokenizer", "report", ours)
    assert [record.message for record in caplog.records][:2] == ["ko: 0.0 MB", "en: 0.0 MB"]


def test_real_text(moai: Moai, tmp_path: Path) -> None:
    """A tokenizer trained on one language is the better one for it: the table says so."""
    held = tmp_path / "r.json"
    for language in ("ko", "en"):
        book = shared_data(f"{language}/rust_book.jsonl")
        moai("tokenizer", "train", book, "--vocab-size", 4096, "--out", tmp_path / "toks" / language)
    texts = [f"--text={label}={shared_data(f'{label}/hf_course.jsonl')}" for label in ("ko", "en")]
    moai("tokenizer", "report", tmp_path / "toks", *texts, "--limit-mb", 0.3, "--json", held)
    english, korean = json.loads(held.read_text(encoding="utf-8"))["tokenizers"]
    per_token = [[row["bytes_per_token"] for row in t["rows"]] for t in (korean, english)]
    assert per_token[0][0] > 1.3 * per_token[1][0] and per_token[1][1] > 1.1 * per_token[0][1]
    assert english["total"]["round_trip_failures"] == korean["total"]["round_trip_failures"] == 0


# ---------------------------------------------------------------- show


def test_show_without_a_terminal(moai: Moai, ours: Path, tokenizer: Tokenizer) -> None:
    text = "the quick 이자\n🙂"
    output = moai("tokenizer", "show", ours, text, "--ids")
    pieces, ids, counted = output.splitlines()
    assert [int(i) for i in ids.split()] == tokenizer.encode(text)
    assert pieces.startswith("the|·quick|") and "⏎" in pieces and pieces.endswith("⟨f0⟩|⟨9f⟩|⟨99⟩|⟨82⟩")
    assert len(pieces.split("|")) == len(tokenizer.encode(text))
    assert (
        counted
        == f"{len(tokenizer.encode(text))} tokens, 21 bytes, {21 / len(tokenizer.encode(text)):.2f} bytes per token"
    )
    assert len(moai("tokenizer", "show", ours, "x " * 2000).splitlines()) == 2  # lines are not broken for a pipe


def test_show_several(moai: Moai, ours: Path, lossy: Path) -> None:
    for arguments in ((ours, lossy, "Hello ☃"), (ours, lossy, "--text", "Hello ☃")):
        output = moai("tokenizer", "show", *arguments)
        assert "\nours: " in output and "\nlossy: " in output and "|[UNK]\n" in output
        assert "does not come back: 'hello [UNK]'" in output


def test_show_reads_standard_input(moai: Moai, ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ((ours, "-"), (ours, "--text", "-")):
        monkeypatch.setattr("sys.stdin", io.StringIO("the the"))
        assert moai("tokenizer", "show", *arguments).startswith("the|·the\n")


def test_show_control_tokens_only_where_asked(moai: Moai, ours: Path, tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nthe<|im_end|>"
    start, end = tokenizer.special_ids["<|im_start|>"], tokenizer.special_ids["<|im_end|>"]
    plain = moai("tokenizer", "show", ours, text, "--ids").splitlines()[1].split()
    assert not {str(start), str(end)} & set(plain)
    pieces, ids, _ = moai("tokenizer", "show", ours, text, "--ids", "--special").splitlines()
    assert [int(i) for i in ids.split()] == [start, *tokenizer.encode("user\nthe"), end]
    assert pieces.startswith("<|im_start|>|") and pieces.endswith("|the|<|im_end|>")


@pytest.mark.parametrize("width", [60, 120])
def test_show_in_a_terminal(
    ours: Path, lossy: Path, moai: Moai, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:  # fmt: skip
    """Beside each other where there is room, and no line is longer than the terminal is wide."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(tokenizer_show, "make_console", lambda: console)
    moai("tokenizer", "show", ours, lossy, "--text", "the quick 이자 ☃ " * 9, "--ids")
    lines = file.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    side_by_side = any("ours: " in line and "lossy: " in line for line in lines)
    assert side_by_side == (width == 120)


def test_ids_stand_under_their_pieces() -> None:
    """Column by column; a wide character takes two."""
    pieces = [Piece(7, "이자", "text"), Piece(12345, "x", "text"), Piece(8, "·the", "text"), Piece(9, "⟨e3⟩", "cut")]
    assert _with_ids(pieces, 80).plain == "이자 x     ·the ⟨e3⟩ \n7    12345 8    9    "
    assert _with_ids(pieces, 12).plain.split("\n") == ["이자 x     ", "7    12345 ", "·the ⟨e3⟩ ", "8    9    "]


@pytest.mark.parametrize("text", ["it is [red]bold[/] here", "[/]", ":smile:"])
def test_show_takes_text_as_it_is(moai: Moai, ours: Path, text: str) -> None:
    pieces = moai("tokenizer", "show", ours, text).splitlines()[0]
    assert pieces.replace("|", "").replace("·", " ") == text


def test_show_says_what_is_missing(fails: Moai, ours: Path) -> None:
    assert "the text is missing: moai tokenizer show TOKENIZER TEXT" in fails("tokenizer", "show", ours)
    assert "is a tokenizer, and the text is missing" in fails("tokenizer", "show", ours, ours)
    assert "the tokenizer or the text is missing" in fails("tokenizer", "show", "이 문장은?")
    assert "the tokenizer or the text is missing" in fails("tokenizer", "show", "a long text " * 4000)
    assert "nowhere" in fails("tokenizer", "show", "nowhere", "text")
