"""Where source code may be cut: its whole expressions and statements, and the borders between statements.

A syntax tree is used for places in the text only. It is never a second vocabulary: no node becomes a token, and what a
model reads is the text itself. Python is parsed by the standard library; other languages by tree-sitter grammars, one
small package each (`pip install 'moai-llm[code]'`). Python that does not parse and languages nobody named have no
syntax here: `syntax_of` gives None and the callers cut at line borders. All places count characters.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moai_llm.runtime import MoaiError, did_you_mean

Span = tuple[int, int]  # [start, end) in characters

SUFFIXES = {
    "python": (".py", ".pyi", ".pyw"),
    "c": (".c", ".h"),
    "cpp": (".cc", ".cpp", ".cxx", ".hh", ".hpp"),
    "javascript": (".js", ".mjs", ".cjs", ".jsx"),
    "typescript": (".ts", ".mts", ".cts"),
    "tsx": (".tsx",),
    "java": (".java",),
    "go": (".go",),
    "rust": (".rs",),
}
_BLANK = re.compile(r"[ \t\f]*")
_LANGUAGE_OF = {suffix: language for language, suffixes in SUFFIXES.items() for suffix in suffixes}


class Syntax(NamedTuple):
    """What a parse says about a text.

    nodes: every whole expression or statement.
    runs: lists of neighbours that may be taken together, such as the statements of a block, two or more each.
    borders: start of a line -> depth, where a statement (with the comments right above it) begins. The first of a
        block is no border, since it stays with the line that opens the block. 0 is the top level.
    """

    nodes: list[Span]
    runs: list[list[Span]]
    borders: dict[int, int]


def language_of(place: str) -> str | None:
    """The language that the suffix of a file says, or of a place such as `lib/a.py:12`; None for any other."""
    found = re.search(r"(\.[A-Za-z0-9]+)(?::[^/\\]*)?$", place)
    return _LANGUAGE_OF.get(found[1].lower()) if found else None


def syntax_of(source: str, language: str | None) -> Syntax | None:
    """The syntax of a text; None without a language, and for Python that does not parse. Other parsers work around
    errors: what lies in them is left out.

    Raises:
        MoaiError: a language that is not known, or whose grammar is not installed.
    """
    if language is None:
        return None
    if check_language(language) == "python":
        from moai_llm.tokenizer.syntax_python import python_syntax

        return python_syntax(source)
    from moai_llm.tokenizer.syntax_tree_sitter import tree_sitter_syntax

    return tree_sitter_syntax(source, language)


def check_language(language: str) -> str:
    """`language`, if it is one that can be parsed here.

    Raises:
        MoaiError: it is not known.
    """
    if language not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise MoaiError(f"unknown language {language!r}{did_you_mean(language, SUFFIXES)}; known are {known}")
    return language


class Lines:
    """Places of a text: bytes of its UTF-8 to characters, and where its lines begin.

    A line ends with \\n, \\r\\n or \\r, as for Python's tokenizer and unlike str.splitlines: form feeds and the
    line separators of Unicode may stand inside a line.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.starts = [0, *(found.end() for found in re.finditer(r"\r\n?|\n", source))]  # in characters

    @cached_property
    def data(self) -> bytes:
        return self.source.encode("utf-8", "surrogatepass")

    @cached_property
    def _character(self) -> np.ndarray | None:
        """(bytes + 1,) the characters that begin before each byte; None for ASCII, where it is the same number."""
        if self.source.isascii():
            return None
        begins = (np.frombuffer(self.data, dtype=np.uint8) & 0xC0) != 0x80
        return np.concatenate([[0], np.cumsum(begins)])

    def character(self, byte: int) -> int:
        return byte if self._character is None else int(self._character[byte])

    @cached_property
    def byte_starts(self) -> list[int]:
        """Where the lines begin, in bytes."""
        return [0, *(found.end() for found in re.finditer(rb"\r\n?|\n", self.data))]

    def line(self, place: int) -> int:
        """The number of a character's line, from 0."""
        return bisect_right(self.starts, place) - 1

    def text(self, line: int) -> str:
        """A line with its end."""
        return self.source[self.starts[line] : self.starts[line + 1] if line + 1 < len(self.starts) else None]

    @cached_property
    def _first(self) -> dict[int, int]:
        """The first place of each line that is not blank -> the line's start."""
        return {_BLANK.match(self.source, start).end(): start for start in self.starts}  # type: ignore[union-attr]

    def begun_by(self, place: int) -> int | None:
        """The start of the line that `place` is the first thing on, None where something else stands before it."""
        return self._first.get(place)
