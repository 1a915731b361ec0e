"""Published sets, each read by its own shape and counted against a reader written here; skipped where they are not."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data.prepare import prepare
from moai_llm.data.sft import SCHEMAS, detect, read_conversations
from moai_llm.data.shards import Store
from moai_llm.data.sources import read_records
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data
from tests.tokenizer.conftest import tokenizer_for

Turns = list[tuple[str, str]]
SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool"}


def alpaca(row: dict[str, Any]) -> Turns:
    asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    return [("user", asked), ("assistant", row["output"])]


def sharegpt(row: dict[str, Any]) -> Turns:
    return [
        ("assistant", "") if turn["from"] == "function_call" else (SPEAKERS[turn["from"]], turn["value"])
        for turn in row["conversations"]
    ]


SETS: list[tuple[str, str, int, Callable[[dict[str, Any]], Turns]]] = [
    ("sft/alpaca_en_demo.json", "alpaca", 999, alpaca),
    ("sft/alpaca_zh_demo.json", "alpaca", 1000, alpaca),
    ("sft/identity.json", "alpaca", 91, alpaca),
    ("sft/glaive_toolcall_en_demo.json", "sharegpt", 300, sharegpt),
    ("ko/ChatbotData.csv", "Q-A", 11823, lambda row: [("user", row["Q"]), ("assistant", row["A"])]),
    ("en/alpaca_seed_tasks.jsonl", "self-instruct", 175,
     lambda row: alpaca({**row["instances"][0], "instruction": row["instruction"]})),
    ("eval/gsm8k_test.jsonl", "question-answer", 1319,
     lambda row: [("user", row["question"]), ("assistant", row["answer"])]),
]  # fmt: skip


def rows_of(file: Path) -> list[dict[str, Any]]:
    """By the standard library alone."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            return list(csv.DictReader(lines))
        return [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.load(lines)


@pytest.mark.parametrize(("name", "schema", "count", "independent"), SETS, ids=[name for name, *_ in SETS])
def test_real_sets(
    name: str, schema: str, count: int, independent: Callable[[dict[str, Any]], Turns], tmp_path: Path
) -> None:
    file = shared_data(name)
    rows = rows_of(file)
    records = list(read_records([file]))
    assert len(rows) == len(records) == count and detect(records[:1000]).schema is SCHEMAS[schema]
    conversations = [messages for messages, _ in read_conversations(records)]
    assert [[(m["role"], m["content"]) for m in messages] for messages in conversations] == [
        independent(row) for row in rows
    ]
    tokenizer = tokenizer_for("chatml")
    report = prepare([file], tokenizer, tmp_path / "store", kind="chat")
    store = Store(tmp_path / "store")
    assert report.read == count == len(store) + report.dropped.total() and not report.skipped.bad_count
    empty = sum(any(not text.strip() for role, text in independent(row) if role == "user") for row in rows)
    mute = sum(not any(text.strip() for role, text in independent(row) if role == "assistant") for row in rows)
    assert report.dropped.total() == empty + mute
    if schema != "sharegpt":  # the learned text is the answer, to the letter
        kept = [t for t in map(independent, rows) if t[0][1].strip() and t[1][1].strip()]
        for i in range(0, len(kept), max(1, len(kept) // 100)):
            learned = store.document(i)[store.learn(i).astype(bool)].tolist()  # type: ignore[union-attr]
            assert tokenizer.decode(learned) == kept[i][1][1] + "<|im_end|>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("finance/tatqa_dev.json", "If the conversations lie within 'questions', write each as a JSON line first"),
        ("sft/c4_demo.jsonl", "not a conversation: it has text"),
        ("sft/dpo_en_demo.json", "prepare it with --preference instead of --chat"),
    ],
)
def test_sets_that_are_no_conversations_say_so(name: str, message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        list(read_conversations(read_records([shared_data(name)])))
