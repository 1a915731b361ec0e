"""Instruction records of every shape become conversations."""

from __future__ import annotations

import pytest

from moai_llm.data.sft import detect_schema, read_conversations
from moai_llm.data.sources import Record, read_records
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAPES = {
    "messages": {"messages": PAIR},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "instruction-response": {"instruction": "q", "response": "a", "category": "x"},
    "question-answer": {"question": "q", "answer": "a"},
    "Q-A": {"Q": "q", "A": "a", "label": "0"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "prompt-response": {"prompt": "q", "response": "a"},
    "query-response": {"query": "q", "response": "a"},
    "질문-답변": {"질문": "q", "답변": "a"},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    assert detect_schema(SHAPES[name]) == name
    assert list(read_conversations([Record(SHAPES[name], "here")])) == [(PAIR, "here")]


def test_details() -> None:
    columns = {
        "system": "s",
        "conversations": [{"from": "human", "value": "q"}, {"from": "observation", "value": None}],
    }
    ((messages, _),) = read_conversations([Record(columns, "")])
    assert [m["role"] for m in messages] == ["system", "user", "tool"] and messages[2]["content"] == ""
    ((messages, _),) = read_conversations([Record({"instruction": "q", "input": "more", "output": "a"}, "")])
    assert messages[0]["content"] == "q\nmore"


CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    "columns",
    [
        {  # OpenAI's: arguments as JSON text, content null
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ]},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
            ],
            "tools": [TOOL],
        },
        {  # ShareGPT's: everything as JSON text
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "r"},
            ],
            "tools": '[{"name": "f"}]',
        },
    ],
)  # fmt: skip
def test_tools(columns: dict) -> None:
    ((messages, _),) = read_conversations([Record(columns, "")])
    assert messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "r"},
    ]
    assert messages.tools == [TOOL]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"conversations": [{"from": "function_call", "value": "call f"}]}, "are JSON, this is not: 'call f'"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}, "a tool call without a name"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a content that is not text alone"),
        ({"messages": ["hello"]}, "not a conversation"),
    ],
)
def test_broken_conversations_name_their_place(columns: dict, message: str) -> None:
    with pytest.raises(MoaiError, match=f"a.jsonl:3: .*{message}"):
        list(read_conversations([Record(columns, "a.jsonl:3")]))


def test_unknown_shape() -> None:
    with pytest.raises(
        MoaiError, match=r"a.jsonl:3: not a conversation; it has text. Known shapes: messages; conversations"
    ):
        list(read_conversations([Record({"text": "x"}, "a.jsonl:3")]))


@pytest.mark.parametrize(
    ("name", "schema", "count"),
    [
        ("ko/ChatbotData.csv", "Q-A", 11823),
        ("sft/alpaca_en_demo.json", "alpaca", None),
        ("sft/alpaca_zh_demo.json", "alpaca", None),
        ("sft/glaive_toolcall_en_demo.json", "sharegpt", None),
        ("sft/identity.json", "alpaca", None),
        ("eval/gsm8k_test.jsonl", "question-answer", 1319),
    ],
)
def test_real_sets(name: str, schema: str, count: int | None) -> None:
    records = list(read_records([shared_data(name)]))
    assert {detect_schema(record.columns) for record in records} == {schema}
    conversations = list(read_conversations(records))
    assert len(conversations) == len(records) and (count is None or len(records) == count)


def test_columns_in_capitals() -> None:
    for columns in ({"Question": "q", "Answer": "a"}, {"QUESTION": "q", "answer": "a"}, {"q": "q", "a": "a"}):
        ((messages, _),) = read_conversations([Record(columns, "here")])
        assert [m["content"] for m in messages] == ["q", "a"]
    both = {"question": "right", "Question": "wrong", "answer": "a"}
    ((messages, _),) = read_conversations([Record(both, "here")])
    assert messages[0]["content"] == "right"
