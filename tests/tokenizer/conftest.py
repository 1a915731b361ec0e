"""Tokenizers with the control tokens of a template, and real documents for the tests of encoding."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import tests.conftest
from moai_llm.tokenizer import Tokenizer, load_tokenizer
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


FOLDERS = ("ko", "en", "ja", "zh", "finance", "sft", "eval")
PER_FILE = 420


@pytest.fixture(scope="session")
def real_documents() -> list[str]:
    """Paragraphs and records of the shared data sets, in four languages, of finance, chats, tasks and code: over ten
    thousand. The test is skipped where the data is not there.
    """
    files = [file for folder in FOLDERS for file in sorted(tests.conftest.SHARED_DATA.glob(f"{folder}/*"))]
    if not files:
        pytest.skip("needs the shared data sets, which are not part of the repository")
    files += sorted((tests.conftest.ROOT / "moai_llm").rglob("*.py"))
    documents = [text for file in files for text in islice(_paragraphs(file), PER_FILE)]
    assert len(documents) >= 10_000
    return documents


@pytest.fixture(scope="session")
def o200k() -> Tokenizer:
    """o200k_base, where its file is there."""
    return load_tokenizer(tests.conftest.shared_data("tokenizers/o200k_base.tiktoken"))


def _paragraphs(file: Path) -> Iterator[str]:
    content = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        texts: Any = (text for line in content.splitlines() for text in _strings(json.loads(line)))
    elif file.suffix == ".json":
        texts = _strings(json.loads(content))
    else:
        texts = [content]
    for text in texts:
        yield from (paragraph[:1500] for paragraph in text.split("\n\n"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
