"""A small prepared store and a recipe over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai_llm import recipe as recipes
from moai_llm.data.prepare import prepare
from moai_llm.recipe import Recipe
from moai_llm.tokenizer import Tokenizer
from moai_llm.training import loop

MakeRecipe = Callable[..., Recipe]


def train(*arguments: Any, **options: Any) -> Path:
    """Train to the end and return the last checkpoint."""
    trained = loop.train(*arguments, **options)
    assert trained.finished
    return trained.checkpoint


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> Path:
    prepare([text_file], tokenizer, tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def make_recipe(tmp_path: Path, store: Path) -> MakeRecipe:
    """A short fp32 run of the tiny hybrid of attention, Mamba and experts."""

    def make(*overrides: str, name: str = "moai-hybrid-moe-0.8b-tiny", out: str = "run") -> Recipe:
        return recipes.load(name, [
            f"data.train={store}", f"train.out={tmp_path / out}", "data.seq_len=32", "train.steps=8",
            "train.batch_tokens=128", "train.micro_batch_size=2", "train.precision=fp32", "train.device=cpu",
            "checkpoint.every=3", "log.every=1", *overrides,
        ])  # fmt: skip

    return make
