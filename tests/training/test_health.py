"""The judge of steps alone, against the rule written out, and its state."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest

from moai_llm.recipe import HealthConfig
from moai_llm.training.health import Health

NAN, INF = math.nan, math.inf


def calm(count: int, seed: int = 0) -> list[tuple[float, float]]:
    rng = random.Random(seed)
    return [(3 + 0.1 * rng.gauss(0, 1), 1 + 0.05 * rng.gauss(0, 1)) for _ in range(count)]


def fed(health: Health, steps: list[tuple[float, float]]) -> Health:
    assert all(health.judge(*step).action == "take" for step in steps)
    return health


def test_what_is_not_finite_is_skipped_then_stops() -> None:
    health = fed(Health(HealthConfig(patience=3)), calm(5))
    for loss, norm in ((NAN, 1.0), (3.0, INF), (INF, NAN)):
        assert health.judge(loss, norm).action == "skip"
    assert health.judge(NAN, NAN) == ("stop", "loss nan, gradient norm nan") and health.skipped == 3
    assert Health(HealthConfig(nonfinite="stop")).judge(NAN, 1.0).action == "stop"
    assert Health(HealthConfig(patience=1, rollback=True)).judge(NAN, 1.0).action == "skip"


def test_a_good_step_between_starts_the_count_again() -> None:
    health = Health(HealthConfig(patience=2))
    for _ in range(4):
        assert [health.judge(NAN, 1.0).action, health.judge(NAN, 1.0).action] == ["skip", "skip"]
        assert health.judge(3.0, 1.0).action == "take"
    assert health.skipped == 8


@pytest.mark.parametrize("which", [0, 1])
def test_spikes_by_the_rule(which: int) -> None:
    steps = calm(128)
    values = [step[which] for step in steps]
    limit = statistics.fmean(values) + 6 * statistics.pstdev(values)

    def step(value: float) -> tuple[float, float]:
        return (value, 1.0) if which == 0 else (3.0, value)

    assert fed(Health(HealthConfig()), steps).judge(*step(limit + 1e-6)).action == "skip"
    assert fed(Health(HealthConfig()), steps).judge(*step(limit - 1e-6)).action == "take"  # control
    assert fed(Health(HealthConfig()), steps[:63]).judge(*step(limit * 9)).action == "take"  # too few to judge by
    assert fed(Health(HealthConfig(spike_sigma=None)), steps).judge(*step(limit * 9)).action == "take"


def test_nearly_equal_values_make_no_spike() -> None:
    health = fed(Health(HealthConfig()), [(0.01, 0.5)] * 128)
    assert health.judge(0.0109, 0.54).action == "take"
    assert health.judge(0.02, 0.5).action == "skip"


def test_skipped_spikes_do_not_lift_the_limit_and_many_are_a_new_level() -> None:
    health = fed(Health(HealthConfig(patience=4)), calm(128))
    verdicts = [health.judge(5.0, 1.0) for _ in range(5)]
    assert [v.action for v in verdicts] == ["skip"] * 4 + ["take"] and "new level" in verdicts[-1].reason
    fed(health, [(5.0, 1.0)] * 100)
    rolling = fed(Health(HealthConfig(patience=4, rollback=True)), calm(128))
    assert [rolling.judge(5.0, 1.0).action for _ in range(5)] == ["skip"] * 4 + ["rollback"]


def test_an_overflow_of_scaled_gradients_is_no_failure() -> None:
    health = Health(HealthConfig(patience=2, nonfinite="stop"))
    assert [health.judge(3.0, INF, scaled=True).action for _ in range(10)] == ["skip"] * 10
    assert health.judge(3.0, INF, scaled=True).action == "stop"
    assert Health(HealthConfig(nonfinite="stop")).judge(NAN, INF, scaled=True).action == "stop"


def test_a_restored_judge_judges_the_same() -> None:
    steps = [*calm(100), (9.0, 1.0), (NAN, 1.0), *calm(60, seed=1), (3.0, 9.0), *calm(20, seed=2)]
    whole = Health(HealthConfig())
    expected = [whole.judge(*step) for step in steps]
    for cut in (1, 64, 101, 102, 150):
        first = Health(HealthConfig())
        got = [first.judge(*step) for step in steps[:cut]]
        second = Health(HealthConfig())
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert got + [second.judge(*step) for step in steps[cut:]] == expected
        assert second.state_dict() == whole.state_dict()
    forgetful = Health(HealthConfig())  # control
    assert [forgetful.judge(*step) for step in steps[100:]] != expected[100:]
