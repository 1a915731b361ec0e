"""An overview of a store as one HTML page: lengths of its documents, how full rows are, its parts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape

from moai_llm.data.overview import RANKS, Lengths, Overview, Rows, Summary
from moai_llm.pages.html import document, framed, plain_table, side_by_side
from moai_llm.pages.plots import Bar, Line, bars, color, histogram, lines, percents, round_up


def page(overview: Overview) -> str:
    """The whole page."""
    data = json.dumps(overview.to_dict(), ensure_ascii=False, allow_nan=False)
    return document(f"Store {overview.path}", _sections(overview), data=data)


def _sections(overview: Overview) -> Iterator[str]:
    yield from _head(overview)
    yield from _lengths(overview)
    if overview.packings:
        yield from _rows(overview)
    if len(overview.parts) > 1:
        yield from _parts(overview)
    yield "<footer>Made by <code>moai data info --html</code>. The numbers lie in this file as JSON, too.</footer>"


def _head(overview: Overview) -> Iterator[str]:
    count = len(overview.parts)
    merged = f", merged of {count} stores ({escape(overview.strategy)})" if overview.strategy else ""
    yield f"<h1>{escape(overview.path.rstrip('/').rpartition('/')[2] or overview.path)}</h1>"
    yield f'<p class="soft">A store of {NAMES[overview.kind]}{merged}: <code>{escape(overview.path)}</code></p>'
    lengths = overview.lengths
    facts = {
        "Tokens": (f"{overview.tokens:,}", f"{overview.text_bytes / overview.tokens:.2f} bytes of text each"),
        "Documents": (
            f"{overview.documents:,}",
            f"{overview.tokens / overview.documents:,.0f} tokens each, on average",
        ),
        "Median length": (f"{lengths.p50:,}", f"p90 {lengths.p90:,}, p99 {lengths.p99:,}, longest {lengths.largest:,}"),
        "Vocabulary": (f"{overview.vocab_size:,}", f"stored as {overview.dtype}"),
    }
    yield '<div class="grid">'
    for i, (name, (big, note)) in enumerate(facts.items()):
        yield (
            f'<section class="card {color(i)}"><h3>{name}</h3><p class="big">{big}</p>'
            f'<p class="note">{escape(note)}</p></section>'
        )
    yield "</div>"


NAMES = {
    "text": "text",
    "chat": "conversations",
    "preference": "preference pairs",
    "embedding": "texts that belong together",
}


def _lengths(overview: Overview) -> Iterator[str]:
    yield "<h2>How long the documents are</h2>"
    yield (
        "<p>By powers of two. Wide pale bars are the share of the documents, narrow strong ones that of the tokens: a "
        "few long documents may hold most of them.</p>"
    )
    named = [("all", overview.lengths)] if len(overview.parts) > 1 else []
    named += [(part.name, part.lengths) for part in overview.parts]
    most = max((lengths for _, lengths in named), key=lambda lengths: len(lengths.bins)).bins
    top = round_up(max(max(lengths.documents + lengths.tokens) for _, lengths in named))
    panels = [(name, "tokens", _histogram(i, name, each, most, top)) for i, (name, each) in enumerate(named)]
    yield from side_by_side(panels, wide=len(panels) == 1)
    yield "<h2>Which documents fit into a row</h2>"
    yield (
        f"<p>The share of the tokens that lie in documents up to a length. Rows of {overview.seq_len:,} tokens hold "
        "documents up to that length whole.</p>"
    )
    yield '<div class="grid wide"><section class="card">'
    series = [Line(name, _cumulative(each)) for name, each in named]
    end = max(most[-1], 2)
    step = max(1, -(-(len(most) - 1) // 5))
    ticks = [(float(2**i), _short(2**i)) for i in sorted({*range(0, len(most), step), 0, end.bit_length() - 1})]
    yield lines("Tokens by length", series, x_label="tokens in a document", x_ticks=ticks, log_x=True,
                y_ticks=percents(1.0), mark=(float(overview.seq_len), "a row"))  # fmt: skip
    if len(series) > 1:
        yield _legend([line.name for line in series])
    yield '</section><section class="card">'
    rows = [(name, [f"{value:,}" for value in each[:4]]) for name, each in named]
    yield framed("Tokens in a document", *plain_table(["store", "p50", "p90", "p99", "longest"], rows))
    yield "</section></div>"


def _histogram(number: int, name: str, lengths: Lengths, most: Sequence[int], top: float) -> str:
    missing = [0.0] * (len(most) - len(lengths.bins))
    labels = [
        f"{below + 1:,}–{bound:,}" if bound > below + 1 else f"{bound:,}" for below, bound in zip([0, *most], most)
    ]
    wanted = sorted({*range(0, len(most), max(1, -(-len(most) // 5))), len(most) - 1})
    return histogram(
        f"Lengths of documents, {name}", number, lengths.documents + missing, lengths.tokens + missing,
        ("of the documents", "of the tokens"), top, labels=labels, unit="tokens",
        ticks=[(i, _short(most[i])) for i in wanted],
    )  # fmt: skip


def _short(number: int) -> str:
    """A power of two on an axis: 512, 4k, 2M."""
    for size, letter in ((1 << 30, "G"), (1 << 20, "M"), (1 << 10, "k")):
        if number >= size:
            return f"{number // size}{letter}"
    return str(number)


def _cumulative(lengths: Lengths) -> list[tuple[float, float]]:
    points, sum_ = [], 0.0
    for bound, share in zip(lengths.bins, lengths.tokens):
        sum_ += share
        points.append((float(bound), min(1.0, sum_)))
    return points


def _legend(names: Sequence[str]) -> str:
    items = [f'<li class="{color(i)}"><span class="swatch"></span>{escape(name)}</li>' for i, name in enumerate(names)]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _rows(overview: Overview) -> Iterator[str]:
    yield f"<h2>Rows of {overview.seq_len:,} tokens</h2>"
    yield (
        "<p>How full rows become by each <code>data.packing</code>; the rest is padding. Higher is better, and "
        "<code>concat</code> pays for it with documents that are cut.</p>"
    )
    yield '<div class="grid wide"><section class="card">'
    values = [Bar(rows.packing, rows.fullness, f"{rows.fullness:.1%}") for rows in overview.packings]
    yield bars("Share of the rows that is text", values, 1.0)
    yield '</section><section class="card">'
    columns = ["packing", "rows", "full", "cut", "dropped", "lost"]
    note = "Cut and dropped are documents, lost are tokens."
    if not overview.strategy:
        columns.append("wait")
        note += (
            f" The wait is the share of the time in attention that {RANKS} ranks with a row each wait for the slowest."
        )
    table = [(rows.packing, _cells(rows)[: len(columns) - 1]) for rows in overview.packings]
    yield framed("What each way of packing makes", *plain_table(columns, table))
    yield "</section></div>"
    yield f'<p class="note">{note}</p>'


def _cells(rows: Rows) -> list[str]:
    wait = "–" if rows.wait is None else f"{rows.wait:.0%}"
    counts = [f"{value:,}" for value in (rows.cut, rows.dropped, rows.dropped_tokens)]
    return [f"{rows.rows:,}", f"{rows.fullness:.1%}", *counts, wait]


def _parts(overview: Overview) -> Iterator[str]:
    yield "<h2>The parts</h2>"
    yield (
        "<p>Rows are drawn from the parts by their share. Epochs are how often a part is read while as many tokens are "
        "read as all parts have together.</p>"
    )
    table = [(part.name, _of_part(part, overview.tokens)) for part in overview.parts]
    columns = ["part", "kind", "documents", "tokens", "share of the tokens", "share of the rows", "epochs"]
    if overview.packings:
        columns += ["rows", "full", "cut", "dropped"]
    yield framed(f"Merged: {overview.strategy}", *plain_table(columns, table))


def _of_part(part: Summary, total: int) -> list[str]:
    cells = [part.kind, f"{part.documents:,}", f"{part.tokens:,}", f"{part.tokens / total:.1%}", f"{part.share:.1%}"]
    return [*cells, f"{part.epochs:.2f}", *(_cells(part.rows)[:4] if part.rows else [])]
