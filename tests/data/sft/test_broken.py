"""Broken records: each is an error that names file and line, or is counted; read == kept + dropped + skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Kind, Store
from moai_llm.data.sources import Reading
from moai_llm.runtime import MoaiError
from tests.tokenizer.conftest import tokenizer_for

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
TOOL = {"role": "tool", "content": "r"}


def said(**changes: Any) -> dict[str, Any]:
    """A conversation whose answer is changed."""
    return {"messages": [USER, {**ANSWER, **changes}]}


def call(value: Any) -> dict[str, Any]:
    return {"conversations": [HUMAN, {"from": "function_call", "value": value}, GPT]}


GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "sharegpt": {"conversations": [HUMAN, GPT]},
    "pair": {"question": "q", "answer": "a"},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
}
# (what is good in the file, what is broken in it, what the error says)
BROKEN: list[tuple[str, Any, str]] = [
    ("pair", {"question": "q"}, "no column 'answer'"),
    ("pair", {"question": "q", "answer": None}, "the answer is null, not text"),
    ("pair", {"question": 1, "answer": "a"}, "the question is a number, not text"),
    ("pair", {"question": "q", "answer": {"text": ["a"]}}, "the answer is an object, not text"),
    ("pair", {"question": "q", "answer": []}, "the answer is an empty list, not text"),
    ("pair", {"question": "q", "answer": "a", "system": 5}, "the system is a number, not text"),
    ("pair", GOOD["messages"], "no column 'question' and 'answer', which this source has"),
    ("pair", {"question": "q", "answer": "a", "tools": "f(x)"}, "'tools': not JSON: 'f(x)'"),
    ("pair", {"question": "q", "answer": "a", "tools": [1]}, "'tools' is a list, not a list of descriptions"),
    ("pair", ["q", "a"], "list"),
    ("alpaca", {"instruction": "q", "input": 3, "output": "a"}, "the input is a number, not text"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q0"]]}, "'history' is not a list of [quest"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["q0", None]]}, "an answer is null, not text"),
    ("alpaca", {"instruction": "q", "response": "a"}, "which looks like instruction-response"),
    ("messages", {"messages": []}, "'messages' is empty"),
    ("messages", {"messages": None}, "'messages' is null, not a list of messages"),
    ("messages", {"messages": "hello"}, "'messages': not JSON: 'hello'"),
    ("messages", {"messages": ["q", "a"]}, "message 0 is text, not an object with a role and a content"),
    ("messages", {"messages": [USER, {"content": "a"}]}, "message 1 has no role; it has content"),
    ("messages", {"messages": [{"role": "usr", "content": "q"}, ANSWER]}, "message 0 has an unknown role 'usr' (did"),
    ("messages", said(content=None), "the content of message 1 is null, not text"),
    ("messages", said(content=4), "the content of message 1 is a number, not text"),
    ("messages", said(content=[]), "the content of message 1 is an empty list, not text"),
    ("messages", said(content=[{"type": "image_url"}]), "the content of message 1 is not text alone"),
    ("messages", {"messages": [ANSWER]}, "message 0 is the assistant's, before any user has spoken"),
    ("messages", {"messages": [ANSWER, USER]}, "message 0 is the assistant's, before any user has spoken"),
    ("messages", {"messages": [USER, USER, ANSWER]}, "messages 0 and 1 are both the user's"),
    ("messages", {"messages": [USER, ANSWER, ANSWER]}, "messages 1 and 2 are both the assistant's"),
    ("messages", {"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "message 1 is a system message"),
    ("messages", {"messages": [USER, TOOL, ANSWER]}, "message 1 is a tool's result, but before it"),
    ("messages", said(weight=0.5), "message 1 has weight 0.5: a message is learned (1) or not (0)"),
    ("messages", said(train="no"), "message 1 has train 'no'"),
    ("messages", said(tool_calls=[{"function": {}}]), "message 1 has a tool call without a name"),
    ("messages", said(tool_calls=[{"name": "f", "arguments": "{x"}]), "arguments of f in message 1: not JSON"),
    ("messages", said(tool_calls=[{"name": "f", "arguments": "[1]"}]), "the arguments of f in message 1 are a list"),
    ("messages", said(tool_calls=[5]), "message 1 has a tool call without a name, 5"),
    ("sharegpt", {"conversations": "[{"}, "'conversations': not JSON: '[{'"),
    ("sharegpt", {"conversations": {"from": "human"}}, "'conversations' is an object, not a list of messages"),
    ("sharegpt", {"conversations": [HUMAN, {"from": "alien", "value": "a"}]}, "an unknown role 'alien'"),
    ("sharegpt", {"conversations": [HUMAN, {"value": "a"}]}, "message 1 has no role; it has value"),
    ("sharegpt", call("call f"), "message 1, a call: not JSON: 'call f'"),
    ("sharegpt", call(""), "message 1 is a call, and calls nothing"),
    ("sharegpt", call("[]"), "message 1 is a call, and calls nothing"),
    ("sharegpt", {"system": "s", "conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}, "one in a column"),
    ("preference", {"prompt": "q", "chosen": "a"}, "no column 'rejected'; it has prompt, chosen"),
    ("preference", {"prompt": "q", "completion": "a", "label": True}, "one by one (KTO) are not pairs"),
    ("preference", {"chosen": "a", "rejected": "b"}, "there is no prompt before the answers"),
    ("preference", {"prompt": "q", "question": "q", "chosen": "a", "rejected": "b"}, "in 'prompt' or in 'question'"),
    ("preference", {"prompt": "q", "chosen": None, "rejected": "b"}, "'chosen' is null, not an answer"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 2}, "'rejected' is a number, not an answer"),
    ("preference", {"prompt": None, "chosen": "a", "rejected": "b"}, "the prompt is null, not text"),
    ("preference", {"prompt": "q", "chosen": [], "rejected": []}, "'chosen' is empty"),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "other"}, ANSWER]}, "do not begin"),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER]}, "rejected does not end with an answer"),
    ("preference", {"messages": [USER, ANSWER], "chosen": ANSWER, "rejected": ANSWER}, "chosen: messages 1 and 2"),
]  # fmt: skip
# dropped and counted, since nothing is broken: there is only nothing to learn
EMPTY: list[tuple[str, Any, str]] = [
    ("pair", {"question": "q", "answer": " "}, "no assistant turn"),
    ("pair", {"question": "", "answer": "a"}, "an empty question"),
    ("messages", {"messages": [USER]}, "no assistant turn"),
    ("messages", {"messages": [USER, ANSWER, USER, {**ANSWER, "content": ""}]}, "an empty answer"),
    ("messages", said(weight=0), "no answer to be learned (weight 0)"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": ""}, "no assistant turn"),
]


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def kind_of(good: str) -> Kind:
    return "preference" if good == "preference" else "chat"


@pytest.mark.parametrize(("good", "row", "message"), BROKEN, ids=[f"{good}-{text[:40]}" for good, _, text in BROKEN])
def test_broken_records(tmp_path: Path, good: str, row: Any, message: str) -> None:
    tokenizer, kind = tokenizer_for("chatml"), kind_of(good)
    file = write(tmp_path / "a.jsonl", GOOD[good], GOOD[good], row, GOOD[good])
    with pytest.raises(MoaiError) as error:
        prepare([file], tokenizer, tmp_path / "store", kind=kind)
    assert f"{file}:3: " in str(error.value) and message in str(error.value)
    assert not (tmp_path / "store").exists()
    report = prepare([file], tokenizer, tmp_path / "store", kind=kind, reading=Reading(skip_bad=True))
    (skipped,) = report.skipped.broken()
    assert report.read == 3 and not report.dropped and skipped.times == 1 and message in skipped.example
    assert report.manifest.documents == (6 if kind == "preference" else 3)


@pytest.mark.parametrize(("good", "row", "reason"), EMPTY, ids=[text for _, _, text in EMPTY])
def test_empty_records(tmp_path: Path, good: str, row: Any, reason: str) -> None:
    tokenizer, kind = tokenizer_for("chatml"), kind_of(good)
    file = write(tmp_path / "a.jsonl", GOOD[good], row, GOOD[good])
    report = prepare([file], tokenizer, tmp_path / "store", kind=kind)
    assert dict(report.dropped) == {reason: 1} and report.read == 3 and not report.skipped.bad_count
    with pytest.raises(MoaiError, match="none of the 2 "):
        prepare([write(file, row, row)], tokenizer, tmp_path / "none", kind=kind)
    assert not (tmp_path / "none").exists()


def test_every_record_is_accounted_for(tmp_path: Path) -> None:
    """All that is broken and empty in one file for each shape: read == kept + dropped, and the rest was skipped."""
    tokenizer = tokenizer_for("chatml")
    for good in GOOD:
        rows = [row for kind, row, _ in (*BROKEN, *EMPTY) if kind == good and isinstance(row, dict)]
        rows = [GOOD[good]] * (len(rows) + 1) + rows
        file = write(tmp_path / "a.jsonl", *rows)
        report = prepare(
            [file], tokenizer, tmp_path / good, kind=kind_of(good), reading=Reading(skip_bad=True), overwrite=True
        )
        kept = report.manifest.documents // (2 if good == "preference" else 1)
        assert report.read + report.skipped.bad_count == len(rows)
        assert report.read == kept + report.dropped.total() and kept == len(Store(tmp_path / good)) // (
            2 if good == "preference" else 1
        )
        assert report.skipped.bad_count == sum(row.times for row in report.skipped.broken())
