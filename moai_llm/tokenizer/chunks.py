"""Long source code in pieces that are cut between statements, so that each makes sense alone.

A piece is as long as it may be, and ends at the shallowest border within reach: between top-level definitions, else
between the methods of a class, else between statements. It never runs from the inside of one definition into the next.
Text without syntax, and a statement longer than a piece, is cut between lines, and a line longer than a piece within.
"""

from __future__ import annotations

from collections.abc import Callable

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.syntax import Lines, syntax_of

_LINE = 1 << 30  # the depth of a border between two lines of one statement


def chunks(source: str, max_size: int, language: str | None = None, measure: Callable[[str], int] = len) -> list[str]:
    """Cut source code; joined, the pieces are `source` exactly.

    Args:
        max_size: what a piece may measure, in units of `measure`: characters, or tokens with
            `lambda text: len(tokenizer.encode(text))`.
        language: a name of `syntax.SUFFIXES`; None, and Python that does not parse, is cut between lines.

    Raises:
        MoaiError: max_size below 1, or a language that is not known or not installed.
    """
    if max_size < 1:
        raise MoaiError(f"the size of a chunk must be at least 1, got {max_size}")
    syntax = syntax_of(source, language)
    depths = {**dict.fromkeys(Lines(source).starts, _LINE), **(syntax.borders if syntax else {}), 0: 0}
    places = sorted(place for place in depths if place < len(source))
    depth = [depths[place] for place in places]
    places.append(len(source))
    sizes = [measure(source[a:b]) for a, b in zip(places, places[1:])]
    pieces: list[str] = []
    i = 0
    while i < len(sizes):
        reach = _reach(sizes, i, max_size)
        end = _best_end(depth, i, reach)
        # sizes are measured line by line; where a whole measures more than its parts it ends earlier
        while end > i + 1 and measure(source[places[i] : places[end]]) > max_size:
            end = _best_end(depth, i, end - 1)
        if end > i:
            pieces.append(source[places[i] : places[end]])
        else:
            end = i + 1
            pieces += _cut_within(source[places[i] : places[end]], max_size, measure)
        i = end
    return pieces


def _reach(sizes: list[int], i: int, max_size: int) -> int:
    """The last place to which everything from place i on measures no more than `max_size`."""
    total = 0
    for end in range(i, len(sizes)):
        total += sizes[end]
        if total > max_size:
            return end
    return len(sizes)


def _best_end(depth: list[int], i: int, reach: int) -> int:
    """Of the places after i up to `reach` the last of the shallowest, none behind the definition that i lies in; i
    where there is none.
    """
    best = i
    for end in range(i + 1, reach + 1):
        if end == len(depth) or depth[end] < depth[i]:
            return end
        if best == i or depth[end] <= depth[best]:
            best = end
    return best


def _cut_within(text: str, max_size: int, measure: Callable[[str], int]) -> list[str]:
    """Pieces of a text without borders; a single character may measure more than `max_size`."""
    pieces = []
    start = 0
    while start < len(text):
        low, high = 1, max_size  # the first `low` characters fit; more than `high` have not been tried
        while start + high < len(text) and measure(text[start : start + high]) <= max_size:
            low, high = high, 2 * high
        high = min(high, len(text) - start)
        while low < high:
            middle = (low + high + 1) // 2
            if measure(text[start : start + middle]) <= max_size:
                low = middle
            else:
                high = middle - 1
        pieces.append(text[start : start + low])
        start += low
    return pieces
