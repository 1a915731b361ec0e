"""Holding documents out: no document is in both parts, none is in neither, and every run makes the same parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.data.prepare import prepare, split, split_texts
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import render, set_template
from tests.conftest import shared_data
from tests.tokenizer.conftest import tokenizer_for


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


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_conversations_by_every_template(name: str, tmp_path: Path) -> None:
    tokenizer, talk = tokenizer_for(name), [{"role": "user", "content": "q"}, {"role": "assistant", "content": "답"}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    prepare([file], tokenizer, tmp_path / "store", kind="chat")
    store, rendered = Store(tmp_path / "store"), render(tokenizer, talk)
    assert store.document(0).tolist() == rendered.ids and store.learn(0).astype(bool).tolist() == rendered.learn
    again = store.tokenizer()  # the store's tokenizer, which the run will give its model
    assert again.chat_template == tokenizer.chat_template and again.stop_ids == tokenizer.stop_ids


def test_tools_are_part_of_a_conversation(tmp_path: Path) -> None:
    report = prepare(
        [shared_data("sft/glaive_toolcall_en_demo.json")], tokenizer_for("chatml"), tmp_path / "store", kind="chat"
    )
    store = Store(tmp_path / "store")
    text = store.tokenizer().decode(store.document(0).tolist())
    assert report.read == len(store) == 300 and "<tools>\n{" in text and "<tool_call>\n{" in text


def test_a_template_that_leaves_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_for("chatml").backend, tokenizer_for("chatml").roles)
    file, jinja = tmp_path / "a.jsonl", tmp_path / "t.jinja"
    file.write_text('{"Q": "q", "A": "a"}\n{"Q": "q", "A": ""}\n')
    jinja.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% generation %}{% endgeneration %}")
    set_template(tokenizer, jinja)
    with pytest.raises(MoaiError, match="leaves nothing to learn in any of the 2 conversations: look at one with"):
        prepare([file], tokenizer, tmp_path / "store", kind="chat")
    assert not (tmp_path / "store").exists()
    jinja.write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")  # no tags: derived, not zero
    set_template(tokenizer, jinja)
    report = prepare([file], tokenizer, tmp_path / "store", kind="chat")
    assert dict(report.dropped) == {"no assistant turn": 1} and Store(tmp_path / "store").learn(0).sum() == 2
