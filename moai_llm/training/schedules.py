"""Learning rate as a pure function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math
from collections.abc import Callable

from moai_llm.recipe import ScheduleConfig


def learning_rate(step: int, total: int, peak: float, config: ScheduleConfig) -> float:
    """The learning rate of step 0 <= step < total: a linear warmup to `peak`, then the schedule's share of it."""
    warmup = warmup_steps(total, config)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[config.name](step - warmup, max(1, total - warmup), config)


def warmup_steps(total: int, config: ScheduleConfig) -> int:
    """`warmup` below 1 is a share of all steps, else steps."""
    return round(config.warmup * total) if config.warmup < 1 else int(config.warmup)


def _wsd(step: int, total: int, config: ScheduleConfig) -> float:
    """Warmup-stable-decay (arXiv 2410.05192): full until the last `decay` share, then a line down to `min_ratio`."""
    decaying = max(1, round(config.decay * total))
    left = total - step
    return 1.0 if left > decaying else config.min_ratio + (1 - config.min_ratio) * left / (decaying + 1)


def _cosine(step: int, total: int, config: ScheduleConfig) -> float:
    """Half a cosine from 1 down to `min_ratio` (arXiv 1608.03983 without restarts)."""
    return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * step / total))


def _constant(step: int, total: int, config: ScheduleConfig) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[int, int, ScheduleConfig], float]] = {
    "wsd": _wsd,
    "cosine": _cosine,
    "constant": _constant,
}
