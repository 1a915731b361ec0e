"""Conversations to tokens: ids and the mask of what the model should learn to say, from one function for training and
chat.

A conversation is encoded segment by segment. Role headers and ends are control tokens placed by id; whatever a person
or a model wrote is encoded as ordinary text, so nobody can write a control token into a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.load import TURN_END, TURN_START, Tokenizer

ROLES = ("system", "user", "assistant", "tool")

# The same rendering for transformers: `apply_chat_template` of the saved tokenizer gives the same text and mask.
CHATML_JINJA = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class Rendered(NamedTuple):
    """`learn` is true where the token is one the assistant says, its end of turn included."""

    ids: list[int]
    learn: list[bool]


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
) -> Rendered:
    """Encode a conversation in ChatML.

    Args:
        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]
        add_generation_prompt: end with the header of an assistant turn, for the model to go on.

    Raises:
        MoaiError: an unknown role, a missing key, or a tokenizer without chat tokens.
    """
    start, end = _turn_tokens(tokenizer)
    newline = tokenizer.encode("\n")
    ids: list[int] = []
    learn: list[bool] = []

    def put(tokens: list[int], wanted: bool) -> None:
        ids.extend(tokens)
        learn.extend([wanted] * len(tokens))

    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise MoaiError(
                f"message {i} must have a role of {', '.join(ROLES)} and a text content, got {dict(message)!r}"
            )
        put([start, *tokenizer.encode(role + "\n")], False)
        put([*tokenizer.encode(content), end], role == "assistant")
        put(newline, False)
    if add_generation_prompt:
        put([start, *tokenizer.encode("assistant\n")], False)
    return Rendered(ids, learn)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the control tokens of a conversation."""
    return {TURN_START, TURN_END} <= set(tokenizer.special_ids)


def _turn_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    if not can_chat(tokenizer):
        raise MoaiError(
            f"this tokenizer has no {TURN_START} and {TURN_END}, so it cannot hold a conversation; "
            "train one with `moai tokenizer train`"
        )
    return tokenizer.special_ids[TURN_START], tokenizer.special_ids[TURN_END]
