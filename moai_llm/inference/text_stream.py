"""Tokens in, text out: never half a character, and nothing of a text that ends the answer."""

from __future__ import annotations

import codecs

from moai_llm.tokenizer import Tokenizer


class TextStream:
    """The bytes of a character may be spread over several tokens, and a stop text too: what could be the beginning of
    one is held back until it is known.

    Attributes:
        stopped: a stop text has come. What is pushed from then on is nothing.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token: int) -> str:
        return self._pass(self._decoder.decode(self.tokenizer.token_bytes(token)))

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._pass(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _pass(self, text: str) -> str:
        if self.stopped or not self.stop:
            return "" if self.stopped else text
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
