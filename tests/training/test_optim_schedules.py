"""Which parameters decay, the learning rate by hand, precision choices."""

from __future__ import annotations

import math

import pytest
import torch

from moai_llm.recipe import ScheduleConfig
from moai_llm.runtime import MoaiError, has_fast_bf16, pick_device
from moai_llm.training.optim import parameter_groups
from moai_llm.training.precision import make_precision
from moai_llm.training.schedules import SCHEDULES, learning_rate
from tests.conftest import tiny_model


def test_every_parameter_is_in_one_group_and_the_right_one() -> None:
    model = tiny_model("linear_attention", "sparse", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    names = {id(p): name for name, p in model.named_parameters()}
    decaying, still = parameter_groups(model, 0.1)
    found = [names[id(p)] for group in (decaying, still) for p in group["params"]]
    assert sorted(found) == sorted(names.values()) and len(set(found)) == len(found)
    kept = {names[id(p)].rsplit(".", 1)[-1] for p in still["params"]}
    assert {"A_log", "D", "dt_bias", "conv_bias", "up_bias", "down_bias"} <= kept
    assert (
        all(p.dim() >= 2 for p in decaying["params"]) and decaying["weight_decay"] == 0.1 and still["weight_decay"] == 0
    )


def lrs(total: int = 100, **config) -> list[float]:  # type: ignore[no-untyped-def]
    return [learning_rate(step, total, 2.0, ScheduleConfig(**config)) for step in range(total)]


def test_warmup_is_a_line_to_the_peak() -> None:
    for name in SCHEDULES:
        rates = lrs(name=name, warmup=10)
        assert rates[:10] == pytest.approx([2.0 * (i + 1) / 10 for i in range(10)])
        assert max(rates) == 2.0
    assert lrs(name="constant", warmup=0.1) == lrs(name="constant", warmup=10)
    assert lrs(name="constant", warmup=0)[0] == 2.0


def test_wsd() -> None:
    rates = lrs(name="wsd", warmup=0, decay=0.2, min_ratio=0.1)
    assert rates[:80] == [2.0] * 80
    falling = rates[80:]
    assert all(a > b for a, b in zip(falling, falling[1:])) and 0.2 < falling[-1] < 0.4
    steps = [a - b for a, b in zip(falling, falling[1:])]
    assert max(steps) - min(steps) < 1e-9  # a line


def test_cosine() -> None:
    rates = lrs(name="cosine", warmup=0, min_ratio=0.1)
    assert rates[0] == 2.0 and rates[50] == pytest.approx(2 * (0.1 + 0.9 * 0.5)) and rates[-1] < 0.202
    assert rates[25] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))


def test_short_runs_do_not_divide_by_zero() -> None:
    for name in SCHEDULES:
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
