"""A conversation as a file: one JSON object {"messages": [...]}, which `moai data prepare --chat` reads as well."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from moai_llm.data.sft import Messages
from moai_llm.data.sft.messages import check_order, read_tools, read_turns
from moai_llm.inference.chat import Chat
from moai_llm.runtime import MoaiError, write_atomically


def file_path(text: str) -> Path:
    """The file a user means: `.json` where no ending is given.

    Raises:
        MoaiError: another ending.
    """
    path = Path(text).expanduser()
    if path.suffix.lower() not in ("", ".json"):
        raise MoaiError(f"{path}: a conversation is saved as .json")
    return path if path.suffix else path.with_name(path.name + ".json")


def save(chat: Chat, path: Path, overwrite: bool = False) -> None:
    """Write the whole conversation, also what is left out of the context.

    Raises:
        MoaiError: the file is there already, or cannot be written; what was there stays.
    """
    if not chat.messages:
        raise MoaiError("there is nothing to save yet")
    if path.exists() and not overwrite:
        raise MoaiError(f"{path} is there already: name another file")
    content = {"messages": chat.messages, **({"tools": chat.tools} if chat.tools else {})}
    try:
        text = json.dumps(content, ensure_ascii=False, indent=1).encode("utf-8", "replace").decode()
        write_atomically(path, text + "\n")
    except OSError as error:
        raise MoaiError(f"{path} cannot be written: {error.strerror or error}") from None


def load(chat: Chat, path: Path) -> None:
    """Go on from a saved conversation, or from any record with `messages` or ShareGPT's `conversations`.

    Raises:
        MoaiError: it is not one; the conversation of before stays.
    """
    messages = read(path)
    try:
        chat.put(messages, messages.tools)
    except MoaiError as error:
        raise MoaiError(f"{path}: {error}") from None


def read(path: Path) -> Messages:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise MoaiError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also what is not UTF-8
        raise MoaiError(f"{path} is not a JSON file: {error}") from None
    columns = value if isinstance(value, Mapping) else {"messages": value}
    name = next((name for name in ("messages", "conversations") if name in columns), None)
    if name is None:
        raise MoaiError(f"{path} is not a conversation: it has no `messages`; /save writes one")
    try:
        messages = Messages(read_turns(columns[name], name))
        messages.tools = read_tools(columns.get("tools"))
        check_order(messages)
    except MoaiError as error:
        raise MoaiError(f"{path} is not a conversation: {error}") from None
    return messages
