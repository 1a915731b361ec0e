"""The model of a run: the token ids it is given."""

from __future__ import annotations

import pytest
import torch

from moai_llm import recipe as recipes
from moai_llm.training.build import build_model
from tests.tokenizer.conftest import tokenizer_for


@pytest.mark.parametrize(
    ("name", "bos"), [("chatml", "<|endoftext|>"), ("llama3", "<|begin_of_text|>"), ("gemma", "<bos>")]
)
def test_ids_come_from_the_tokenizer_and_its_chat_template(name: str, bos: str) -> None:
    """So that transformers' `generate` begins and stops where the template does."""
    tokenizer = tokenizer_for(name)
    model = build_model(recipes.load("quickstart", []), tokenizer, torch.device("cpu"))
    settings = model.generation_config
    assert settings.eos_token_id == tokenizer.stop_ids and len(tokenizer.stop_ids) == 2
    assert tokenizer.decode([settings.bos_token_id]) == bos == tokenizer.decode([model.config.bos_token_id])
    assert model.config.eos_token_id == tokenizer.eos_id and model.config.pad_token_id == tokenizer.pad_id
