"""Tokenizers with the control tokens of a template."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import set_template, template_tokens
from moai_llm.tokenizer.train import train_tokenizer

TEXTS = ["Interest is paid on the deposit.\n\n\n\nand\n  then\n\nmore " * 9, "이자는 은행에서 붙어요.\n\n둘째 줄 " * 9]


@functools.cache
def tokenizer_for(name: str) -> Tokenizer:
    tokenizer = train_tokenizer(
        TEXTS, 420, special_tokens=("<|endoftext|>", "<|pad|>", *template_tokens(name)), fewer=True
    )
    set_template(tokenizer, name)
    return tokenizer


@pytest.fixture
def make() -> Callable[[str], Tokenizer]:
    """A small tokenizer for a template by name."""
    return tokenizer_for
