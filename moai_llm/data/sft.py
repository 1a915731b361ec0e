"""Instruction records of any known shape to conversations: [{"role": ..., "content": ...}, ...]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moai_llm.data.sources import Record, Skipped

Messages = list[dict[str, str]]
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
                  "tool": "tool", "function": "tool", "observation": "tool"}  # fmt: skip


def read_conversations(records: Iterable[Record], skipped: Skipped | None = None) -> Iterator[tuple[Messages, str]]:
    """(messages, place) of every record.

    Args:
        skipped: where to count records that are no conversations, if it allows them.

    Raises:
        MoaiError: a record of no known shape.
    """
    skipped = Skipped() if skipped is None else skipped
    for record in records:
        name = detect_schema(record.columns)
        if name is None:
            have = ", ".join(map(str, record.columns))
            shapes = "; ".join("+".join(keys) for keys, _ in SCHEMAS.values())
            detail = f"; it has {have}. Known shapes: {shapes}"
            skipped.bad(record.source, record.place, "not a conversation", detail)
            continue
        try:
            messages = SCHEMAS[name][1](_spelt_as_here(record.columns))
        except (AttributeError, TypeError, KeyError):
            detail = f": the {SCHEMAS[name][0][0]} are not a list of objects"
            skipped.bad(record.source, record.place, "not a conversation", detail)
            continue
        yield messages, record.place


def detect_schema(columns: Mapping[str, Any]) -> str | None:
    """The first schema whose columns are all there, in capitals or not."""
    columns = _spelt_as_here(columns)
    return next((name for name, (keys, _) in SCHEMAS.items() if all(key in columns for key in keys)), None)


def _spelt_as_here(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Question -> question, q -> Q. A column that is spelt right already wins over one that is not."""
    known = {name.lower(): name for keys, _ in SCHEMAS.values() for name in (*keys, "input", "system")}
    return {**{known.get(str(key).lower(), key): value for key, value in columns.items()}, **columns}


def _messages(columns: Mapping[str, Any]) -> Messages:
    return [{"role": str(m.get("role")), "content": _text(m.get("content"))} for m in columns["messages"]]


def _sharegpt(columns: Mapping[str, Any]) -> Messages:
    system = columns.get("system")
    head = [{"role": "system", "content": system}] if system else []
    return head + [
        {"role": SHAREGPT_ROLES.get(turn.get("from"), str(turn.get("from"))), "content": _text(turn.get("value"))}
        for turn in columns["conversations"]
    ]


def _alpaca(columns: Mapping[str, Any]) -> Messages:
    question = _text(columns["instruction"])
    if columns.get("input"):
        question += "\n" + _text(columns["input"])
    return _pair(question, _text(columns["output"]))


def _columns(question: str, answer: str) -> Callable[[Mapping[str, Any]], Messages]:
    return lambda columns: _pair(_text(columns[question]), _text(columns[answer]))


def _pair(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


# name -> (columns that must be there, converter); the first match wins, so the more telling shapes come first
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Messages]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    **{
        f"{question}-{answer}": ((question, answer), _columns(question, answer))
        for question, answer in (
            ("instruction", "response"), ("question", "answer"), ("Q", "A"), ("prompt", "completion"),
            ("prompt", "response"), ("query", "response"), ("질문", "답변"),
        )
    },
}  # fmt: skip
# what --map can name in conversations
COLUMNS = tuple(dict.fromkeys((*(key for keys, _ in SCHEMAS.values() for key in keys), "input", "system")))
