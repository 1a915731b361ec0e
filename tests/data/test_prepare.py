"""Holding documents out: no document is in both parts, none is in neither, and every run makes the same parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.data.prepare import prepare, split, split_texts
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer


def test_held_out_texts_are_not_trained_on() -> None:
    many = [(f"text {i}", str(i)) for i in range(60)]
    held, kept = list(split_texts(iter(many), "valid", 20)), list(split_texts(iter(many), "train", 20))
    assert len(held) == 3 and sorted(held + kept) == sorted(many)
    assert held == list(split(many, "valid", 20))


def test_of_few_texts_the_end_is_held_out() -> None:
    one = [("x" * 99 + "y", "one")]
    ((start, _),), ((end, _),) = split_texts(one, "train", 20), split_texts(one, "valid", 20)
    assert start + end == one[0][0] and len(end) == 5


def documents(path: Path) -> list[list[int]]:
    store = Store(path)
    return [store.document(i).tolist() for i in range(len(store))]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_both_parts_of_files(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"t {i}", "Q": f"q {i}", "A": f"a {i}"}) + "\n" for i in range(25)))
    for part in ("train", "valid", None):
        prepare([file], tokenizer, tmp_path / str(part), kind=kind, part=part, valid_share=0.1)  # type: ignore[arg-type]
    train, valid, everything = (documents(tmp_path / str(part)) for part in ("train", "valid", None))
    assert len(valid) == 3 and sorted(train + valid) == sorted(everything)
    with pytest.raises(MoaiError, match="between 0 and 0.5, got 1.5"):
        prepare([file], tokenizer, tmp_path / "x", valid_share=1.5)
