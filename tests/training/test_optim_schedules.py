"""Which parameters decay, the learning rate by hand, precision choices."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings, strategies

from moai_llm.recipe import OptimConfig, ScheduleConfig
from moai_llm.runtime import MoaiError, has_fast_bf16, pick_device
from moai_llm.training.optim import parameter_groups
from moai_llm.training.precision import make_precision
from moai_llm.training.schedules import DECAYS, SCHEDULES, learning_rate, warmup_steps
from tests.conftest import tiny_model


def test_every_parameter_is_in_one_group_and_the_right_one() -> None:
    model = tiny_model("linear_attention", "sparse", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, still = parameter_groups(model, OptimConfig())
    found = [names[id(p)] for group in (decaying, still) for p in group["params"]]
    assert sorted(found) == sorted(names.values()) and len(set(found)) == len(found)
    kept = {names[id(p)].rsplit(".", 1)[-1] for p in still["params"]}
    assert {"A_log", "D", "dt_bias", "conv_bias", "up_bias", "down_bias"} <= kept
    assert (
        all(p.dim() >= 2 for p in decaying["params"]) and decaying["weight_decay"] == 0.1 and still["weight_decay"] == 0
    )


ALL = sorted(get_args(get_type_hints(ScheduleConfig)["name"]))
DECAYING = [("wsd", shape) for shape in DECAYS] + [("cosine", "linear"), ("linear", "linear")]


def lrs(total: int = 100, losses: list[float] | None = None, **config) -> list[float]:  # type: ignore[no-untyped-def]
    return [learning_rate(step, total, 2.0, ScheduleConfig(**config), losses or []) for step in range(total)]


def test_every_schedule_of_the_recipe_is_here() -> None:
    assert {*SCHEDULES, "plateau"} == set(ALL)
    assert set(DECAYS) == set(get_args(get_type_hints(ScheduleConfig)["decay_shape"]))


@pytest.mark.parametrize("name", ALL)
def test_warmup_is_a_line_to_the_peak(name: str) -> None:
    rates = lrs(name=name, warmup=10)
    assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == 2.0
    assert lrs(name="constant", warmup=0.1) == lrs(name="constant", warmup=10)
    assert lrs(name="constant", warmup=0)[0] == 2.0


@settings(deadline=None, max_examples=150)
@given(
    name=strategies.sampled_from(ALL), shape=strategies.sampled_from(sorted(DECAYS)),
    total=strategies.integers(1, 3000),
    warmup=strategies.one_of(strategies.floats(0, 0.99), strategies.integers(1, 50)),
    decay=strategies.floats(0, 1), lowest=strategies.floats(0, 1),
)  # fmt: skip
def test_what_holds_for_every_schedule(
    name: str, shape: str, total: int, warmup: float, decay: float, lowest: float
) -> None:
    """Rises to the peak, never above it, then never rises, never below the lowest; a pure function of the step."""
    config = {"name": name, "decay_shape": shape, "warmup": warmup, "decay": decay, "min_ratio": lowest}
    rates = lrs(total, **config)
    rising = min(warmup_steps(total, ScheduleConfig(**config)), total)  # type: ignore[arg-type]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert all(a < b for a, b in zip(rates[:rising], rates[1:rising]))
    after = rates[rising:]
    assert all(b <= a + 1e-12 and b >= 2.0 * lowest - 1e-12 for a, b in zip(after, after[1:]))
    assert rates == lrs(total, **config)


@pytest.mark.parametrize(("name", "shape"), DECAYING)
def test_it_ends_at_the_lowest_and_has_no_jump(name: str, shape: str) -> None:
    """At the first step that is not run any more, the ratio would be `min_ratio`; on the way there are no jumps."""
    config = ScheduleConfig(name=name, decay_shape=shape, warmup=0, decay=0.5, min_ratio=0.1)  # type: ignore[arg-type]
    assert learning_rate(1000, 1000, 2.0, config) == pytest.approx(0.2)
    rates = [learning_rate(step, 1000, 2.0, config) for step in range(1001)]
    assert rates[0] == pytest.approx(2.0, rel=1e-2)
    largest = 0.1 if shape == "1-sqrt" else 0.006  # a root falls steeply where it begins
    assert max(a - b for a, b in zip(rates, rates[1:])) < largest


@pytest.mark.parametrize("shape", sorted(DECAYS))
def test_wsd(shape: str) -> None:
    rates = lrs(name="wsd", warmup=0, decay=0.2, min_ratio=0.1, decay_shape=shape)
    assert rates[:80] == [2.0] * 80
    done = [(i + 1) / 21 for i in range(20)]
    left = {
        "linear": [1 - x for x in done],
        "cosine": [(1 + math.cos(math.pi * x)) / 2 for x in done],
        "1-sqrt": [1 - math.sqrt(x) for x in done],
    }[shape]
    assert rates[80:] == pytest.approx([2 * (0.1 + 0.9 * x) for x in left])


def test_cosine() -> None:
    rates = lrs(name="cosine", warmup=0, min_ratio=0.1)
    assert rates[0] == 2.0 and rates[50] == pytest.approx(2 * (0.1 + 0.9 * 0.5)) and rates[-1] < 0.202
    assert rates[25] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_linear() -> None:
    assert lrs(name="linear", warmup=0, min_ratio=0.5) == pytest.approx([2 - step / 100 for step in range(100)])


def test_inverse_sqrt() -> None:
    """Of the paper: the step to the power of -1/2, and the peak where the warmup ends; the length says nothing."""
    rates = lrs(name="inverse_sqrt", warmup=10)
    assert rates[10:] == pytest.approx([2 * math.sqrt(10 / step) for step in range(10, 100)])
    assert lrs(total=50, name="inverse_sqrt", warmup=10) == rates[:50]
    assert min(lrs(name="inverse_sqrt", warmup=10, min_ratio=0.5)[10:]) == 1.0


@settings(deadline=None, max_examples=60)
@given(
    losses=strategies.lists(strategies.sampled_from([0.5, 1.0, 1.00005, 1.5, math.nan]), max_size=25),
    patience=strategies.integers(0, 4), lowest=strategies.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_plateau_is_torchs(losses: list[float], patience: int, lowest: float) -> None:
    config = ScheduleConfig(name="plateau", warmup=0, plateau_factor=0.5, plateau_patience=patience, min_ratio=lowest)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, min_lr=2.0 * lowest, eps=0.0
    )
    for i, loss in enumerate(losses, 1):
        theirs.step(loss)
        assert learning_rate(7, 100, 2.0, config, losses[:i]) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_short_runs_do_not_divide_by_zero() -> None:
    for name in ALL:
        assert all(math.isfinite(r) and r > 0 for total in (1, 2, 3) for r in lrs(total, name=name, warmup=0.5))


def test_precision() -> None:
    cpu = torch.device("cpu")
    assert make_precision("auto", cpu).name == ("bf16" if has_fast_bf16(cpu) else "fp32")
    with make_precision("bf16", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with make_precision("fp32", cpu).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with pytest.raises(MoaiError, match="fp16 on a CPU is slower"):
        make_precision("fp16", cpu)


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(MoaiError, match="'cuda:99' cannot be used here"):
        pick_device("cuda:99")
    with pytest.raises(MoaiError, match="'tpuu' cannot be used here"):
        pick_device("tpuu")
