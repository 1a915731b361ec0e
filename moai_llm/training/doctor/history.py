"""Checks of what a run left: its losses, its speed, its experts, its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from moai_llm.training.checkpoint import problems
from moai_llm.training.doctor.finding import Finding
from moai_llm.training.doctor.learning import experts_of

Rows = Sequence[dict[str, Any]]

WINDOW = 20  # rows before a loss that say what was usual
SPIKE = 1.0  # nats above what was usual
FEW = 8  # rows that are too few to judge
SLOWER = 0.7  # of the usual speed
LATEST = 5  # maps of load that are averaged


def losses(rows: Rows) -> Finding:
    """Losses that are no numbers, that jump, or that do not fall."""
    found = [(row["step"], float(row["loss"])) for row in rows if "loss" in row]
    if not found:
        return Finding("loss", "warn", "no loss was logged", "let the run reach its first step, or lower log.every")
    bad = [step for step, loss in found if not math.isfinite(loss)]
    numbers: dict[str, Any] = {"steps": found[-1][0], "last": found[-1][1]}
    if bad:
        advice = "go back to a checkpoint before it; lower optim.lr, raise schedule.warmup or use train.precision=fp32"
        return Finding("loss", "fail", f"not a number at step {bad[0]}", advice, numbers)
    spikes = _spikes(found)
    numbers["spikes"] = [step for step, _ in spikes]
    values = [loss for _, loss in found]
    seen = f"{values[0]:.3f} at step {found[0][0]}, {values[-1]:.3f} at step {found[-1][0]}"
    if spikes:
        step, height = max(spikes, key=lambda spike: spike[1])
        advice = "look at the data of that step; lower optim.lr or train.max_grad_norm if they come again"
        many = f"{len(spikes)} spikes, the largest" if len(spikes) > 1 else "a spike"
        seen += f"; {many} {height:.2f} above the usual at step {step}"
        return Finding("loss", "warn", seen, advice, numbers)
    quarter = len(values) // 4
    if len(values) >= FEW and median(values[-quarter:]) >= median(values[:quarter]):
        advice = "raise or lower optim.lr by a factor of 3, and run `moai doctor` on its recipe"
        return Finding("loss", "fail", f"{seen}: it does not fall", advice, numbers)
    return Finding("loss", "ok", f"{seen}, no spikes", numbers=numbers)


def _spikes(found: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(step, height) where a loss lies far above the median before it, counted once until it is back."""
    spikes: list[tuple[int, float]] = []
    above = False
    for i in range(FEW, len(found)):
        before = [loss for _, loss in found[max(0, i - WINDOW) : i]]
        usual = median(before)
        noise = median(abs(loss - usual) for loss in before)
        height = found[i][1] - usual
        now = height > max(SPIKE, 8 * noise)
        if now and not above:
            spikes.append((found[i][0], height))
        above = now
    return spikes


def throughput(rows: Rows) -> Finding:
    """Tokens a second at the end against what was usual."""
    speeds = [float(row["tokens_per_second"]) for row in rows if row.get("tokens_per_second")]
    if len(speeds) < FEW:
        return Finding("throughput", "ok", f"{len(speeds)} measurements are too few to compare")
    usual, last = median(speeds), median(speeds[-max(3, len(speeds) // 10) :])
    numbers = {"usual": usual, "last": last}
    seen = f"{last:,.0f} tokens a second at the end, {usual:,.0f} usually"
    if last < SLOWER * usual:
        advice = "something else takes the machine, it is too hot, or its memory is full: look at it, then at --profile"
        return Finding("throughput", "warn", seen, advice, numbers)
    return Finding("throughput", "ok", seen, numbers=numbers)


def experts(rows: Rows) -> Finding | None:
    """Dead experts by the load of training itself, averaged over its end; None where none was logged."""
    loads = [row["expert_load"] for row in rows if row.get("expert_load")][-LATEST:]
    if not loads or any(len(load) != len(loads[-1]) for load in loads):
        return None
    mean = [[sum(shares) / len(loads) for shares in zip(*layer)] for layer in zip(*loads)]
    return experts_of(mean, "at the end of training")


def checkpoints(run: Path) -> Finding:
    """Every file of every checkpoint against its digest."""
    found = sorted((run / "checkpoints").glob("step-*"))
    aside = sorted(path.name for path in (run / "checkpoints").glob("damaged-*"))
    bad = {path.name: first for path in found if (first := next(problems(path), None))}
    numbers = {"sound": [path.name for path in found if path.name not in bad], "damaged": bad, "set_aside": aside}
    if not found:
        return Finding("checkpoints", "warn", "there is none", "lower checkpoint.every, or let the run go on", numbers)
    if bad:
        seen = "; ".join(f"{name}: {problem}" for name, problem in bad.items())
        advice = "the disk or a copy damaged it; --resume sets it aside and takes the newest sound one"
        return Finding("checkpoints", "fail", seen, advice, numbers)
    if aside:
        seen = f"{len(found)} sound; set aside: {', '.join(aside)}"
        return Finding("checkpoints", "warn", seen, "a checkpoint was damaged before: look after the disk", numbers)
    seen = f"{len(found)}, every file as it was written; the newest is {found[-1].name}"
    return Finding("checkpoints", "ok", seen, numbers=numbers)
