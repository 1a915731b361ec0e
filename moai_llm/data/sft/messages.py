"""A conversation as we hold it, and how the messages of others become one: roles, contents, calls, weights, order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moai_llm.runtime import MoaiError, did_you_mean

CALL = "function_call"  # ShareGPT's name of a turn that holds a call as JSON
ROLES = {
    "system": "system", "developer": "system", "시스템": "system",
    "user": "user", "human": "user", "prompter": "user", "사용자": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "어시스턴트": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
    CALL: "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLS = (CALL, "tool_call")
WEIGHTS = ("weight", "train", "training")  # of a message: whether the assistant's is learned


class Messages(list[dict[str, Any]]):
    """A conversation: [{"role": ..., "content": ...}, ...], and in `tools` the functions the assistant may call.

    An assistant's message may have "tool_calls" and `"train": False`, which says that it is not learned.
    """

    tools: list[Any] | None = None

    def like(self, messages: Sequence[dict[str, Any]]) -> Messages:
        """Other messages with the same tools."""
        made = Messages(messages)
        made.tools = self.tools
        return made


def read_turns(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of {"role", "content"} or {"from", "value"}, perhaps as JSON text, to messages.

    Consecutive calls of ShareGPT, and what the assistant says right before them, become one message.

    Raises:
        MoaiError: not such a list, an unknown role, a content that is not text.
    """
    turns = from_json(value, repr(column))
    if not isinstance(turns, list):
        raise MoaiError(f"{column!r} is {kind_of(turns)}, not a list of messages")
    if not turns:
        raise MoaiError(f"{column!r} is empty")
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(turns):
        message, is_call = read_turn(turn, f"message {i}")
        last = messages[-1] if messages else {}
        if is_call and last.get("role") == "assistant":
            last["tool_calls"] = [*last.get("tool_calls", []), *message["tool_calls"]]
            last.update({key: False for key in ("train",) if key in message})
        else:
            messages.append(message)
    return messages


def read_turn(turn: Any, name: str) -> tuple[dict[str, Any], bool]:
    """(the message, whether the turn is nothing but calls); `name` is what errors call it."""
    if not isinstance(turn, Mapping):
        raise MoaiError(f"{name} is {kind_of(turn)}, not an object with a role and a content")
    given = turn.get("role") or turn.get("from")  # a table may have both columns, one of them null
    if given is None:
        raise MoaiError(f"{name} has no role; it has {', '.join(map(str, turn)) or 'nothing'}")
    role = ROLES.get(str(given).lower())
    if role is None:
        raise MoaiError(f"{name} has an unknown role {given!r}{did_you_mean(str(given), ROLES)}")
    content = turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content")
    if str(given).lower() in CALLS:
        calls = from_json(content, f"{name}, a call")
        return {"role": role, "content": "", **_calls(calls, name, needed=True), **_weight(turn, name)}, True
    calls = turn.get("tool_calls") or turn.get(CALL)
    message = {"role": role, **(_calls(calls, name) if role == "assistant" else {})}
    if content is None and (role == "tool" or "tool_calls" in message):  # a tool may return nothing
        content = ""
    message["content"] = text_of(content, f"the content of {name}")
    return {**message, **(_weight(turn, name) if role == "assistant" else {})}, False


def _weight(turn: Mapping[str, Any], name: str) -> dict[str, Any]:
    """{"train": False} where a field says that the message is not to be learned."""
    given = {key: turn[key] for key in WEIGHTS if turn.get(key) is not None}
    for key, value in given.items():
        if value not in (0, 1):  # True and False are 1 and 0
            raise MoaiError(f"{name} has {key} {value!r}: a message is learned (1) or not (0), nothing between")
    return {"train": False} if given and not all(given.values()) else {}


def _calls(value: Any, name: str, needed: bool = False) -> dict[str, Any]:
    """The `tool_calls` of a message, arguments as a mapping where they came as JSON text; {} where there are none."""
    value = from_json(value, f"the tool calls of {name}")
    made = []
    for call in [value] if isinstance(value, Mapping) else value or []:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise MoaiError(f"{name} has a tool call without a name, {call!r}")
        arguments = from_json(function.get("arguments") or {}, f"the arguments of {function['name']} in {name}")
        if not isinstance(arguments, Mapping):
            raise MoaiError(f"the arguments of {function['name']} in {name} are {kind_of(arguments)}, not an object")
        made.append({"name": function["name"], "arguments": arguments})
    if needed and not made:
        raise MoaiError(f"{name} is a call, and calls nothing")
    return {"tool_calls": made} if made else {}


def read_tools(value: Any) -> list[Any] | None:
    """The tools of a record in the usual form, {"type": "function", "function": {"name": ..., ...}}; None without."""
    tools = from_json(value, "'tools'")
    tools = [tools] if isinstance(tools, Mapping) else tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise MoaiError(f"'tools' is {kind_of(tools)}, not a list of descriptions of functions")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def from_json(value: Any, what: str) -> Any:
    """A value that may come as JSON text."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise MoaiError(f"{what}: not JSON: {value[:80]!r}") from None


def text_of(value: Any, what: str) -> str:
    """A text, or the parts [{"type": "text", "text": ...}, ...] of one."""
    if isinstance(value, list) and value:
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            raise MoaiError(f"{what} is not text alone")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise MoaiError(f"{what} is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    """What to call a value in an error."""
    if value is None:
        return "null"
    if isinstance(value, (list, str)) and not value:
        return "an empty list" if isinstance(value, list) else "empty"
    names = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    return next((name for types, name in names if isinstance(value, types)), type(value).__name__)


def check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """A system message first or none, then the user, and after each message one that can follow it.

    Raises:
        MoaiError: another order.
    """
    if not messages:
        raise MoaiError("there are no messages")
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and before is not None:
            raise MoaiError(f"message {i} is a system message, which may only stand first")
        if role == "assistant" and before in (None, "system"):
            raise MoaiError(f"message {i} is the assistant's, before any user has spoken")
        if role == "tool" and before not in ("assistant", "tool"):
            raise MoaiError(f"message {i} is a tool's result, but before it stands {_named(before)}, not a call")
        if role == before and role in ("user", "assistant"):
            raise MoaiError(f"messages {i - 1} and {i} are both the {role}'s")
        before = role


def _named(role: str | None) -> str:
    return "nothing" if role is None else f"a {role} message"
