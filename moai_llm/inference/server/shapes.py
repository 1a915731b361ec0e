"""What answers look like: the objects of OpenAI's API as plain data."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from moai_llm.inference.server.text import Token, bytes_of, name_of
from moai_llm.tokenizer import Tokenizer


class Shape:
    """One kind of generation: what its whole answer and the pieces of a streamed one look like.

    Args:
        tops: how many of the likeliest tokens are reported for each; None for no log-probabilities.
    """

    prefix = whole = chunk = ""

    def __init__(self, tokenizer: Tokenizer, model: str, tops: int | None, with_usage: bool = False) -> None:
        self.tokenizer, self.tops, self.with_usage = tokenizer, tops, with_usage
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def answer(self, choices: list[dict[str, Any]], used: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.whole, "choices": choices, "usage": used}

    def piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        end = {"usage": None} if self.with_usage else {}
        return {**self.head, "object": self.chunk, "choices": [choice], **end}

    def last_piece(self, used: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.chunk, "choices": [], "usage": used}

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """A choice of a whole answer."""
        raise AssertionError("each shape has its own")

    def delta(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        """A choice of a piece."""
        raise AssertionError("each shape has its own")


class CompletionShape(Shape):
    prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": self._logprobs(tokens)}

    delta = choice

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.tops is None:
            return None
        name = lambda i: name_of(self.tokenizer, i)  # noqa: E731
        return {
            "tokens": [name(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else {name(i): value for i, value in token.top[: self.tops]}
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }


class ChatShape(Shape):
    prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def delta(self, index: int, text: str, tokens: Sequence[Token], finish: str | None) -> dict[str, Any]:
        content = {"content": text} if text else {}
        return {"index": index, "delta": content, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a choice says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if self.tops is None:
            return None
        content = [
            {**self._entry(token.id, token.logprob),
             "top_logprobs": [self._entry(i, value) for i, value in token.top[: self.tops]]}
            for token in tokens
        ]  # fmt: skip
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = bytes_of(self.tokenizer, token)
        return {"token": name_of(self.tokenizer, token), "logprob": logprob, "bytes": list(content)}


def usage(prompt: int, generated: int, cached: int) -> dict[str, Any]:
    """
    Args:
        cached: tokens of the prompt that were not computed, as an earlier answer had left them.
    """
    return {
        "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
