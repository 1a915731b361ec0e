"""The shapes instruction records come in: which columns each needs, and how it becomes a conversation.

The table is the only place that knows the columns of other people. Detection (`detect.py`) only counts what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moai_llm.data.sft.messages import Messages, check_order, from_json, kind_of, read_tools, read_turns, text_of
from moai_llm.runtime import MoaiError

Columns = Mapping[str, Any]
SYSTEM = ("system", "system_prompt", "시스템")
KTO = ("kto_tag", "label")  # unpaired preference: is this answer good?


@dataclass(frozen=True)
class Schema:
    """One shape.

    Attributes:
        required: columns that must be there.
        optional: columns that are read where they are there.
        fits: whether the values of the required columns have the right types.
        convert: columns -> messages.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    fits: Callable[[Columns], bool]
    convert: Callable[[Columns], list[dict[str, Any]]]

    def __reduce__(self) -> tuple[Callable[[str], Schema], tuple[str]]:
        """By name, so that what was found out about a source can be told to other processes."""
        return _by_name, (self.name,)

    def has_keys(self, columns: Columns) -> bool:
        return all(key in columns for key in self.required)

    def used(self, columns: Columns) -> frozenset[str]:
        """The columns of a record that this shape reads."""
        return frozenset(key for key in (*self.required, *self.optional) if key in columns)

    def read(self, columns: Columns) -> Messages:
        """A record to a conversation; its tools too.

        Raises:
            MoaiError: it has not this shape.
        """
        for key in self.required:
            if key not in columns:
                raise MoaiError(f"no column {key!r}")
        messages = Messages([*system_of(columns), *self.convert(columns)])
        messages.tools = read_tools(columns.get("tools"))
        check_order(messages)
        return messages


def system_of(columns: Columns) -> list[dict[str, Any]]:
    """The system message of a record that keeps it in a column of its own."""
    for key in SYSTEM:
        if columns.get(key):
            return [{"role": "system", "content": text_of(columns[key], f"the {key}")}]
    return []


def pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _list(name: str, column: str, role: str, content: str) -> Schema:
    """A list of turns in one column."""

    def fits(columns: Columns) -> bool:
        try:
            turns = from_json(columns[column], column)
        except MoaiError:
            return False
        first = turns[0] if isinstance(turns, list) and turns else None
        return isinstance(first, Mapping) and first.get(role) is not None and content in first

    def convert(columns: Columns) -> list[dict[str, Any]]:
        turns = read_turns(columns[column], column)
        if turns[0]["role"] == "system" and system_of(columns):
            raise MoaiError(f"a system message in {column!r} and one in a column of its own")
        return turns

    return Schema(name, (column,), (*SYSTEM, "tools"), fits, convert)


def _flat(question: str, answer: str, context: str = "", history: str = "", name: str = "") -> Schema:
    """A question and an answer in columns of their own; `context` is written below the question."""

    def fits(columns: Columns) -> bool:
        return isinstance(columns[question], str) and isinstance(columns[answer], str)

    def convert(columns: Columns) -> list[dict[str, Any]]:
        asked = text_of(columns[question], f"the {question}")
        if context and columns.get(context):
            below = text_of(columns[context], f"the {context}")
            asked = f"{asked}\n{below}" if asked else below
        before = _history(columns.get(history), history) if history else []
        return [*before, *pair(asked, text_of(columns[answer], f"the {answer}"))]

    optional = tuple(key for key in (context, history, *SYSTEM, "tools") if key)
    return Schema(name or f"{question}-{answer}", (question, answer), optional, fits, convert)


def _history(value: Any, column: str) -> list[dict[str, Any]]:
    """Alpaca's history: [[question, answer], ...]."""
    turns = from_json(value, f"'{column}'") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise MoaiError(f"'{column}' is not a list of [question, answer]")
    return [m for asked, said in turns for m in pair(text_of(asked, "a question"), text_of(said, "an answer"))]


def _seed_task(columns: Columns) -> list[dict[str, Any]]:
    """Self-instruct: the input and the output lie in a list of instances."""
    instances = columns["instances"]
    if not isinstance(instances, list) or len(instances) != 1 or not isinstance(instances[0], Mapping):
        many = (
            f"{len(instances)} instances" if isinstance(instances, list) else f"instances that are {kind_of(instances)}"
        )
        raise MoaiError(f"{many}: a record is one conversation, write each instance as a record of its own")
    if "output" not in instances[0]:
        raise MoaiError("the instance has no output")
    return ALPACA.convert({**instances[0], "instruction": columns["instruction"]})


ALPACA = _flat("instruction", "output", "input", "history", "alpaca")
SCHEMAS: dict[str, Schema] = {
    schema.name: schema
    for schema in (
        _list("messages", "messages", "role", "content"),
        _list("messages in conversations", "conversations", "role", "content"),
        _list("messages in conversation", "conversation", "role", "content"),
        _list("sharegpt", "conversations", "from", "value"),
        _list("sharegpt in conversation", "conversation", "from", "value"),
        _list("sharegpt in messages", "messages", "from", "value"),
        _list("대화", "대화", "role", "content"),
        _list("sharegpt in 대화", "대화", "from", "value"),
        ALPACA,
        _flat("지시", "출력", "입력", name="지시-출력"),
        _flat("instruction", "response", "context"),
        _flat("question", "answer"),
        _flat("question", "response"),
        _flat("Q", "A"),
        _flat("prompt", "completion"),
        _flat("prompt", "response"),
        _flat("query", "response"),
        _flat("input", "output"),
        _flat("질문", "답변"),
        Schema(
            "self-instruct",
            ("instruction", "instances"),
            (),
            lambda columns: isinstance(columns["instruction"], str) and isinstance(columns["instances"], list),
            _seed_task,
        ),
    )
}
_KNOWN = {
    name.lower(): name
    for schema in SCHEMAS.values()
    for name in (*schema.required, *schema.optional, "chosen", "rejected", *KTO)
}
# what --map can name in conversations
COLUMNS = tuple(dict.fromkeys(name for schema in SCHEMAS.values() for name in (*schema.required, *schema.optional)))


def _by_name(name: str) -> Schema:
    return SCHEMAS[name]


def spelt_as_here(columns: Columns) -> dict[str, Any]:
    """Question -> question, q -> Q. A column that is spelt right already wins over one that is not."""
    return {**{_KNOWN.get(str(key).lower(), key): value for key, value in columns.items()}, **columns}


def is_preference(columns: Columns) -> bool:
    return "chosen" in columns and "rejected" in columns


def is_kto(columns: Columns) -> bool:
    """An answer with a mark of true or false. A label of another type is the topic of something else."""
    return any(isinstance(columns.get(key), bool) for key in KTO)
