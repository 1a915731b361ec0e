"""A rendered conversation to ids, where some of its text becomes no control token whatever it says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import tokenizers

from moai_llm.runtime import MoaiError

Span = tuple[int, int]  # characters [start, end)
FILLER = "\ue000"  # of Unicode's private use: in no token's string


class Content(NamedTuple):
    """Where a message's string stands in the rendered text, and whether the assistant wrote it."""

    start: int
    end: int
    said: bool


class Encoder:
    """A tokenizer that tells the characters each token stands for, and can leave its control tokens out.

    Args:
        written: what a chat template writes. An added token that is not special counts as a control token where it
            stands in there, as `<tool_call>` does: the assistant may say it, but nobody else.
    """

    def __init__(self, backend: tokenizers.Tokenizer, written: str = "") -> None:
        self._spec = {
            **json.loads(backend.to_str()),
            "post_processor": None,  # it may add a second BOS, and moves offsets
            "truncation": None,
            "padding": None,
        }
        # SentencePiece's space stands before a whole text, not before each piece of it
        self._space_at_start_only = '"prepend_scheme": "first"' in json.dumps(self._spec["pre_tokenizer"])
        added = backend.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        named = {i: t.content for i, t in added.items() if t.content in written and not t.content.isspace()}
        self.control = {**named, **self.special}

    @cached_property
    def marked(self) -> tokenizers.Tokenizer:
        """Strings of control tokens become control tokens."""
        return tokenizers.Tokenizer.from_str(json.dumps(self._spec))

    @cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """Strings of special tokens stay text; other added tokens are found."""
        backend = tokenizers.Tokenizer.from_str(json.dumps(self._spec))
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def bare(self) -> tokenizers.Tokenizer:
        """All is text."""
        return tokenizers.Tokenizer.from_str(json.dumps({**self._spec, "added_tokens": []}))

    def encode(self, text: str, contents: Sequence[Content] = ()) -> tuple[list[int], list[Span]]:
        """Ids of a text and the characters each stands for. No control token comes out of `contents`, which are in
        order.

        Raises:
            MoaiError: this tokenizer's plain text holds control tokens.
        """
        if not contents:
            return _run(self.marked, text)
        rest, place = [], 0  # the template's own text, and as much of anything else between
        for content in contents:
            rest += [text[place : content.start], re.sub(r"\S", FILLER, text[content.start : content.end])]
            place = content.end
        found = zip(*_run(self.marked, "".join([*rest, text[place:]])))
        ids: list[int] = []
        places: list[Span] = []
        start = 0
        for control, span in [*((i, span) for i, span in found if i in self.control), (-1, (len(text), len(text)))]:
            if start < span[0]:
                more, where = self._between(text, start, span[0], contents)
                ids += more
                places += where
            if control >= 0:
                ids.append(control)
                places.append(span)
            start = span[1]
        return ids, places

    def _between(self, text: str, start: int, end: int, contents: Sequence[Content]) -> tuple[list[int], list[Span]]:
        """Text between two control tokens of the template."""
        only_said = all(content.said for content in contents if content.start < end and start < content.end)
        forbidden = self.special if only_said else self.control
        lead = "\n" if start and self._space_at_start_only else ""
        for backend in (self.plain, self.bare):
            skip = len(backend.encode(lead, add_special_tokens=False).ids)
            ids, places = _run(backend, lead + text[start:end], start - len(lead))
            if forbidden.keys().isdisjoint(ids[skip:]):
                return ids[skip:], places[skip:]
        raise MoaiError(
            "this tokenizer makes a control token from plain text, so a message that holds one cannot be kept as text: "
            f"{text[start:end]!r}"
        )

    def dangerous(self, strings: Iterable[tuple[str, bool]]) -> list[str]:
        """Those of the strings of a conversation, each with whether the assistant says it, that would become control
        tokens, alone or because one ends with the beginning of a token and another begins with its end.
        """
        found: list[str] = []
        endings: dict[str, str] = {}
        beginnings: dict[str, str] = {}
        heads, tails = self._halves
        normalizer = self.marked.normalizer
        for string, said in strings:
            pattern = self._special_pattern if said else self._control_pattern
            normal = string if normalizer is None else normalizer.normalize_str(string)
            if pattern.search(string) or pattern.search(normal):
                found.append(string)
            for k in range(1, self._longest):
                if string[-k:] in heads:
                    endings[string[-k:]] = string
                if string[:k] in tails:
                    beginnings[string[:k]] = string
        for head, first in endings.items():
            for tail, second in beginnings.items():
                if head + tail in self._names:
                    found += [first, second]
        return list(dict.fromkeys(found))

    def first_control(self, strings: Iterable[str]) -> str:
        """The first control token's string in some strings; the first string where no token is whole."""
        strings = list(strings)
        return next((match[0] for match in map(self._control_pattern.search, strings) if match), strings[0])

    @cached_property
    def _names(self) -> set[str]:
        return set(self.control.values())

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._names), default=0)

    @cached_property
    def _halves(self) -> tuple[set[str], set[str]]:
        """Every beginning and every end of a control token's string."""
        cuts = [(name, k) for name in self._names for k in range(1, len(name))]
        return {name[:k] for name, k in cuts}, {name[k:] for name, k in cuts}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return _any_of(self.special.values())

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return _any_of(self._names)


def valid(text: str) -> str:
    """A text without lone surrogates, which become U+FFFD as in `Tokenizer.encode`."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def covered(places: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """For each token, in order, whether it holds a character of a span; spans are in order and apart."""
    learn, k = [], 0
    for start, end in places:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        learn.append(k < len(spans) and start < spans[k][1] and spans[k][0] < end)
    return learn


def _run(backend: tokenizers.Tokenizer, text: str, shift: int = 0) -> tuple[list[int], list[Span]]:
    """(ids, characters of each)."""
    encoded = backend.encode(text, add_special_tokens=False)
    return encoded.ids, [(start + shift, end + shift) for start, end in encoded.offsets]


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
