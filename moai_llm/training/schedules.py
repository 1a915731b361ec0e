"""Learning rate as a pure function of the step, and for `plateau` of the evaluations so far: no state of its own.

`total` is the first step that is not run any more: there a schedule that ends at `min_ratio` would reach it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from moai_llm.optimization import ScheduleConfig

BETTER = 1e-4  # a loss counts as better when it is lower by this share, as in torch's ReduceLROnPlateau


def learning_rate(step: int, total: int, peak: float, config: ScheduleConfig, losses: Sequence[float] = ()) -> float:
    """The learning rate of step 0 <= step < total: a linear warmup to `peak`, then the schedule's share of it.

    Args:
        losses: of the evaluations before this step, in their order; only `plateau` looks at them.
    """
    warmup = warmup_steps(total, config)
    if step < warmup:
        return peak * (step + 1) / warmup
    if config.name == "plateau":
        return peak * plateau(losses, config)
    return peak * SCHEDULES[config.name](step - warmup, max(1, total - warmup), max(1, warmup), config)


def warmup_steps(total: int, config: ScheduleConfig) -> int:
    """`warmup` below 1 is a share of all steps, else steps."""
    return round(config.warmup * total) if config.warmup < 1 else int(config.warmup)


def plateau(losses: Sequence[float], config: ScheduleConfig) -> float:
    """1, times `plateau_factor` each time that more than `plateau_patience` losses in a row were not better."""
    ratio, best, waited = 1.0, math.inf, 0
    for loss in losses:
        if loss < best * (1 - BETTER):
            best, waited = loss, 0
        else:
            waited += 1
        if waited > config.plateau_patience:
            ratio, waited = max(config.min_ratio, ratio * config.plateau_factor), 0
    return ratio


def _wsd(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """Warmup-stable-decay (arXiv 2410.05192): full until the last `decay` share, then down to `min_ratio`."""
    decaying = max(1, round(config.decay * total))
    done = 1 - (total - step) / (decaying + 1)  # share of the decay, 0 at the last full step
    return 1.0 if done <= 0 else _down_to(config.min_ratio, DECAYS[config.decay_shape](done))


def _cosine(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """Half a cosine from 1 down to `min_ratio` (arXiv 1608.03983 without restarts)."""
    return _down_to(config.min_ratio, DECAYS["cosine"](step / total))


def _linear(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    return _down_to(config.min_ratio, DECAYS["linear"](step / total))


def _constant(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    return 1.0


def _inverse_sqrt(step: int, total: int, warmup: int, config: ScheduleConfig) -> float:
    """Falls with the root of the step, so that it need not know the end (arXiv 1706.03762, section 5.3)."""
    return max(config.min_ratio, math.sqrt(warmup / (warmup + step)))


def _down_to(lowest: float, share: float) -> float:
    return lowest + (1 - lowest) * share


# share of a decay that is done -> what is left of the learning rate
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1 - math.sqrt(done),  # arXiv 2405.18392, section 3
}
SCHEDULES: dict[str, Callable[[int, int, int, ScheduleConfig], float]] = {
    "wsd": _wsd,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "inverse_sqrt": _inverse_sqrt,
}
