"""A report as one HTML page: no script, no other file, nothing fetched; light and dark, for a phone and for paper.

Its tables are those of the terminal, and the numbers of the JSON file lie in it as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from moai_llm.pages.html import document, framed, legend, plain_table, side_by_side
from moai_llm.pages.plots import Bar, Line, bars, color, histogram, lines, percents, round_up
from moai_llm.tokenizer.counts import Row
from moai_llm.tokenizer.pieces import Piece, shortened
from moai_llm.tokenizer.report import Entry, Report, decimal, percent
from moai_llm.tokenizer.report_table import NOTES, Sheet, amount, sheets

STYLE = Path(__file__).with_name("report.css")
ALL_BACK = '<b class="good">all</b>'
TINTS = 4  # classes t0 .. t3, neighbouring tokens take turns
LANGUAGES = ("ko", "en", "ja", "zh")  # labels that are language tags: how their text is to be read and drawn


def page(report: Report) -> str:
    """The whole page."""
    data = json.dumps(report.to_dict(), ensure_ascii=False, allow_nan=False)
    return document("Tokenizer report", _sections(report), style=STYLE.read_text(encoding="utf-8"), data=data)


def _sections(report: Report) -> Iterator[str]:
    yield from _head(report)
    yield from _lengths(report)
    yield from _fertility(report)
    yield from _vocabulary(report)
    yield from _samples(report)
    yield from _tables(report)


def _head(report: Report) -> Iterator[str]:
    documents, size = sum(t.documents for t in report.texts), sum(t.bytes for t in report.texts)
    count = len(report.entries)
    yield f"<h1>{'Tokenizer report' if count == 1 else f'{count} tokenizers side by side'}</h1>"
    labels = ", ".join(escape(text.label) for text in report.texts)
    yield f'<p class="soft">Measured on {amount(documents, size)} of text: {labels}.</p>'
    yield '<div class="grid">'
    for i, entry in enumerate(report.entries):
        total = entry.total
        failures = total.round_trip_failures
        back = f'<b class="bad">{total.documents - failures:,} of {total.documents:,}</b>' if failures else ALL_BACK
        facts = {
            "kind": f"<b>{escape(entry.kind)}</b>",
            "vocabulary": f"<b>{entry.vocab_size:,}</b>",
            "documents given back": back,
            "unknown tokens": f"<b>{total.unknown_tokens:,}</b>",
            "single bytes": f"<b>{percent(total.byte_share)}</b>",
            "longest token": f"<b><code>{escape(shortened(entry.longest.text, 16))}</code></b>",
        }
        items = "".join(f"<li><span>{name}</span>{value}</li>" for name, value in facts.items())
        yield (
            f'<section class="card {color(i)}"><h3 class="name"><span class="swatch"></span>{escape(entry.name)}</h3>'
            f'<p class="big">{decimal(total.bytes_per_token)}</p><p class="note">bytes per token, all text</p>'
            f'<ul class="facts">{items}</ul></section>'
        )
    yield "</div>"
    lossy = [entry for entry in report.entries if entry.total.first_failure]
    if lossy:
        yield '<div class="warning" role="note">'
        for entry in lossy:
            written, came_back = entry.total.first_failure or ("", "")
            yield (
                f"<p><b>{escape(entry.name)}</b> does not give text back: <code>{escape(repr(written))}</code> comes "
                f"back as <code>{escape(repr(came_back))}</code>. Its bars are drawn faint, for it may have saved "
                "tokens by leaving something out.</p>"
            )
        yield "</div>"


def _lengths(report: Report) -> Iterator[str]:
    yield "<h2>Bytes per token</h2>"
    yield "<p>How much text a token stands for. Higher is better: the same text takes fewer tokens.</p>"
    rows = [[entry.rows[i] for entry in report.entries] for i in range(len(report.texts))]
    largest = max((row.bytes_per_token for of_label in rows for row in of_label if row.tokens), default=0.0)
    panels = []
    for text, of_label in zip(report.texts, rows):
        values = [_bar(entry, row, row.bytes_per_token) for entry, row in zip(report.entries, of_label)]
        panels.append((text.label, "", bars(f"Bytes per token, {text.label}", values, largest)))
    yield from side_by_side(panels)


def _fertility(report: Report) -> Iterator[str]:
    spaced = [i for i, text in enumerate(report.texts) if not text.unspaced]
    others = [i for i, text in enumerate(report.texts) if text.unspaced]
    for group, unit, what in (
        (spaced, "tokens per word", "Into how many tokens a word falls, also called fertility."),
        (others, "tokens per character", "For text that is mostly written without spaces. What a word is there needs a "
         "dictionary, so tokens are counted against characters."),
    ):  # fmt: skip
        if not group:
            continue
        yield f"<h2>{unit.capitalize()}</h2>"
        yield f"<p>{what} Lower is better.</p>"
        attribute = unit.replace(" ", "_")
        values = {i: [getattr(entry.rows[i], attribute) for entry in report.entries] for i in group}
        largest = max((value for of_label in values.values() for value in of_label if value == value), default=0.0)
        panels = []
        for i in group:
            marks = [_bar(entry, entry.rows[i], value) for entry, value in zip(report.entries, values[i])]
            label = report.texts[i].label
            panels.append((label, unit, bars(f"{unit}, {label}", marks, largest)))
        yield from side_by_side(panels)
    if report.parallel:
        first, *rest = report.parallel
        yield "<h2>The same text in each language</h2>"
        yield (
            f"<p>Translations of one text. How many tokens each takes for one token of <b>{escape(first)}</b>: what a "
            "reader of that language pays for the same content. Lower is better.</p>"
        )
        largest = max(entry.parity[label] for entry in report.entries for label in rest)
        panels = []
        for label in rest:
            row = next(i for i, text in enumerate(report.texts) if text.label == label)
            marks = [_bar(entry, entry.rows[row], entry.parity[label]) for entry in report.entries]
            panels.append((label, f"tokens, {first} = 1", bars(f"Tokens relative to {first}, {label}", marks, largest)))
        yield from side_by_side(panels)


def _bar(entry: Entry, row: Row, value: float) -> Bar:
    return Bar(entry.name, value, decimal(value), row.round_trip_failures > 0)


def _vocabulary(report: Report) -> Iterator[str]:
    yield "<h2>How long the tokens are</h2>"
    yield (
        "<p>Wide pale bars are the tokens of the vocabulary by their bytes, narrow strong ones the tokens of the text. "
        "A text falls into short tokens where the vocabulary has no longer piece.</p>"
    )
    shares = [(_shares(entry.vocabulary_lengths), _shares(entry.text_lengths)) for entry in report.entries]
    top = round_up(max(max(a + b) for a, b in shares))
    last = len(shares[0][0])
    labels = [*map(str, range(1, last)), f"{last}+"]
    panels = []
    for i, (entry, (behind, front)) in enumerate(zip(report.entries, shares)):
        svg = histogram(
            f"Length of tokens, {entry.name}", i, behind, front, ("of the vocabulary", "of the text"), top,
            labels=labels, unit="bytes",
            ticks=[(i, labels[i]) for i in (0, *(last * n // 4 - 1 for n in (1, 2, 3, 4)))],
        )  # fmt: skip
        panels.append((entry.name, "bytes", svg))
    yield from side_by_side(panels)
    yield "<h2>How much of the vocabulary the text needs</h2>"
    yield "<p>The share of the text that the most frequent ids make up. A line ends at the number of ids it uses.</p>"
    most = max((k for entry in report.entries for k, _ in entry.coverage), default=1)
    powers = [10**i for i in range(max(2, len(str(most)) + 1))]
    series = [Line(entry.name, entry.coverage) for entry in report.entries]
    ticks = [(float(power), f"{power:,}") for power in powers]
    svg = lines("Coverage", series, x_label="most frequent ids", x_ticks=ticks, y_ticks=percents(1.0), log_x=True)
    names_of_colors = legend([entry.name for entry in report.entries])
    yield f'<div class="grid wide"><section class="card">{svg}{names_of_colors}</section><section class="card">'
    names = list(report.entries[0].ids_for_share)
    rows = [(entry.name, [*(f"{entry.ids_for_share.get(n, 0):,}" for n in names), f"{entry.total.ids_used:,}"])
            for entry in report.entries]  # fmt: skip
    columns = [*(f"{float(name):.0%}" for name in names), "100%"]
    yield framed("ids that make up a share of the text", *plain_table(["tokenizer", *columns], rows))
    yield "</section></div>"


def _shares(counts: Sequence[int]) -> list[float]:
    whole = max(1, sum(counts))
    return [count / whole for count in counts]


def _samples(report: Report) -> Iterator[str]:
    yield "<h2>The same text, token by token</h2>"
    yield (
        "<p>The beginning of each text. <code>·</code> is a space, <code>⏎</code> the end of a line, "
        '<span class="pieces"><span class="cut">⟨e3⟩</span></span> a byte cut out of a character. '
        "Point at a token for its id.</p>"
    )
    for text in report.texts:
        language = f' lang="{text.label}"' if text.label in LANGUAGES else ""
        yield f'<h3 style="margin-top:1.6rem">{escape(text.label)}</h3><div class="grid wide">'
        for i, entry in enumerate(report.entries):
            pieces = entry.samples[text.label]
            yield (
                f'<section class="card {color(i)}"><h3 class="name"><span class="count">{len(pieces):,} tokens</span>'
                f'<span class="swatch"></span>{escape(entry.name)}</h3>'
                f'<p class="pieces"{language}>{"".join(_spans(pieces))}</p></section>'
            )
        yield "</div>"


def _spans(pieces: Sequence[Piece]) -> Iterator[str]:
    for i, piece in enumerate(pieces):
        style = f"t{i % TINTS}" if piece.kind == "text" else piece.kind
        line_end = "<br>" * piece.ends_line
        yield f'<span class="{style}" title="{piece.id}">{escape(piece.text)}</span>{line_end}<wbr>'


def _tables(report: Report) -> Iterator[str]:
    yield "<h2>All numbers</h2>"
    tables = list(sheets(report))
    cells = [cell for sheet in tables for _, row in sheet.rows for cell in row]
    for note, wanted in (("best", any(c.best for c in cells)), ("lost", any(c.lossy for c in cells))):
        if wanted:
            yield f'<p class="note">{escape(NOTES[note])}</p>'
    for sheet in tables:
        yield _table(sheet)
        yield from (f'<p class="note">{escape(note)}</p>' for note in sheet.notes)
    rows = [(t.label, [f"{t.documents:,}", f"{t.bytes:,}", f"{t.characters:,}", f"{t.words:,}"]) for t in report.texts]
    columns = ["text", "documents", "bytes", "characters", "words"]
    yield framed("The texts", *plain_table(columns, rows))
    yield "<footer>Made by <code>moai tokenizer report</code>. The numbers lie in this file as JSON, too.</footer>"


def _table(sheet: Sheet) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["tokenizer", *sheet.columns])
    body = []
    for name, cells in sheet.rows:
        shown = []
        for cell in cells:
            style, mark = ("best", "*") if cell.best else ("lossy", "!") if cell.lossy else ("", "")
            shown.append(f"<td{f' class={style!r}' * bool(style)}>{escape(cell.text)}{mark}</td>")
        body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(shown)}</tr>')
    return framed(sheet.heading, head, "".join(body))
