"""Stores, weights and stages in a recipe: how they are written, and what is said of what is wrong."""

from __future__ import annotations

import pytest
import yaml

from moai_llm import recipe as recipes
from moai_llm.mixture import SourceConfig, StageConfig
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError


def load(*overrides: str) -> Recipe:
    return recipes.load("moai-3b-tiny", overrides)


def test_ways_to_write_what_is_trained_on() -> None:
    assert load("data.train=a").data.train == "a"
    assert load("data.train=[a, b]").data.train == [SourceConfig(store="a"), SourceConfig(store="b")]
    mixture = [SourceConfig(store="a", weight=0.7), SourceConfig(store="b", weight=0.3)]
    assert load("data.train=[{store: a, weight: 0.7}, {store: b, weight: 3e-1}]").data.train == mixture
    stages = load("data.stages=[{train: a, until: 2e9}, {train: [b, {store: c}], epochs: 2}]").data.stages
    assert stages[0] == StageConfig(train="a", until=2e9)
    assert stages[1] == StageConfig(train=[SourceConfig(store="b"), SourceConfig(store="c")], epochs=2)
    assert load("data.stages=[{train: a, until: 2e9}, {train: [b, {store: c}]}]").data.stores() == ["a", "b", "c"]
    assert load().data.stores() == []


@pytest.mark.parametrize(
    "written",
    ["data.train=[a, b]", "data.train=[{store: a, weight: 2}]", "data.stages=[{train: a, epochs: 1}, {train: b}]"],
)
def test_a_recipe_reads_what_it_writes(written: str) -> None:
    recipe = load(written)
    assert recipes.from_tree(yaml.safe_load(recipes.dump(recipe))) == recipe


def test_what_is_given_replaces_what_the_file_says(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "staged.yaml"
    file.write_text(recipes.dump(load("data.stages=[{train: a, until: 5}, {train: b}]")))
    assert recipes.load(file, ["data.train=c"]).data.stores() == ["c"]
    file.write_text(recipes.dump(load("data.train=a")))
    assert recipes.load(file, ["data.stages=[{train: b}]"]).data.stores() == ["b"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("data.train=5", r"data.train: input should be a store, or a list of \{store, weight\}, got 5$"),
        ("data.train={store: a}", r"data.train: input should be a store, or a list of \{store, weight\}"),
        ("data.train=[5]", r"recipe:\n  data.train.0: input should be"),
        ("data.train=[{store: a, wieght: 1}]", r":\n  data.train.0.wieght: unknown key \(did you mean 'weight'\?\)$"),
        ("data.train=[{store: a, weight: 0}]", r":\n  data.train.0.weight: input should be greater than 0, got 0$"),
        ("data.train=[{store: a, weight: 1}, b]", "data.train gives a weight to some of its stores"),
        ("data.stages=[{train: a, untill: 3}]", r"data.stages.0.untill: unknown key \(did you mean 'until'\?\)"),
        ("data.stages=[{train: [{stor: a}], until: 3}]", r"train.0.stor: unknown key \(did you mean .store.\?\)"),
        ("data.stages=[{train: a}, {train: b}]", "data.stages.0 has no end, so the next stage never comes"),
        ("data.stages=[{train: a, until: 1, epochs: 1}]", "data.stages.0 ends by `until` or by `epochs`"),
        ("data.stages=[{train: [], epochs: 1}]", "data.stages.0.train is an empty list"),
        ("data.num_workers=2", r"data.num_workers: unknown key \(here it is data.workers\)"),
        ("data.prefetch_factor=2", r"\(here it is data.prefetch, steps that are read ahead\)"),
        ("data.persistent_workers=true", r"\(here it is always so, the threads of data.workers"),
        ("data.workers=-1", "data.workers: input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_mistakes(written: str, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        load(written)


def test_both_at_once() -> None:
    with pytest.raises(MoaiError, match="data.train and data.stages both say what to train on"):
        load("data.train=a", "data.stages=[{train: b}]")
