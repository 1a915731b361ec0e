"""Preference records of any known shape to pairs of conversations: a better and a worse answer to the same prompt."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moai_llm.data.sft.detect import broken
from moai_llm.data.sft.messages import (
    Messages,
    check_order,
    from_json,
    kind_of,
    read_tools,
    read_turn,
    read_turns,
    text_of,
)
from moai_llm.data.sft.schemas import SYSTEM, is_kto, spelt_as_here, system_of
from moai_llm.data.sources import Record, Skipped
from moai_llm.runtime import MoaiError

LISTS, TEXTS = ("conversations", "messages", "conversation"), ("prompt", "question", "instruction", "query", "질문")
PAIR_COLUMNS = ("chosen", "rejected", *TEXTS, *LISTS, "input", *SYSTEM, "tools")  # what --map can name
_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")  # transcripts as in Anthropic's hh-rlhf


class Pair(NamedTuple):
    """Two conversations that begin alike. What they share is not learned."""

    chosen: Messages
    rejected: Messages


def read_pairs(
    records: Iterable[Record], skipped: Skipped | None = None, named: Collection[str] = ()
) -> Iterator[tuple[Pair, str]]:
    """(pair, place) of every record with `chosen` and `rejected`.

    They are answers as text or as one message, below a prompt in `prompt`, `question`, `instruction` (with `input`),
    `messages` or `conversations`; or lists of messages, which may hold the prompt themselves; or transcripts with
    Human: and Assistant:.

    Args:
        skipped: where to count records that are no pairs, if it allows them.
        named: our names of columns which the user has named with --map.

    Raises:
        MoaiError: a record that is no pair.
    """
    skipped = Skipped() if skipped is None else skipped
    for record in records:
        try:
            yield read_pair(record.columns, named), record.place
        except MoaiError as error:
            skipped.add(record.source, broken(record, str(error), "not a preference pair"))


def read_pair(columns: Mapping[str, Any], named: Collection[str] = ()) -> Pair:
    """A record to a pair.

    Raises:
        MoaiError: without the place; it is none.
    """
    columns = spelt_as_here(columns)
    missing = [key for key in ("chosen", "rejected") if key not in columns]
    if missing:
        if is_kto(columns):
            raise MoaiError("answers marked good or bad one by one (KTO) are not pairs, and not read yet")
        have = ", ".join(map(str, list(columns)[:20])) or "nothing"
        raise MoaiError(
            f"no column {' and '.join(map(repr, missing))}; it has {have}. Name them, as in --map chosen=better "
            "--map rejected=worse"
        )
    chosen, rejected = (_said(columns[key], key) for key in ("chosen", "rejected"))
    if not (chosen[0]["role"] == rejected[0]["role"] and chosen[0]["role"] in ("system", "user")):
        prompt = _prompt(columns, named)
        chosen, rejected = ([*prompt, *said] for said in (chosen, rejected))
    else:
        chosen, rejected = ([*system_of(columns), *said] for said in (chosen, rejected))
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        try:
            check_order(messages)
        except MoaiError as error:
            raise MoaiError(f"{name}: {error}") from None
        if messages[-1]["role"] != "assistant":
            raise MoaiError(f"{name} does not end with an answer of the assistant")
    tools = read_tools(columns.get("tools"))
    return Pair(*_without_prompt(chosen, rejected, tools))


def _without_prompt(
    chosen: Sequence[dict[str, Any]], rejected: Sequence[dict[str, Any]], tools: list[Any] | None
) -> tuple[Messages, Messages]:
    """Both conversations; nothing is learned of what they share. Where all is shared, that is all but the answer."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not any(message["role"] == "user" for message in chosen[:shared]):
        raise MoaiError("chosen and rejected do not begin with the same question")
    made = []
    for messages in (chosen, rejected):
        held = Messages(
            {**m, "train": False} if i < shared and m["role"] == "assistant" else m for i, m in enumerate(messages)
        )
        held.tools = tools
        made.append(held)
    return made[0], made[1]


def _said(value: Any, column: str) -> list[dict[str, Any]]:
    """chosen or rejected: an answer as text, one message, a list of messages, or a transcript."""
    if isinstance(value, str):
        pieces = _SPEAKER.split(value)
        if len(pieces) > 2 and not pieces[0].strip():
            roles = {"Human": "user", "Assistant": "assistant"}
            return [{"role": roles[name], "content": text} for name, text in zip(pieces[1::2], pieces[2::2])]
        return [{"role": "assistant", "content": value}]
    if isinstance(value, Mapping):
        return [read_turn(value, f"{column!r}")[0]]
    if isinstance(value, list):
        return read_turns(value, column)
    raise MoaiError(f"{column!r} is {kind_of(value)}, not an answer")


def _prompt(columns: Mapping[str, Any], named: Collection[str]) -> list[dict[str, Any]]:
    """What stands before the answers."""
    there = [key for key in (*LISTS, *TEXTS) if key in columns]
    there = [key for key in there if key in named] or there
    if not there:
        raise MoaiError("there is no prompt before the answers; name it, as in --map prompt=question")
    if len(there) > 1:
        both = " or in ".join(map(repr, there))
        raise MoaiError(f"the prompt may lie in {both}. Say which: --map {there[0]}={there[0]}")
    value = columns[there[0]]
    if there[0] in LISTS or isinstance(value, list):
        value = from_json(value, there[0])
        turns = read_turns(value, there[0])
        return turns if turns[0]["role"] == "system" else [*system_of(columns), *turns]
    text = text_of(value, f"the {there[0]}")
    if there[0] == "instruction" and columns.get("input"):
        text += "\n" + text_of(columns["input"], "the input")
    return [*system_of(columns), {"role": "user", "content": text}]
