"""A conversation to token ids and the mask of what is learned: which answers, and what to do with one too long.

The mask of `tokenizer.chat.render` has one run for each thing the assistant says, its end of turn included, since a
header that is not learned stands before each. Answers that are not to be learned are struck out run by run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from moai_llm.data.sft.messages import Messages
from moai_llm.data.sft.pairs import Pair
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import Rendered, render

Conversation = Sequence[dict[str, Any]]
NO_ANSWER = "no assistant turn"
BY_TEMPLATE = "nothing to learn by the chat template"


@dataclass(frozen=True)
class ChatOptions:
    """What to learn of conversations.

    Args:
        learn: every answer of the assistant, or only the last.
        max_length: tokens that a conversation may have; None for any number.
        truncate: what happens to a longer one: it is dropped (`drop`), loses its end (`end`), or its oldest turns, each
            a question with all that answers it, but not its system message (`turns`). One whose last turn is too long
            by itself is then dropped.
    """

    learn: Literal["all", "last"] = "all"
    max_length: int | None = None
    truncate: Literal["drop", "end", "turns"] = "drop"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise MoaiError(f"a conversation needs two tokens at least, and the longest may have {self.max_length}")


class Encoded(NamedTuple):
    """`cut` says that something is missing; `text_bytes` counts the texts that are there, in UTF-8."""

    ids: list[int]
    learn: list[bool]
    text_bytes: int
    cut: bool


class Dropped(Exception):
    """A conversation from which nothing can be learned. It is counted by this reason."""


def encode_record(tokenizer: Tokenizer, record: Messages | Pair, options: ChatOptions | None = None) -> list[Encoded]:
    """The documents of a record: one of a conversation, two of a preference pair, the better answer first.

    Raises:
        Dropped: nothing to learn, too long, or a pair of equals.
        MoaiError: the template has no form for it.
    """
    options = options or ChatOptions()
    if not isinstance(record, Pair):
        return [encode_conversation(tokenizer, record, options)]
    if list(record.chosen) == list(record.rejected):
        raise Dropped("chosen and rejected are the same")
    better, worse = made = _encode(tokenizer, record, options)
    if better.ids == worse.ids:
        raise Dropped("chosen and rejected are the same in what is left of them")
    shared = min(one.learn.index(True) for one in made)
    if better.ids[:shared] != worse.ids[:shared]:
        raise MoaiError("the chat template writes the prompt of chosen and rejected differently")
    return made


def encode_conversation(tokenizer: Tokenizer, messages: Conversation, options: ChatOptions | None = None) -> Encoded:
    """Token ids and mask of a conversation by the tokenizer's chat template.

    Raises:
        Dropped: nothing to learn, or too long.
        MoaiError: the template has no form for it.
    """
    return _encode(tokenizer, [messages], options or ChatOptions())[0]


def refuse_all_dropped(read: int, dropped: Counter[str]) -> None:
    """Raises `MoaiError` where conversations were read and none is left."""
    if not read or dropped.total() < read:
        return
    if dropped[NO_ANSWER] == read:
        raise MoaiError(f"none of the {read} conversations has an assistant turn to learn from")
    if dropped[NO_ANSWER] + dropped[BY_TEMPLATE] == read:
        raise MoaiError(
            f"the chat template leaves nothing to learn in any of the {read} conversations: look at one with "
            "`moai tokenizer template`"
        )
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    raise MoaiError(f"none of the {read:,} conversations is left: {reasons}")


def _encode(tokenizer: Tokenizer, several: Sequence[Conversation], options: ChatOptions) -> list[Encoded]:
    """Conversations that share a prompt, cut at the same place."""
    limit = options.max_length
    for messages in several:
        _refuse_empty(messages, options)
    rendered = [_rendered(tokenizer, messages, options) for messages in several]
    if not all(any(one.learn[1:]) for one in rendered):  # the first token of a row is never a target
        raise Dropped(BY_TEMPLATE)
    cut = limit is not None and any(len(one.ids) > limit for one in rendered)
    if cut and options.truncate == "drop":
        raise Dropped(f"longer than {limit} tokens")
    if cut and options.truncate == "turns":
        several = _newest_turns(tokenizer, several, options, limit or 0)
        rendered = [_rendered(tokenizer, messages, options) for messages in several]
    if cut and options.truncate == "end":
        rendered = [Rendered(one.ids[:limit], one.learn[:limit]) for one in rendered]
    if not all(any(one.learn[1:]) for one in rendered):
        raise Dropped(f"nothing to learn within {limit} tokens")
    return [Encoded(*one, _text_bytes(messages), cut) for one, messages in zip(rendered, several)]


def _refuse_empty(messages: Conversation, options: ChatOptions) -> None:
    answers = [m for m in messages if m["role"] == "assistant"]
    spoken = sum(bool(m["content"].strip() or m.get("tool_calls")) for m in answers)
    if not spoken:
        raise Dropped(NO_ANSWER)
    if spoken < len(answers):
        raise Dropped("an empty answer")
    if not all(m["content"].strip() for m in messages if m["role"] == "user"):
        raise Dropped("an empty question")
    if not _wanted(messages, options.learn):
        raise Dropped("no answer to be learned (weight 0)")


def _text_bytes(messages: Conversation) -> int:
    return sum(len(m["content"].encode("utf-8", "replace")) for m in messages)


def _wanted(messages: Conversation, learn: str) -> list[int]:
    """Which answers are learned, counted from the first answer."""
    answers = [m.get("train", True) for m in messages if m["role"] == "assistant"]
    return [i for i, wanted in enumerate(answers) if wanted and (learn == "all" or i == len(answers) - 1)]


def _rendered(tokenizer: Tokenizer, messages: Conversation, options: ChatOptions) -> Rendered:
    """`render`, with only the answers in the mask that are wanted."""
    plain = [{key: value for key, value in m.items() if key != "train"} for m in messages]
    rendered = render(tokenizer, plain, tools=getattr(messages, "tools", None))
    answers, wanted = sum(m["role"] == "assistant" for m in messages), _wanted(messages, options.learn)
    if len(wanted) == answers or not any(rendered.learn):
        return rendered
    mask = np.asarray(rendered.learn, dtype=np.int8)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).reshape(-1, 2)
    if len(edges) != answers:
        raise MoaiError(
            f"the chat template marks {len(edges)} stretches for {answers} answers, so that one answer cannot be "
            "chosen from the others"
        )
    chosen = np.zeros(len(mask), dtype=bool)
    for i in wanted:
        chosen[edges[i, 0] : edges[i, 1]] = True
    return Rendered(rendered.ids, chosen.tolist())


def _newest_turns(
    tokenizer: Tokenizer, several: Sequence[Conversation], options: ChatOptions, limit: int
) -> list[Messages]:
    """Conversations that share a prompt, each with as many of its newest turns as fit, behind the system message.

    Only what all of them share is left out, and never the question before the first answer that differs.
    """
    first = several[0]
    head = [m for m in first[:1] if m["role"] == "system"]
    shared = next((i for i, row in enumerate(zip(*several)) if any(m != row[0] for m in row)), min(map(len, several)))
    last = max((i for i, m in enumerate(first) if m["role"] == "assistant" and i <= shared), default=0)
    starts = [i for i, m in enumerate(first) if m["role"] == "user" and i <= last] or [len(head)]

    def attempt(turns_left_out: int) -> list[Messages]:
        made = []
        for messages in several:
            kept = Messages([*head, *messages[starts[turns_left_out] :]])
            kept.tools = getattr(messages, "tools", None)
            made.append(kept)
        return made

    def fits(turns_left_out: int) -> bool:
        return all(len(_rendered(tokenizer, kept, options).ids) <= limit for kept in attempt(turns_left_out))

    left_out = bisect_left(range(len(starts)), True, key=fits)  # the fewer turns, the shorter
    if left_out == len(starts):
        raise Dropped(f"the last turn alone is longer than {limit} tokens")
    return attempt(left_out)
