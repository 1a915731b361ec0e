"""Instruction records of any known shape to conversations: [{"role": ..., "content": ...}, ...]."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from moai_llm.data.sources import Record, Skipped
from moai_llm.runtime import MoaiError


class Messages(list[dict[str, Any]]):
    """A conversation: its messages, and in `tools` the functions the assistant may call."""

    tools: list[Any] | None = None


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
            messages = Messages(SCHEMAS[name][1](_spelt_as_here(record.columns)))
            messages.tools = _tools(record.columns.get("tools")) or None
        except (MoaiError, TypeError, AttributeError) as error:  # a list where a mapping should be
            skipped.bad(record.source, record.place, "not a conversation", f": {error}")
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


def _messages(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": str(m.get("role")), "content": _text(m.get("content")), **_calls(m.get("tool_calls"))}
        for m in columns["messages"]
    ]


def _sharegpt(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = columns.get("system")
    head = [{"role": "system", "content": system}] if system else []
    return head + [_sharegpt_turn(str(turn.get("from")), turn.get("value")) for turn in columns["conversations"]]


def _sharegpt_turn(name: str, value: Any) -> dict[str, Any]:
    if name == "function_call":  # {"name": ..., "arguments": ...} as JSON, or a list of them
        calls = _from_json(value)
        return {"role": "assistant", "content": "", **_calls(calls if isinstance(calls, list) else [calls])}
    return {"role": SHAREGPT_ROLES.get(name, name), "content": _text(value)}


def _calls(calls: Any) -> dict[str, Any]:
    """The `tool_calls` of a message, arguments as a mapping where they came as JSON text; {} where there are none."""
    made = []
    for call in _from_json(calls) or []:
        function = call.get("function") or call
        if not isinstance(function.get("name"), str):
            raise MoaiError(f"a tool call without a name, {call!r}")
        made.append({"name": function["name"], "arguments": _from_json(function.get("arguments") or {})})
    return {"tool_calls": made} if made else {}


def _tools(tools: Any) -> list[Any]:
    """The tools of a record in the usual form, {"type": "function", "function": {"name": ..., ...}}."""
    found = _from_json(tools) or []
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def _from_json(value: Any) -> Any:
    """A value that may come as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except json.JSONDecodeError:
        raise MoaiError(f"tools and tool calls are JSON, this is not: {value[:80]!r}") from None


def _alpaca(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    question = _text(columns["instruction"])
    if columns.get("input"):
        question += "\n" + _text(columns["input"])
    return _pair(question, _text(columns["output"]))


def _columns(question: str, answer: str) -> Callable[[Mapping[str, Any]], list[dict[str, Any]]]:
    return lambda columns: _pair(_text(columns[question]), _text(columns[answer]))


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(value: Any) -> str:
    if isinstance(value, list):  # [{"type": "text", "text": ...}, ...]
        if not all(isinstance(part, Mapping) and "text" in part for part in value):
            raise MoaiError("a content that is not text alone")
        return "".join(part["text"] for part in value)
    return value if isinstance(value, str) else "" if value is None else str(value)


# name -> (columns that must be there, converter); the first match wins, so the more telling shapes come first
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[dict[str, Any]]]]] = {
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
COLUMNS = tuple(dict.fromkeys((*(key for keys, _ in SCHEMAS.values() for key in keys), "input", "system", "tools")))
