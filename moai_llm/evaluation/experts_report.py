"""What `experts.py` counted, as results and as one HTML page with maps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from html import escape
from typing import Any

from moai_llm.evaluation import experts
from moai_llm.evaluation.experts import TOKEN_CLASS, Counts, Layer
from moai_llm.evaluation.results import Results, Score, facts_of
from moai_llm.inference import TextModel
from moai_llm.pages.html import card, document, framed, legend, plain_table
from moai_llm.pages.matrix import matrix

Rows = dict[str, dict[str, Any]]


def results(text_model: TextModel, counts: Counts, settings: dict[str, Any]) -> Results:
    found = experts.layers(counts)
    scores = []
    for layer in found:
        for metric in ("cv", "max_violation", "effective", "dead", "entropy", "first"):
            scores.append(Score(f"layer {layer.number}", metric, float(getattr(layer, metric)), len(counts.labels)))
    details: dict[str, Any] = {
        "experts": counts.experts, "experts_per_token": counts.k, "tokens": counts.tokens,
        "layers": [asdict(layer) for layer in found], "selected": counts.selected.tolist(),
        "together": [experts.together(pairs, counts.k).round(6).tolist() for pairs in counts.pairs],
        "specialisation": {},
    }  # fmt: skip
    for kind in counts.kinds:
        names, tables = counts.by_label(kind)
        told = [experts.information(table) for table in tables]
        chance = experts.null(counts, kind) if kind != TOKEN_CLASS else None
        details["specialisation"][kind] = {
            "labels": names, "choices": tables.tolist(), "information": told,
            "chance": chance.mean(0).tolist() if chance is not None else None,
            "most_by_chance": chance.max(0).tolist() if chance is not None else None,
            "lift": [experts.lift(table).round(6).tolist() for table in tables],
        }  # fmt: skip
        scores += [
            Score(f"layer {layer.number}", f"specialisation, {kind}", value, len(counts.labels))
            for layer, value in zip(found, told)
        ]
    return Results("experts", [facts_of(text_model)], settings, scores, details=details)


def page(found: Results) -> str:
    """The whole page."""
    data = json.dumps(found.details, ensure_ascii=False)
    return document(f"Experts of {found.models[0].path}", _sections(found), data=data)


def _sections(found: Results) -> Iterator[str]:
    details = found.details
    layers = [Layer(**layer) for layer in details["layers"]]
    names = [str(e) for e in range(details["experts"])]
    yield f'<h1 class="name">Experts of {escape(found.models[0].name)}</h1>'
    yield (
        f'<p class="soft">{details["experts"]} experts in each of {len(layers)} layers, {details["experts_per_token"]} '
        f"for each token; {details['tokens']:,} tokens of text.</p>"
    )
    yield "<h2>How evenly they are used</h2>"
    yield (
        "<p>The share of all choices that falls on each expert, as a multiple of a fair share. In all maps a stronger "
        "colour is further from 1.</p>"
    )
    yield legend(["more", "less"])
    fair = [[share * details["experts"] for share in layer.shares] for layer in layers]
    rows = [f"layer {layer.number}" for layer in layers]
    yield '<div class="grid wide">'
    yield _figure(matrix("Load of each expert", fair, rows, names, middle=1.0), "load")
    yield "</div>"
    yield framed("Load and router", *plain_table(*load_table(layers)))
    for kind, about in details["specialisation"].items():
        yield from _specialisation(kind, about, layers, names)
    if details["experts_per_token"] > 1:
        yield "<h2>Who is chosen together</h2>"
        yield (
            "<p>How often two experts get the same token, as a multiple of how often they would if a token's experts "
            "had nothing to do with each other.</p>"
        )
        yield '<div class="grid wide">'
        for layer, table in zip(layers, details["together"]):
            svg = matrix(f"Experts chosen together, layer {layer.number}", table, names, names, middle=1.0,
                         empty_diagonal=True)  # fmt: skip
            yield _figure(svg, f"layer {layer.number}")
        yield "</div>"
    yield "<footer>Made by <code>moai eval experts</code>. The numbers lie in this file as JSON, too.</footer>"


def _specialisation(kind: str, about: dict[str, Any], layers: list[Layer], names: list[str]) -> Iterator[str]:
    yield f"<h2>Specialisation by {escape(kind)}</h2>"
    yield (
        f"<p>How many times as often text of each {escape(kind)} chooses an expert as all text does. The table says "
        "how much of it an expert tells: 0 is nothing, 1 everything.</p>"
    )
    yield '<div class="grid wide">'
    for layer, table in zip(layers, about["lift"]):
        labels = [label.rpartition("/")[2] or label for label in about["labels"]]
        svg = matrix(f"Choices by {kind}, layer {layer.number}", table, labels, names, middle=1.0)
        yield _figure(svg, f"layer {layer.number}")
    yield "</div>"
    yield framed(f"What an expert tells of the {kind}", *plain_table(*information_table(about, layers)))
    if about["chance"] is not None:
        yield (
            '<p class="note">By chance: the labels dealt anew to the documents. A value near it says nothing; with few '
            "documents chance tells much.</p>"
        )


def _figure(svg: str, name: str) -> str:
    return card(name, svg)


def load_table(layers: list[Layer]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows, for the page and the terminal."""
    columns = ["layer", "CV of load", "most over fair", "effective experts", "dead", "router entropy", "first weight"]
    rows = [
        (
            str(layer.number),
            [f"{layer.cv:.3f}", f"+{layer.max_violation:.0%}", f"{layer.effective:.2f}", str(layer.dead),
             f"{layer.entropy:.3f}", f"{layer.first:.3f}"],
        )
        for layer in layers
    ]  # fmt: skip
    return columns, rows


def information_table(about: dict[str, Any], layers: list[Layer]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """What an expert tells of a label, beside what it tells by chance."""
    chance = about["chance"] is not None
    columns = ["layer", "told", *(["by chance", "most by chance"] if chance else [])]
    rows = []
    for i, layer in enumerate(layers):
        cells = [f"{about['information'][i]:.3f}"]
        if chance:
            cells += [f"{about['chance'][i]:.3f}", f"{about['most_by_chance'][i]:.3f}"]
        rows.append((str(layer.number), cells))
    return columns, rows
