"""The page of a report: whole, self-contained, the same numbers as the JSON, and no wider than a phone."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.report import Report, compare, decimal
from moai_llm.tokenizer.report_page import page
from tests.browser import MEASURE, Page, measured, outside
from tests.tokenizer import foreign
from tests.tokenizer.test_report import MIXED

EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def report(tokenizer: Tokenizer) -> Report:
    tokenizers = {"ours": tokenizer, EVIL: Tokenizer(foreign.wordpiece(), {})}
    return compare(tokenizers, {**MIXED, "a<b&c": [EVIL, "https://example.org 🙂\n\ttab"]}, parallel=["en", "ko"])


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page(report)


def test_it_is_whole_and_fetches_nothing(text: str) -> None:
    parsed = Page(text)
    assert outside(text) == []
    assert text.startswith("<!doctype html>\n") and parsed.tags[0] == ("html", {"lang": "en"})
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "prefers-color-scheme: dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags


@pytest.mark.parametrize(
    "change",
    [("</main>", ""), ("</section>", "</div>"), ("</svg>", ""), ('<main>', '<main class="a" class="b">')],
)  # fmt: skip
def test_control_a_broken_page_is_seen(text: str, change: tuple[str, str]) -> None:
    with pytest.raises(ValueError):
        Page(text.replace(*change, 1))


@pytest.mark.parametrize(
    "addition",
    ["<script src='x.js'></script>", "<script>go()</script>", "<img src='https://x.y/z.png'>", "<p onclick='go()'></p>",
     "<style>@import 'x.css';</style>", "<a href='https://x.y'>x</a>", "<p style='background: url(x.png)'></p>"],
)  # fmt: skip
def test_control_what_is_fetched_is_seen(text: str, addition: str) -> None:
    assert outside(text.replace("</main>", addition + "</main>"))


def test_names_and_texts_stay_text(text: str) -> None:
    assert EVIL not in text and html.escape(EVIL, quote=False).split("'")[0] in text
    assert EVIL in Page(text).words  # read back, it is what it was


def test_the_numbers_are_those_of_the_json(report: Report, text: str) -> None:
    parsed = Page(text)
    held = report.to_dict()
    assert json.loads(parsed.data) == json.loads(json.dumps(held))
    table = parsed.tables["Bytes per token (higher is better)"]
    assert table[0] == ["tokenizer", "vocabulary", *[t["label"] for t in held["texts"]], "all"]
    for entry, (name, size, *numbers) in zip(held["tokenizers"], table[1:]):
        assert name == entry["name"] and size == f"{entry['vocab_size']:,}"
        rows = [*entry["rows"], entry["total"]]
        assert [number.rstrip("*!") for number in numbers] == [decimal(row["bytes_per_token"]) for row in rows]
    lost = parsed.tables["What is lost (lower is better)"]
    for entry, (_, documents, unknown, _) in zip(held["tokenizers"], lost[1:]):
        total = entry["total"]
        assert documents.rstrip("*!") == f"{total['round_trip_failures']:,} of {total['documents']:,}"
        assert unknown.rstrip("*!") == f"{total['unknown_tokens']:,}"
    texts = [
        [t["label"], *(f"{t[key]:,}" for key in ("documents", "bytes", "characters", "words"))] for t in held["texts"]
    ]
    assert parsed.tables["The texts"][1:] == texts


def test_every_plot_says_what_it_shows(report: Report, text: str) -> None:
    plots = [attributes for tag, attributes in Page(text).tags if tag == "svg"]
    assert len(plots) == 2 * len(report.texts) + 1 + len(report.entries) + 1  # lengths, fertility, parity, histograms
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 10 for plot in plots)
    (bars,) = [plot["aria-label"] for plot in plots if (plot["aria-label"] or "").startswith("Bytes per token, ko")]
    values = [entry.rows[1].bytes_per_token for entry in report.entries]
    assert bars == "Bytes per token, ko: " + "; ".join(
        f"{entry.name} {decimal(value)}" for entry, value in zip(report.entries, values)
    )


def test_bars_are_as_long_as_their_numbers(report: Report, text: str) -> None:
    widths = [float(width) for width in re.findall(r'<rect class="c\d[^"]*" x="98" y="\d+" width="([\d.]+)"', text)]
    values = [entry.rows[i].bytes_per_token for i in range(len(report.texts)) for entry in report.entries]
    ratios = [width / value for width, value in zip(widths, values)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)


def test_the_sample_shows_every_token(report: Report, text: str) -> None:
    shown = [attributes for tag, attributes in Page(text).tags if tag == "span" and "title" in attributes]
    pieces = [piece for label in report.texts for entry in report.entries for piece in entry.samples[label.label]]
    assert [attributes["title"] for attributes in shown] == [str(piece.id) for piece in pieces]


def test_one_tokenizer_one_text(tokenizer: Tokenizer) -> None:
    parsed = Page(page(compare({"ours": tokenizer}, {"zh": ["中国的首都是北京。"]}, timed=False)))
    assert "Tokenizer report" in parsed.words and "Tokens per word" not in parsed.words.split("All numbers")[0]
    assert ("p", {"class": "pieces", "lang": "zh"}) in parsed.tags


@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_nothing_is_wider_than_the_screen(text: str, tmp_path: Path, width: int) -> None:
    seen = measured(text, tmp_path, width, MEASURE)
    assert seen["wide"] <= width and seen["plots"] > 10
    assert seen["smallest"] > 10  # pixels: the letters of a plot can be read
