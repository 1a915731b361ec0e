"""The guide holds every published value it names, and a run warns where its learning rate is far from it."""

from __future__ import annotations

import logging
import re

import pytest

from moai_llm import recipe as recipes
from moai_llm.training.lr_guide import LINES, PUBLISHED, SIZES, Published, advice, guide, kind_of_run, shown
from tests.training.conftest import MakeRecipe, train


@pytest.mark.parametrize("value", PUBLISHED, ids=lambda value: f"{value.kind}: {value.model}")
def test_what_was_published_is_inside(value: Published) -> None:
    usual = guide(value.kind, value.parameters)
    assert usual is not None and usual[0] <= value.lr <= usual[1]
    assert advice(value.lr, value.kind, int(value.parameters)) is None


def test_control_the_ranges_are_not_everything() -> None:
    """No range spans more than two and a half powers of ten, and one size's slip is another's warning."""
    for kind in LINES:
        for size in SIZES:
            low, high = guide(kind, size) or (0.0, 0.0)
            assert 0 < low < high < 60 * low
    assert advice(1e-6, "pretrain", 7_000_000_000) and advice(3e-4, "preference", 7_000_000_000)
    assert {value.kind for value in PUBLISHED} == set(LINES)


def test_the_guide_of_the_older_documents_agrees() -> None:
    """Their tables by kind and by size are inside, and their common mistake, 1e-6 for pretraining, is warned of."""
    for kind, low, high in (("pretrain", 2e-4, 3e-4), ("continued", 5e-5, 1e-4), ("sft", 2e-5, 1e-4)):
        for lr in (low, high):
            assert advice(lr, kind, 3_000_000_000) is None
    said = advice(1e-6, "pretrain", 3_000_000_000)
    assert said is not None and re.search(r"1\.0e-06 is \d+ times below what is usual for pretraining with adamw", said)


@pytest.mark.parametrize("name", recipes.list_recipes())
def test_presets_are_near_the_guide(name: str) -> None:
    recipe = recipes.load(name)
    assert advice(recipe.optim.lr, "pretrain", recipe.model.parameters()["active"]) is None


def test_optimizers() -> None:
    adamw, lion = guide("pretrain", 1e9), guide("pretrain", 1e9, "lion")
    assert adamw and lion and lion == pytest.approx((adamw[0] / 10, adamw[1] / 3))
    assert guide("pretrain", 1e9, "muon") == guide("pretrain", 1e9, "adafactor") == adamw
    assert guide("pretrain", 1e9, "sgd") is None and advice(5.0, "pretrain", 10**9, "sgd") is None


def test_kinds() -> None:
    assert kind_of_run("text", None) == "pretrain" and kind_of_run("text", "runs/a") == "continued"
    assert kind_of_run("chat", None) == kind_of_run("chat", "runs/a") == "sft"
    assert kind_of_run("preference", "runs/a") == "preference"
    assert [shown(n) for n in (1_300_000_000, 7e9, 124_400_000, 4_100, 12)] == ["1.3B", "7B", "124M", "4.1K", "12"]


def test_a_run_warns(make_recipe: MakeRecipe, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    train(make_recipe("train.steps=1", "optim.lr=1e-6", out="low"), quiet=True)
    assert re.search(r"optim.lr 1.0e-06 is \d+ times below what is usual for pretraining", caplog.text)
    caplog.clear()
    train(make_recipe("train.steps=1", out="usual"), quiet=True)
    assert not caplog.records


def test_adapters_have_rates_of_their_own() -> None:
    assert kind_of_run("chat", "model", lora=True) == kind_of_run("text", "model", lora=True) == "lora"
    assert kind_of_run("preference", "model", lora=True) == "preference"
    assert kind_of_run("chat", "model") == "sft"
