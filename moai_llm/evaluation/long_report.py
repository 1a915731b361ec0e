"""What `long_context.py` found, as results and as one HTML page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from moai_llm.evaluation.long_context import KNOWS, LANGUAGES, Bucket, Cell
from moai_llm.evaluation.results import Results, Score, facts_of
from moai_llm.inference import TextModel
from moai_llm.pages.html import document, framed, plain_table
from moai_llm.pages.matrix import matrix
from moai_llm.pages.plots import Line, lines, short, ticks


def results(
    text_model: TextModel, cells: Sequence[Cell], buckets: Sequence[Bucket], trained: int, settings: dict[str, Any]
) -> Results:
    """What is written to a file.

    Args:
        trained: the context of training, inside which a model must find the key for its failures beyond to mean much.
    """
    scores, reliable = [], {}
    for language, rows in _by_language(cells).items():
        for length in dict.fromkeys(cell.length for cell in rows):
            at = [cell for cell in rows if cell.length == length]
            found, trials = sum(c.found for c in at), sum(c.trials for c in at)
            name = f"pass key, {language}"
            scores.append(Score(name, f"found at {length}", found / trials, trials, higher_is_better=True))
        inside = [cell for cell in rows if cell.length <= trained]
        share = sum(c.found for c in inside) / max(1, sum(c.trials for c in inside))
        reliable[language] = bool(inside) and share >= KNOWS
    for bucket in buckets:
        name = f"positions {bucket.begin} to {bucket.end - 1}"
        scores.append(Score(name, "loss", bucket.loss, bucket.tokens, _finite(bucket.stderr), higher_is_better=False))
    details = {
        "trained_context": trained, "knows_the_task": reliable, "passkey": [asdict(cell) for cell in cells],
        "by_position": [asdict(bucket) for bucket in buckets],
    }  # fmt: skip
    return Results("long", [facts_of(text_model)], settings, scores, details=details)


def _finite(value: float) -> float | None:
    return value if value == value else None


def _by_language(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {name: found for name in LANGUAGES if (found := [cell for cell in cells if cell.language == name])}


def warnings(found: Results) -> list[str]:
    """What a reader must know before believing a number."""
    return [
        f"pass key, {language}: within the context of training ({found.details['trained_context']:,} tokens) the model "
        f"does not find {KNOWS:.0%} of the keys, so what it misses beyond says nothing about length"
        for language, knows in found.details["knows_the_task"].items()
        if not knows
    ]


def page(found: Results) -> str:
    """The whole page."""
    data = json.dumps(found.details, ensure_ascii=False).replace("NaN", "null")
    return document(f"Long context of {found.models[0].path}", _sections(found), data=data)


def _sections(found: Results) -> Iterator[str]:
    details = found.details
    yield f'<h1 class="name">Long context of {escape(found.models[0].name)}</h1>'
    rope = f", RoPE scaled by {escape(found.settings['rope'])}" if found.settings.get("rope") else ""
    yield (
        f'<p class="soft">Trained on {details["trained_context"]:,} tokens of context, asked with up to '
        f"{found.settings['context']:,}{rope}.</p>"
    )
    if warnings(found):
        yield '<div class="warning" role="note">'
        yield from (f"<p>{escape(text)}</p>" for text in warnings(found))
        yield "</div>"
    cells = [Cell(**cell) for cell in details["passkey"]]
    if cells:
        yield "<h2>A pass key found again</h2>"
        yield (
            "<p>A number of five digits stands once in sentences that say nothing. A cell is how often the model gives "
            "it back: by the length of the prompt across, by where the number stands down, 0 % is the beginning.</p>"
        )
        yield '<div class="grid wide">'
        for language, rows in _by_language(cells).items():
            lengths = list(dict.fromkeys(cell.length for cell in rows))
            depths = list(dict.fromkeys(cell.depth for cell in rows))
            share = {(cell.length, cell.depth): cell.share for cell in rows}
            svg = matrix(
                f"Pass key, {language}", [[share[x, depth] for x in lengths] for depth in depths],
                [f"{depth:.0%}" for depth in depths], [short(float(x)) for x in lengths], show="{:.0%}".format, top=1.0,
            )  # fmt: skip
            yield f'<section class="card"><h3>{escape(language)}</h3>{svg}</section>'
        yield "</div>"
        yield framed("Keys found", *plain_table(*passkey_table(cells)))
    buckets = [Bucket(**bucket) for bucket in details["by_position"]]
    if buckets:
        yield "<h2>Loss by position</h2>"
        yield (
            "<p>Mean loss of a token, in nats, by how many tokens stand before it. A model that uses its context gets "
            "better to the right; where the line rises, it is lost.</p>"
        )
        points = [((bucket.begin + bucket.end) / 2, bucket.loss) for bucket in buckets]
        dots = [(x, y, f"positions {b.begin:,} to {b.end - 1:,}: {y:.3f}") for (x, y), b in zip(points, buckets)]
        losses = [bucket.loss for bucket in buckets]
        svg = lines(
            "Loss by position", [Line("loss", points, dots=dots)], x_label="position",
            x_ticks=ticks(0, buckets[-1].end), y_ticks=ticks(min(losses), max(losses)),
            mark=(float(details["trained_context"]), "context of training"),
        )  # fmt: skip
        yield f'<div class="grid wide"><section class="card">{svg}</section></div>'
        yield framed("Loss by position", *plain_table(*position_table(buckets)))
    yield "<footer>Made by <code>moai eval long</code>. The numbers lie in this file as JSON, too.</footer>"


def passkey_table(cells: Sequence[Cell]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Columns and rows, for the page and the terminal: a row for each language and length."""
    depths = list(dict.fromkeys(cell.depth for cell in cells))
    rows = []
    for language, found in _by_language(cells).items():
        for length in dict.fromkeys(cell.length for cell in found):
            at = {cell.depth: cell for cell in found if cell.length == length}
            rows.append((f"{language}, {length:,} tokens", [f"{at[depth].share:.0%}" for depth in depths]))
    return ["depth", *(f"{depth:.0%}" for depth in depths)], rows


def position_table(buckets: Sequence[Bucket]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    columns = ["positions", "loss", "± stderr", "perplexity"]
    rows = []
    for bucket in buckets:
        spread = f"{bucket.stderr:.4f}" if bucket.stderr == bucket.stderr else ""
        cells = [f"{bucket.loss:.4f}", spread, f"{bucket.perplexity:.2f}"]
        rows.append((f"{bucket.begin:,} to {bucket.end - 1:,}", cells))
    return columns, rows
