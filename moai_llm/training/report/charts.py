"""The numbers of runs as plots, several runs over each other: the same colour is the same run everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from moai_llm.pages.plots import Line, heat, lines, percents, powers, round_up, short, thin, ticks
from moai_llm.training.report.record import Record, smooth

T = TypeVar("T")
MOST = 400  # points of a line on the page
DOTS = 40  # of them that say their number
MOMENTS = 36  # columns of a map of load
LAYERS = 4  # maps of a run
APART = 50.0  # largest over smallest: beyond, a scale is logarithmic


class Chart(NamedTuple):
    """A number of the rows. `smoothed`: a line through its noise, the noise faint behind it."""

    key: str
    title: str
    unit: str
    smoothed: bool = False
    scale: float = 1.0


LOSS = Chart("loss", "Loss", "nats per token", True)
EVALUATIONS = (
    Chart("eval_loss", "Loss on held-out text", "nats per token"),
    Chart("bits_per_byte", "Bits per byte", "held-out text, any tokenizer"),
)
OTHERS = (
    Chart("lr", "Learning rate", ""),
    Chart("grad_norm", "Gradient norm", "before clipping", True),
    Chart("tokens_per_second", "Throughput", "tokens a second", True),
    Chart("mfu", "Model FLOPs utilisation", "share of the device's peak", True),
    Chart("memory_mb", "Memory", "GB", scale=1e-3),
    Chart("expert_cv", "Balance of experts", "variation, 0 is even", True),
    Chart("aux_loss", "Router losses", "", True),
)


def plot(chart: Chart, runs: Sequence[Record], *, log_x: bool = False) -> str:
    """One chart of the runs that have this number; "" where none has."""
    series, inside = [], []
    for number, run in enumerate(runs):
        points = [(step, value * chart.scale) for step, value in run.points(chart.key)]
        if log_x:
            points = [(max(step, 1.0), value) for step, value in points]
        if not points:
            continue
        shown = smooth(points) if chart.smoothed else points
        inside += shown
        series.append(
            Line(run.name, thin(shown, MOST), number, thin(points, MOST) if chart.smoothed and len(points) > 1 else (),
                 [(x, y, f"{run.name}, step {x:,.0f}: {short(y)}") for x, y in some(shown, DOTS)])
        )  # fmt: skip
    if not series:
        return ""
    low, high = min(y for _, y in inside), max(y for _, y in inside)
    last = max(x for x, _ in inside)
    last = max(last, 2.0)
    marks = powers(1, last) if log_x else ticks(0, last)
    # the scale ends at the last step, which a round number may lie far behind
    steps = [*(mark for mark in marks if mark[0] < (0.6 if log_x else 0.88) * last), (last, short(last))]
    log_y = low > 0 and high > APART * low and chart.key in ("grad_norm", "expert_cv")
    if chart.key == "mfu":
        scale = percents(round_up(high))
    else:
        scale = powers(low, high) if log_y else ticks(*_range(chart, low, high))
    return lines(chart.title, series, x_label="step", x_ticks=steps, y_ticks=scale, log_x=log_x, log_y=log_y)


def maps(run: Record, number: int) -> Iterator[tuple[str, str]]:
    """(title, plot) of the load of its most uneven sparse layers over time; full colour is twice the even share."""
    loads = run.loads
    if not loads:
        return
    count = len(loads[-1][1])
    moments = [load for load in some(loads, MOMENTS) if len(load[1]) == count]
    spread = [max(shares) - min(shares) for shares in moments[-1][1]]
    worst = sorted(sorted(range(count), key=lambda i: -spread[i])[:LAYERS])
    for layer in worst:
        columns = [[min(share * len(load[layer]) / 2, 1.0) for share in load[layer]] for _, load in moments]
        names = [str(i + 1) for i in range(len(columns[0]))]
        labels = f"step {moments[0][0]:,}", f"step {moments[-1][0]:,}"
        title = f"Load of the experts of sparse layer {layer + 1}, {run.name}"
        yield f"sparse layer {layer + 1} of {count}", heat(title, number, columns, labels, names)


def _range(chart: Chart, low: float, high: float) -> tuple[float, float]:
    """Ends of a scale: losses are looked at closely, amounts are measured from zero."""
    return (low, high) if "loss" in chart.key or chart.key == "bits_per_byte" else (min(0.0, low), high)


def some(values: Sequence[T], most: int) -> list[T]:
    """At most so many of them, evenly, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
