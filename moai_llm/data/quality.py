"""Is a document worth learning from? Rules with names; each says of one measure of a text where its limit lies.

After Gopher (arXiv 2112.11446, appendix A.1.1 and table A1) and C4 (arXiv 1910.10683, section 2.2); for source code
after Codex (arXiv 2107.03374, section 3.1). A rule is named as its limit in the YAML, and None switches it off.
`BREAKS` is the whole list, in the order in which they are asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from moai_llm.data.language import habits_of
from moai_llm.data.repetition import Repetitions, duplicate_share
from moai_llm.data.units import code_points, tables

TERMINAL = tuple(".!?。！？…．｡\"'”’」』）)")
_BULLETS = ("-", "*", "•", "●", "○", "■", "▪", "‣", "·", "–", "※", "▶", "►")
_SENTENCE_END = re.compile(r"[.!?…]+(?=\s|$|[\"'”’)])|[。！？｡．]+")
_SYMBOLS = re.compile(r"#|\.\.\.|…")
_PARAGRAPHS = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Rules:
    """Limits. Shares lie between 0 and 1; None switches a rule off.

    The words of a text without spaces are its letters over a number that depends on the language, see `Habits`.
    """

    # Gopher, quality
    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word: float | None = 3.0  # characters
    max_mean_word: float | None = 10.0
    max_symbols: float | None = 0.1  # `#` and `...`, each over the words
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic_words: float | None = 0.8
    min_stop_words: int | None = 2  # different ones; nothing is asked of a language without a list
    # Gopher, repetition
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_characters: float | None = 0.2
    max_top_grams: Mapping[int, float] | None = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})
    max_duplicate_grams: Mapping[int, float] | None = field(
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
    )
    # C4, documents
    no_lorem_ipsum: bool | None = True
    no_curly_bracket: bool | None = None
    min_sentences: int | None = None
    min_terminal_lines: float | None = None  # share of the lines that end as a sentence does
    # source code
    max_line: int | None = 1000
    max_mean_line: float | None = 100.0
    min_alphanumeric: float | None = 0.25


_PROSE_ONLY_SPACED = {"min_mean_word": None, "max_mean_word": None, "min_alphabetic_words": None}
BY_LANGUAGE: dict[str, dict[str, Any]] = {
    "ko": {"min_mean_word": 1.5, "max_mean_word": 8.0},
    "ja": _PROSE_ONLY_SPACED,
    "zh": _PROSE_ONLY_SPACED,
    "th": _PROSE_ONLY_SPACED,
}
CODE_RULES = ("max_line", "max_mean_line", "min_alphanumeric")


class Facts:
    """The measures of one text, each taken when a rule first asks for it."""

    def __init__(self, text: str, language: str) -> None:
        self.text, self.habits = text, habits_of(language)

    @cached_property
    def pieces(self) -> list[str]:
        return self.text.split()

    @cached_property
    def letters(self) -> int:
        """Characters of words."""
        return int((tables()[0][code_points(self.text)] != 0).sum())

    @cached_property
    def words(self) -> int:
        a_word = self.habits.letters_a_word
        return self.letters // a_word if a_word else len(self.pieces)

    @cached_property
    def mean_word(self) -> float:
        return sum(map(len, self.pieces)) / max(1, len(self.pieces))

    @cached_property
    def symbols(self) -> float:
        """The commoner of `#` and the ellipsis, over the words."""
        found = _SYMBOLS.findall(self.text)
        hashes = found.count("#")
        return max(hashes, len(found) - hashes) / max(1, self.words)

    @cached_property
    def lines(self) -> list[str]:
        return [line for raw in self.text.split("\n") if (line := raw.strip())]

    def share_of_lines(self, holds: Callable[[str], bool]) -> float:
        return sum(map(holds, self.lines)) / max(1, len(self.lines))

    @cached_property
    def alphabetic_words(self) -> float:
        return sum(any(map(str.isalpha, piece)) for piece in self.pieces) / max(1, len(self.pieces))

    @cached_property
    def stop_words(self) -> int:
        """How many different stop words (or endings) stand in the text."""
        stop, text = self.habits.stop, self.text.lower()
        if self.habits.letters_a_word:
            return sum(word in text for word in stop)
        words = {piece.strip(".,;:!?\"'()[]…“”‘’。、") for piece in text.split()}
        if self.habits.endings:
            return sum(any(word.endswith(ending) for word in words) for ending in stop)
        return len(words.intersection(stop))

    @cached_property
    def duplicate_lines(self) -> tuple[float, float]:
        """Lines without a letter or digit, as a brace or a fence of Markdown, may stand where they want."""
        return duplicate_share([line for line in self.lines if any(map(str.isalnum, line))])

    @cached_property
    def duplicate_paragraphs(self) -> tuple[float, float]:
        return duplicate_share([p for raw in _PARAGRAPHS.split(self.text) if (p := raw.strip())])

    @cached_property
    def repetitions(self) -> Repetitions:
        return Repetitions(self.text, self.habits.gram)

    @cached_property
    def sentences(self) -> int:
        return len(_SENTENCE_END.findall(self.text))

    @cached_property
    def alphanumeric(self) -> float:
        return sum(map(str.isalnum, self.text)) / max(1, len(self.text))


Breaks = Callable[[Facts, Any], bool]
BREAKS: dict[str, Breaks] = {
    "min_words": lambda f, least: f.words < least,
    "max_words": lambda f, most: f.words > most,
    "min_mean_word": lambda f, least: f.mean_word < least,
    "max_mean_word": lambda f, most: f.mean_word > most,
    "max_symbols": lambda f, most: f.symbols > most,
    "max_bullet_lines": lambda f, most: f.share_of_lines(lambda line: line.startswith(_BULLETS)) > most,
    "max_ellipsis_lines": lambda f, most: f.share_of_lines(lambda line: line.endswith(("...", "…"))) > most,
    "min_alphabetic_words": lambda f, least: f.alphabetic_words < least,
    "min_stop_words": lambda f, least: bool(f.habits.stop) and f.stop_words < least,
    "max_duplicate_lines": lambda f, most: f.duplicate_lines[0] > most,
    "max_duplicate_line_characters": lambda f, most: f.duplicate_lines[1] > most,
    "max_duplicate_paragraphs": lambda f, most: f.duplicate_paragraphs[0] > most,
    "max_duplicate_paragraph_characters": lambda f, most: f.duplicate_paragraphs[1] > most,
    "max_top_grams": lambda f, limits: any(f.repetitions.of(n).top > most for n, most in limits.items()),
    "max_duplicate_grams": lambda f, limits: any(f.repetitions.of(n).duplicate > most for n, most in limits.items()),
    "no_lorem_ipsum": lambda f, on: on and "lorem ipsum" in f.text.lower(),
    "no_curly_bracket": lambda f, on: on and "{" in f.text,
    "min_sentences": lambda f, least: f.sentences < least,
    "min_terminal_lines": lambda f, least: f.share_of_lines(lambda line: line.endswith(TERMINAL)) < least,
    "max_line": lambda f, most: max(map(len, f.lines), default=0) > most,
    "max_mean_line": lambda f, most: sum(map(len, f.lines)) > most * len(f.lines),
    "min_alphanumeric": lambda f, least: f.alphanumeric < least,
}
assert set(BREAKS) == {rule.name for rule in fields(Rules)}


def rules_for(rules: Rules, language: str, changes: Mapping[str, Mapping[str, Any]]) -> Rules:
    """The limits for a language. Its habits change those that are left at their defaults; what the user says of the
    language changes all.
    """
    default = Rules()
    habit = {k: v for k, v in BY_LANGUAGE.get(language, {}).items() if getattr(rules, k) == getattr(default, k)}
    return replace(rules, **{**habit, **changes.get(language, {})})


def broken_rule(text: str, language: str, rules: Rules, *, code: bool = False) -> str | None:
    """The name of the first rule that a text breaks, None for a good one.

    Args:
        code: source code, of which other things are asked than of prose.
    """
    facts = Facts(text, language)
    for name, breaks in BREAKS.items():
        limit = getattr(rules, name)
        if (name in CODE_RULES) == code and limit is not None and breaks(facts, limit):
            return name
    return None
