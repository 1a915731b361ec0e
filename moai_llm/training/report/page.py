"""The report on runs as one HTML page: no script, no other file, nothing fetched."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from moai_llm import recipe as recipes
from moai_llm.pages.html import card, document, facts, framed, legend, plain_table
from moai_llm.pages.plots import color, short
from moai_llm.training.doctor import history
from moai_llm.training.live import duration
from moai_llm.training.report import charts
from moai_llm.training.report.record import Record, flat, smooth

STYLE = Path(__file__).with_name("report.css")
SAMPLES = 8  # moments of a run whose samples are shown
ALWAYS_DIFFERENT = ("train.out", "description")


def page(runs: Sequence[Record]) -> str:
    """The whole page."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"
    data = json.dumps(summary(runs), ensure_ascii=False, allow_nan=False)
    return document(title, _sections(runs, title), style=STYLE.read_text(encoding="utf-8"), data=data)


def summary(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """The main numbers of each run, as the cards show them."""
    return [
        {
            "run": run.name, "steps": run.steps, "tokens": run.last("tokens"), "loss": final_loss(run),
            "eval_loss": run.last("eval_loss"), "bits_per_byte": run.last("bits_per_byte"),
            "tokens_per_second": run.usual("tokens_per_second"), "mfu": run.usual("mfu"),
            "memory_mb": run.most("memory_mb"), "seconds": run.most("seconds"),
        }
        for run in runs
    ]  # fmt: skip


def final_loss(run: Record) -> float | None:
    """The smoothed loss at the end: the last step alone is chance."""
    points = smooth(run.points("loss"))
    return points[-1][1] if points else None


def _sections(runs: Sequence[Record], title: str) -> Iterator[str]:
    yield from _head(runs, title)
    yield from _losses(runs)
    yield from _others(runs)
    yield from _experts(runs)
    yield from _samples(runs)
    yield from _configuration(runs)
    yield from _environment(runs)
    yield from _checkpoints(runs)
    yield "<footer>Made by <code>moai report</code>. The main numbers lie in this file as JSON, too.</footer>"


def _head(runs: Sequence[Record], title: str) -> Iterator[str]:
    yield f"<h1>{escape(title)}</h1>"
    described = [str(run.recipe["description"]) for run in runs if run.recipe.get("description")]
    if described and len(set(described)) == 1:
        yield f'<p class="soft">{escape(described[0])}</p>'
    yield '<div class="grid">'
    for i, (run, found) in enumerate(zip(runs, summary(runs))):
        planned = (run.recipe.get("train") or {}).get("steps")
        steps = f"{run.steps:,}" + (f" of {planned:,}" if isinstance(planned, int) and planned > run.steps else "")
        pairs = {
            "steps": steps,
            "tokens": _amount(found["tokens"]),
            "time": "" if found["seconds"] is None else duration(found["seconds"]),
            "held-out loss": _number(found["eval_loss"], ".3f"),
            "bits per byte": _number(found["bits_per_byte"], ".3f"),
            "tokens a second": _number(found["tokens_per_second"], ",.0f"),
            "MFU": _number(found["mfu"], ".1%"),
            "memory": _number(None if found["memory_mb"] is None else found["memory_mb"] / 1e3, ".2f", " GB"),
        }
        shown = facts((name, f"<b>{value}</b>") for name, value in pairs.items() if value)
        big = f'<p class="big">{_number(found["loss"], ".3f") or "–"}</p><p class="note">loss at the end, smoothed</p>'
        yield card(run.name, big + shown, number=i)
    yield "</div>"
    warnings = list(_warnings(runs))
    if warnings:
        yield f'<div class="warning" role="note">{"".join(warnings)}</div>'


def _warnings(runs: Sequence[Record]) -> Iterator[str]:
    """What `moai doctor` says of the rows, where it is not content."""
    for run in runs:
        for finding in (history.losses(run.rows), history.throughput(run.rows), history.experts(run.rows)):
            if finding is not None and finding.verdict != "ok":
                yield (
                    f"<p><b>{escape(run.name)}</b>, {escape(finding.check)}: {escape(finding.seen)}. "
                    f"{escape(finding.advice[0].upper() + finding.advice[1:])}.</p>"
                )
        bad = [kept for kept in run.checkpoints if kept.problem]
        if bad:
            yield f"<p><b>{escape(run.name)}</b>: {len(bad)} damaged checkpoints, see below.</p>"


def _losses(runs: Sequence[Record]) -> Iterator[str]:
    names = legend([run.name for run in runs]) if len(runs) > 1 else ""
    plots = [(charts.LOSS, charts.plot(charts.LOSS, runs), charts.plot(charts.LOSS, runs, log_x=True))]
    plots += [(c, charts.plot(c, runs), charts.plot(c, runs, log_x=True)) for c in charts.EVALUATIONS]
    yield "<h2>Loss</h2>"
    yield (
        "<p>Cross-entropy, whatever the run was trained on. The strong line is smoothed, the pale one is every row "
        "that was logged. Point at a line for its numbers.</p>"
    )
    yield (
        '<div class="views"><input type="radio" name="x" id="x-linear" checked><label for="x-linear">steps</label>'
        '<input type="radio" name="x" id="x-log"><label for="x-log">logarithm of steps</label>'
        '<input type="checkbox" id="raw" checked><label for="raw">every row</label><div class="grid plots">'
    )
    for chart, linear, log in plots:
        if linear:
            both = f'<div class="linear">{linear}</div><div class="log">{log}</div>'
            yield card(chart.title, both + names, count=chart.unit)
    yield "</div></div>"


def _others(runs: Sequence[Record]) -> Iterator[str]:
    yield "<h2>Learning rate, gradients, speed and memory</h2>"
    yield '<div class="grid plots">'
    for chart in charts.OTHERS:
        svg = charts.plot(chart, runs)
        if svg:
            yield card(chart.title, svg, count=chart.unit)
    yield "</div>"
    if len(runs) > 1:
        yield legend([run.name for run in runs])


def _experts(runs: Sequence[Record]) -> Iterator[str]:
    if not any(run.loads for run in runs):
        return
    yield "<h2>Load of the experts</h2>"
    yield (
        "<p>A row is an expert, a column a moment of the run. Half the full colour is an even share, full colour twice "
        f"as much or more, and white an expert that gets nothing. At most the {charts.LAYERS} most uneven layers.</p>"
    )
    for number, run in enumerate(runs):
        plots = list(charts.maps(run, number))
        if plots and len(runs) > 1:
            yield f'<h3 class="apart {color(number)}"><span class="swatch"></span>{escape(run.name)}</h3>'
        if plots:
            yield f'<div class="grid">{"".join(card(title, svg) for title, svg in plots)}</div>'


def _samples(runs: Sequence[Record]) -> Iterator[str]:
    if not any(run.samples for run in runs):
        return
    yield "<h2>What it wrote</h2>"
    yield "<p>Continuations of <code>eval.prompts</code>, with the same seed each time.</p>"
    for run in runs:
        if run.samples:
            moments = charts.some(run.samples, SAMPLES)
            rows = [(f"{step:,}", ["".join(map(_said, texts))]) for step, texts in moments]
            yield framed(f"Samples of {run.name}", *plain_table(["step", "continuation"], rows))


def _said(text: str) -> str:
    return f'<p class="said">{escape(text)}</p>'


def _configuration(runs: Sequence[Record]) -> Iterator[str]:
    trees = [flat(run.recipe) for run in runs]
    if not any(trees):
        return
    yield "<h2>Configuration</h2>"
    if len(runs) > 1:
        keys = [key for key in {key: None for tree in trees for key in tree} if key not in ALWAYS_DIFFERENT]
        different = [key for key in keys if len({repr(tree.get(key)) for tree in trees}) > 1]
        if different:
            rows = [(key, [_value(tree.get(key)) for tree in trees]) for key in different]
            yield framed("Keys that differ between the runs", *plain_table(["key", *(r.name for r in runs)], rows))
        else:
            yield "<p>The runs have the same recipe, but for where they write.</p>"
    else:
        usual = flat(recipes.to_tree(recipes.Recipe()))
        rows = [
            (key, [_value(value), _value(usual.get(key))])
            for key, value in trees[0].items()
            if value != usual.get(key) and key not in ALWAYS_DIFFERENT
        ]
        yield framed("Keys that are not the default", *plain_table(["key", "here", "default"], rows))
    for run in runs:
        if run.recipe:
            text = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True)
            yield (f"<details><summary>recipe.yaml of {escape(run.name)}</summary><pre>{escape(text)}</pre></details>")


def _environment(runs: Sequence[Record]) -> Iterator[str]:
    held = [run for run in runs if run.sessions]
    if not held:
        return
    yield "<h2>Environment</h2>"
    latest = [flat(run.sessions[-1]) for run in held]
    keys = [key for key in {key: None for tree in latest for key in tree} if key not in ("command", "from_step", "at")]
    rows = [(key.removeprefix("packages."), [_value(tree.get(key)) for tree in latest]) for key in keys]
    yield framed("What it ran on", *plain_table(["", *(run.name for run in held)], rows))
    sessions = [
        (run.name, [f"{session.get('from_step', 0):,}", escape(str(session.get("at", ""))),
                    f"<code>{escape(' '.join(map(str, session.get('command', []))))}</code>"])
        for run in held for session in run.sessions
    ]  # fmt: skip
    yield framed("Sessions", *plain_table(["run", "from step", "began", "command line"], sessions))


def _checkpoints(runs: Sequence[Record]) -> Iterator[str]:
    if not any(run.checkpoints for run in runs):
        return
    yield "<h2>Checkpoints</h2>"
    rows = []
    for run in runs:
        for kept in run.checkpoints:
            status = '<b class="good">every file has its digest</b>' if kept.checked else "not looked at"
            if kept.problem:
                status = f'<b class="bad">{escape(kept.problem)}</b>'
            rows.append((run.name, [f"<code>{escape(kept.name)}</code>", f"{kept.bytes / 1e6:,.1f} MB", status]))
    yield framed("What was kept", *plain_table(["run", "checkpoint", "size", "files"], rows))


def _value(value: Any) -> str:
    """A value of a recipe or an environment, for a cell; a long list by its beginning."""
    if value is None:
        return '<span class="soft">–</span>'
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"<code>{escape(text if len(text) <= 60 else text[:57] + '…')}</code>"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _amount(value: float | None) -> str:
    return "" if value is None else short(value)
