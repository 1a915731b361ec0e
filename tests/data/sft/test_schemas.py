"""Records of every shape become conversations, and the shape of a source is found once and held to."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from moai_llm.data.sft import COLUMNS, SCHEMAS, detect, read_conversations
from moai_llm.data.sources import Record, Skipped, read_records
from moai_llm.runtime import MoaiError

PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
SHAPES: dict[str, dict[str, Any]] = {
    "messages": {"messages": PAIR, "prompt_id": "x", "prompt": "q"},
    "messages in conversations": {"conversations": PAIR},
    "messages in conversation": {"conversation": PAIR},
    "sharegpt": {"id": 1, "conversations": SHAREGPT},
    "sharegpt in conversation": {"conversation": SHAREGPT},
    "sharegpt in messages": {"messages": SHAREGPT},
    "대화": {"대화": [{"role": "사용자", "content": "q"}, {"role": "어시스턴트", "content": "a"}]},
    "sharegpt in 대화": {"대화": SHAREGPT},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "text": "whole"},
    "지시-출력": {"지시": "q", "입력": "", "출력": "a"},
    "instruction-response": {"instruction": "q", "context": "", "response": "a", "category": "x"},
    "question-answer": {"question": "q", "answer": "a", "url": "x"},
    "question-response": {"id": "1", "system_prompt": "", "question": "q", "response": "a"},
    "Q-A": {"Q": "q", "A": "a", "label": "0"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "prompt-response": {"prompt": "q", "response": "a"},
    "query-response": {"query": "q", "response": "a"},
    "input-output": {"input": "q", "output": "a"},
    "질문-답변": {"질문": "q", "답변": "a"},
    "self-instruct": {"instruction": "q", "instances": [{"input": "", "output": "a"}], "name": "n"},
}


def read(*rows: dict[str, Any], named: tuple[str, ...] = ()) -> list[list[dict[str, Any]]]:
    records = [Record(row, f"a.jsonl:{i}", "a.jsonl") for i, row in enumerate(rows, 1)]
    return [messages for messages, _ in read_conversations(records, named=named)]


def test_every_shape_is_tested() -> None:
    assert set(SHAPES) == set(SCHEMAS)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    detected = detect([Record(SHAPES[name], "here")])
    assert detected.kind == "chat" and detected.schema is SCHEMAS[name] and detected.fitting == detected.rows == 1
    assert read(SHAPES[name]) == [PAIR]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "q", "input": "more", "output": "a"}, ["q\nmore", "a"]),
        ({"instruction": "q", "context": "more", "response": "a"}, ["q\nmore", "a"]),
        ({"지시": "q", "입력": "more", "출력": "a"}, ["q\nmore", "a"]),
        ({"instruction": "", "input": "more", "output": "a"}, ["more", "a"]),
        ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, ["q0", "a0", "q", "a"]),
        ({"instruction": "q", "output": "a", "history": [], "system": "s"}, ["s", "q", "a"]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ["s", "q", "a"]),
        ({"conversations": SHAREGPT, "system": "s"}, ["s", "q", "a"]),
        ({"conversations": json.dumps(SHAREGPT)}, ["q", "a"]),  # as a CSV file holds it
        ({"messages": [{"role": "developer", "content": "s"}, *PAIR]}, ["s", "q", "a"]),
        ({"instruction": "q", "instances": [{"input": "more", "output": "a"}]}, ["q\nmore", "a"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                          PAIR[1]]},
            ["q!", "a"],
        ),
        ({"Question": "q", "Answer": "a"}, ["q", "a"]),
        ({"QUESTION": "q", "answer": "a"}, ["q", "a"]),
        ({"q": "q", "a": "a"}, ["q", "a"]),
        ({"question": "q", "Question": "wrong", "answer": "a"}, ["q", "a"]),
    ],
)  # fmt: skip
def test_optional_columns_and_spellings(row: dict[str, Any], expected: list[str]) -> None:
    (messages,) = read(row)
    assert [m["content"] for m in messages] == expected


CALL = {"name": "f", "arguments": {"x": 1}}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL_TEXT = '{"name": "f", "arguments": {"x": 1}}'
CALLED = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "r"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    "columns",
    [
        {  # OpenAI's: arguments as JSON text, content null
            "messages": [
                PAIR[0],
                {"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ]},
                {"role": "tool", "content": "r", "tool_call_id": "1"}, PAIR[1],
            ],
            "tools": [TOOL],
        },
        {  # OpenAI's before: one function_call, arguments as an object, no content at all
            "messages": [PAIR[0], {"role": "assistant", "function_call": CALL}, {"role": "function", "content": "r"},
                         PAIR[1]],
            "tools": {"name": "f"},
        },
        {  # ShareGPT's: everything as JSON text
            "conversations": [SHAREGPT[0], {"from": "function_call", "value": CALL_TEXT},
                              {"from": "observation", "value": "r"}, SHAREGPT[1]],
            "tools": '[{"name": "f"}]',
        },
    ],
)  # fmt: skip
def test_tools(columns: dict[str, Any]) -> None:
    ((messages, _),) = read_conversations([Record(columns, "")])
    assert messages == CALLED and messages.tools == [TOOL]


def test_calls_that_follow_each_other_are_one_message() -> None:
    turns = [SHAREGPT[0], {"from": "gpt", "value": "I look"}, {"from": "function_call", "value": CALL_TEXT}]
    turns += [turns[-1], {"from": "observation", "value": None}, SHAREGPT[1]]
    (messages,) = read({"conversations": turns, "tools": ""})
    assert messages[1] == {"role": "assistant", "content": "I look", "tool_calls": [CALL, CALL]}
    assert messages[2] == {"role": "tool", "content": ""} and messages.tools is None  # type: ignore[attr-defined]


def test_weights() -> None:
    for field, value in (("weight", 0), ("weight", 0.0), ("train", False), ("training", False)):
        (messages,) = read({"messages": [PAIR[0], {**PAIR[1], field: value}]})
        assert messages[1] == {**PAIR[1], "train": False}
        turns = [{"from": "human", "value": "q", field: value}, {"from": "gpt", "value": "a", field: 1}]
        assert read({"conversations": turns}) == [PAIR]
    assert read({"messages": [PAIR[0], {**PAIR[1], "weight": None}]}) == [PAIR]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a", "prompt": "p", "completion": "c"},
         "may lie in 'question' and 'answer', or in 'prompt' and 'completion'. "
         "Say which: --map question=question --map answer=answer for the first"),
        ({"instruction": "q", "output": "a", "response": "b"}, "--map instruction=instruction --map output=output"),
        ({"messages": PAIR, "질문": "q", "답변": "a"}, "may lie in 'messages', or in '질문' and '답변'"),
        ({"messages": PAIR, "conversations": SHAREGPT}, "--map messages=messages"),
    ],
)  # fmt: skip
def test_two_shapes_at_once_are_an_error_that_map_settles(row: dict[str, Any], message: str) -> None:
    with pytest.raises(MoaiError, match="a.jsonl:1: the conversations may lie") as error:
        read(row)
    assert message in str(error.value)
    with pytest.raises(MoaiError):  # no record is at fault, so skipping would lose them all
        list(read_conversations([Record(row, "")], Skipped(allow_bad=True)))
    first = str(error.value).split("--map ")[1:]
    named = tuple(pair.split("=")[0] for pair in first)
    assert len(read(row, named=named)) == 1  # what the error advises works


def test_a_column_that_says_more_decides() -> None:
    """The control of ambiguity: a shape that reads the same columns and more is no rival."""
    assert detect([Record({"instruction": "q", "input": "i", "output": "a"}, "")]).schema is SCHEMAS["alpaca"]
    assert detect([Record({"input": "i", "output": "a", "instruction": None}, "")]).schema is SCHEMAS["input-output"]


def test_the_most_frequent_shape_of_a_source_holds() -> None:
    good, other = SHAPES["question-answer"], SHAPES["alpaca"]
    records = [Record(row, f"a:{i}", "a") for i, row in enumerate([other, good, good, {"question": 1, "answer": "a"}])]
    assert detect(records) == ("chat", SCHEMAS["question-answer"], 4, 2)
    skipped = Skipped(allow_bad=True)
    assert len(list(read_conversations(records, skipped))) == 2
    assert skipped.bad_count == 2 and {row.example for row in skipped.broken()} == {
        "a:0: not a conversation: no column 'question' and 'answer', which this source has (question-answer); it has "
        "instruction, input, output, text, which looks like alpaca",
        "a:3: not a conversation: the question is a number, not text",
    }
    assert [m for m, _ in read_conversations([Record(good, "", "a"), Record(other, "", "b")])] == [PAIR, PAIR]


def test_detection_looks_at_a_thousand_records_and_reads_on() -> None:
    taken = []

    def records() -> Any:
        for i in range(3000):
            taken.append(i)
            yield Record(SHAPES["Q-A"], str(i), "a")

    conversations = read_conversations(records())
    next(conversations)
    assert len(taken) == 1000
    assert sum(1 for _ in conversations) == 2999
    taken.clear()
    large = (Record({"Q": "q" * (1 << 20), "A": "a"}, str(i), "a") for i in range(3000) if taken.append(i) is None)  # type: ignore[func-returns-value]
    next(read_conversations(large))
    assert len(taken) == 16  # memory is bounded, whatever a record's size


def test_a_shape_that_is_known_is_held_to() -> None:
    """A part of a source, alone with a broken record, is read as the whole is."""
    whole = detect([Record(SHAPES["alpaca"], "a:1", "a")])
    shapes = {"a": pickle.loads(pickle.dumps(whole))}
    assert shapes["a"].schema is SCHEMAS["alpaca"]
    row = Record({"instruction": "q", "response": "a"}, "a:2", "a")
    assert len(list(read_conversations([row]))) == 1
    with pytest.raises(MoaiError, match="a:2: .*no column 'output'"):
        list(read_conversations([row], shapes=shapes))
    list(read_conversations([row._replace(source="b")], shapes=shapes))
    assert shapes["b"].schema is SCHEMAS["instruction-response"]


def test_rows_of_a_table_with_the_columns_of_both_lists() -> None:
    turns = [{"role": None, "content": None, "from": s["from"], "value": s["value"], "weight": None} for s in SHAREGPT]
    assert read({"messages": turns}) == [PAIR] and detect([Record({"messages": turns}, "")]).schema is not None


def test_columns_that_the_user_names() -> None:
    row = {"question": "q", "answer": "a", "response": "b"}
    with pytest.raises(MoaiError, match="--map answer=answer"):
        read(row)
    assert read(row, named=("answer",)) == [PAIR]
    with pytest.raises(MoaiError, match="no shape of conversations has question and output together"):
        read(row, named=("question", "output"))
    assert {"question", "answer", "messages", "system", "tools", "input", "질문", "대화"} <= set(COLUMNS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]}, "it with --preference"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--map question=prompt --map answer=chosen"),
        ({"messages": PAIR, "label": True}, r"good or bad \(KTO\): to learn them all"),
        ({"messages": PAIR, "kto_tag": False}, "as in --map messages=messages"),
    ],
)  # fmt: skip
def test_preference_data_are_no_conversations(row: dict[str, Any], message: str) -> None:
    for skipped in (None, Skipped(allow_bad=True)):
        with pytest.raises(MoaiError, match=f"^here: .*{message}"):
            list(read_conversations([Record(row, "here")], skipped))
    if "messages" in row:
        assert read(row, named=("messages",)) == [PAIR]


def test_records_of_no_shape(tmp_path: Any) -> None:
    with pytest.raises(MoaiError, match=r"a.jsonl:1: not a conversation: it has text. Known shapes: messages; conv"):
        read({"text": "x"})
    with pytest.raises(MoaiError, match="If the conversations lie within 'questions', write each as a JSON line"):
        read({"uid": 1, "questions": [{"question": "q", "answer": "a"}]})
    file = tmp_path / "a.csv"
    file.write_text("id,conversations\n1," + '"' + json.dumps(SHAREGPT).replace('"', '""') + '"\n')
    assert [m for m, _ in read_conversations(read_records([file]))] == [PAIR]
