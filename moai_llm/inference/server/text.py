"""The tokens of one answer to text, and to the log-probabilities that go with that text."""

from __future__ import annotations

import codecs
from typing import NamedTuple

from moai_llm.inference.engine import Event
from moai_llm.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity; the API of OpenAI writes this


class Token(NamedTuple):
    """`start` counts the characters before it; `top` is (id, log-probability), the likeliest first. The first token of
    a prompt has no log-probability.
    """

    id: int
    start: int
    logprob: float | None
    top: list[tuple[int, float]]


class Piece(NamedTuple):
    text: str
    tokens: list[Token]


class Answer:
    """The engine gives text when it is certain: no half of a character, no beginning of a stop string. Tokens leave
    with the text they begin in, and those that lie in a stop string never do.

    Args:
        detailed: keep the tokens; else pieces have none.

    Attributes:
        count: tokens so far, those of a stop string included.
    """

    def __init__(self, tokenizer: Tokenizer, detailed: bool) -> None:
        self._tokenizer, self._detailed = tokenizer, detailed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._read = self._left = self.count = 0  # characters read, and those that have left
        self._waiting: list[Token] = []

    def push(self, event: Event) -> Piece:
        token = event.token
        if token is not None:
            self.count += 1
        if self._detailed and token is not None:
            bounded = [(i, max(value, LEAST)) for i, value in event.top or ()]
            logprob = LEAST if event.logprob is None else max(event.logprob, LEAST)
            self._waiting.append(Token(token, self._read, logprob, bounded))
            self._read += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
        self._left += len(event.text)
        in_stop_string = event.finished == "stop" and token is not None
        all_of_them = event.finished is not None and not in_stop_string
        tokens = [waiting for waiting in self._waiting if all_of_them or waiting.start < self._left]
        self._waiting = self._waiting[len(tokens) :]
        return Piece(event.text, tokens)


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as the API writes it; bytes that are no text by themselves as `bytes:\\xea\\xb0`."""
    content = bytes_of(tokenizer, token)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token, control tokens by their names."""
    return tokenizer.token_bytes(token) or tokenizer.decode([token]).encode("utf-8")
