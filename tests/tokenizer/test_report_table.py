"""The tables of a report: which cells are the best, and that the terminal shows what the JSON holds."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.report import Report, compare, decimal
from moai_llm.tokenizer.report_table import Cell, Sheet, _best, amount, print_report, sheets
from moai_llm.tokenizer.train import train_tokenizer
from tests.tokenizer import foreign
from tests.tokenizer.test_report import MIXED


@pytest.fixture(scope="module")
def report(tokenizer: Tokenizer) -> Report:
    bytes_only = train_tokenizer(["x"], 260)
    tokenizers = {"ours": tokenizer, "bytes": bytes_only, "[red]lossy": Tokenizer(foreign.wordpiece(), {})}
    return compare(tokenizers, MIXED, parallel=["en", "ko"])


def sheet(report: Report, title: str) -> Sheet:
    (found,) = [sheet for sheet in sheets(report) if sheet.title.startswith(title)]
    return found


def test_the_best_gives_the_text_back(report: Report) -> None:
    """The lossy one has the highest number of a column, and is not the best of any."""
    per_token = sheet(report, "bytes per token")
    assert per_token.columns == ["vocabulary", "en", "ko", "ja", "code", "all"]
    (_, ours), (_, plain), (_, lossy) = per_token.rows
    assert [cell.best for cell in ours[1:]] == [True] * 5 and not any(cell.best for cell in [*plain, *lossy])
    assert all(cell.lossy for cell in lossy[1:]) and not any(cell.lossy for cell in [*ours, *plain])
    assert any(cell.value > mine.value for cell, mine in zip(lossy[1:], ours[1:]))
    assert [cell.text for cell in plain[1:]] == ["1.00"] * 5


def test_best() -> None:
    def best(*cells: Cell, better: str = "higher") -> set[int]:
        return _best(cells, better)  # type: ignore[arg-type]

    assert best(Cell("1.00", 1.0), Cell("2.00", 2.0)) == {1}
    assert best(Cell("1.00", 1.0), Cell("2.00", 2.0), better="lower") == {0}
    assert best(Cell("2.00", 2.001), Cell("2.00", 2.0), Cell("1.00", 1.0)) == {0, 1}  # what looks equal is equal
    assert best(Cell("2.00", 2.0), Cell("2.00", 2.0)) == set() and best(Cell("2.00", 2.0)) == set()
    assert best(Cell("1.00", 1.0), Cell("9.00", 9.0, lossy=True)) == {0}
    assert best(Cell("–"), Cell("2.00", 2.0)) == {1} and best(Cell("–"), Cell("x")) == set()
    assert best(Cell("1", 1.0), Cell("2", 2.0), better="") == set()


def test_the_terminal_shows_what_the_json_holds(report: Report) -> None:
    file = io.StringIO()
    print_report(report, Console(file=file, width=200))
    output = file.getvalue()
    blocks = {block.split("\n")[0]: block.split("\n")[1:] for block in output.split("\n\n")}
    held = report.to_dict()["tokenizers"]
    for heading, key, labels in (
        ("Bytes per token (higher is better)", "bytes_per_token", ["en", "ko", "ja", "code", "all"]),
        ("Tokens per word (lower is better)", "tokens_per_word", ["en", "ko", "ja¹", "code"]),
        ("Tokens per character (lower is better)", "tokens_per_character", ["en", "ko", "ja", "code"]),
    ):
        header, *lines = blocks[heading]
        assert header.split()[-len(labels) :] == labels
        for entry, line in zip(held, lines):
            name, *numbers = line.split()
            rows = [*entry["rows"], entry["total"]][: len(labels)]
            assert name == entry["name"]
            assert [re.sub("[*!]", "", n) for n in numbers[-len(labels) :]] == [decimal(row[key]) for row in rows]
    assert "[red]lossy does not give text back: 'The bank" in output
    assert "* is the best" in output and "! marks a text" in output and "¹ mostly written without spaces" in output
    assert "Tokens of the same text, relative to en" in blocks or "relative to en" in output
    assert "less than a megabyte" in output


def test_one_tokenizer_has_no_best(tokenizer: Tokenizer) -> None:
    file = io.StringIO()
    report = compare({"ours": tokenizer}, {"en": MIXED["en"]}, timed=False)
    print_report(report, Console(file=file, width=200))
    assert "*" not in file.getvalue() and "!" not in file.getvalue() and "¹" not in file.getvalue()
    assert "Speed" not in file.getvalue()
    assert sheet(report, "bytes per token").columns == ["vocabulary", "en"]  # the sum says nothing new


def test_amounts() -> None:
    assert amount(1, 27) == "1 document, 27 bytes" and amount(1200, 1500) == "1,200 documents, 1.5 kB"
    assert amount(0, 0) == "0 documents, 0 bytes" and amount(2, 3_400_000) == "2 documents, 3.4 MB"
