"""A model directory small enough for benchmarks of seconds, with answers that are clear ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from moai_llm.config import MoaiConfig
from moai_llm.inference import TextModel, load_model
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_config
from tests.export.conftest import random_model


@pytest.fixture(scope="session")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention and dense layers, as Qwen3 has them, with rows that pad the vocabulary."""
    place = tmp_path_factory.mktemp("model") / "tiny"
    fields = {**tiny_config(max_position_embeddings=512).to_dict(), "vocab_size": tokenizer.padded_vocab_size + 128}
    random_model(MoaiConfig(**fields)).save_pretrained(place)
    tokenizer.save(place)
    return place


@pytest.fixture
def loaded(folder: Path) -> TextModel:
    return load_model(folder, "cpu", "fp32")
