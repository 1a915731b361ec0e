"""The syntax of Python text, from the standard library's `ast`."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from typing import Any

from moai_llm.tokenizer.syntax import Lines, Span, Syntax

_HEADER = "if 1:\n"
# the first line that is neither blank nor a comment begins with blanks
_INDENTED = re.compile(r"(?:[ \t\f]*(?:#[^\r\n]*)?[\r\n])*[ \t]+[^\s#]")
_CLAUSE = re.compile(r"(?<=[\r\n])[ \t\f]*(?=(?:elif|else|except|finally|case)\b)")
_TEMPLATES = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))  # places inside are wrong before Python 3.12


def parses(source: str) -> bool:
    """Whether Python parses alone, or, where its first line is indented, below an `if`."""
    return _parse(source) is not None


def _parse(source: str) -> tuple[list[ast.stmt], str, str] | None:
    """The statements, the text that was parsed, and the header that was put before it to take in indented text."""
    header = _HEADER if _INDENTED.match(source) else ""
    text = header + source.removeprefix("\ufeff")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that a later Python refuses
            body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # also null bytes and lone surrogates
        return None
    if header:
        (first, *rest) = body
        return None if rest or first.orelse else (first.body, text, header)  # type: ignore[attr-defined]
    return body, text, header


def python_syntax(source: str) -> Syntax | None:
    """See `syntax.syntax_of`; None where the text does not parse."""
    parsed = _parse(source)
    if parsed is None:
        return None
    body, text, header = parsed
    lines = Lines(text)
    shift = source.startswith("\ufeff") - len(header)
    found = Syntax([], [], {})
    waiting = [(body, 0)]
    while waiting:  # not recursive: nesting may be deep
        body, depth = waiting.pop()
        spans = [_span(lines, statement) for statement in body]
        if len(spans) > 1:
            found.runs.append(spans)
        for before, (start, _) in zip(spans, spans[1:]):
            _add_border(lines, found.borders, start, depth, after=before[1])
        for statement, (start, end) in zip(body, spans):
            found.nodes.append((start, end))
            bodies, parts = _clauses(lines, statement)
            found.nodes.extend(_expressions(lines, parts))
            inner = depth + 1
            if len(bodies) > 1:  # if and else, try and except: clauses first, then the statements in them
                for one, other in zip(bodies, bodies[1:]):
                    low, high = _span(lines, one[-1])[1], _span(lines, other[0])[0]
                    keyword = _CLAUSE.search(text, low, high)
                    if keyword:
                        _add_border(lines, found.borders, keyword.end(), inner, after=low)
                inner += 1
            waiting += [(body, inner) for body in bodies]

    def moved(span: Span) -> Span:
        return span[0] + shift, span[1] + shift

    return Syntax(
        [moved(span) for span in found.nodes],
        [[moved(span) for span in run] for run in found.runs],
        {start + shift: depth for start, depth in found.borders.items()},
    )


def _place(lines: Lines, line: int, column: int) -> int:
    """Columns of `ast` are bytes of UTF-8, lines count from 1."""
    return lines.character(lines.byte_starts[line - 1] + column)


def _span(lines: Lines, node: Any) -> Span:
    start = _place(lines, node.lineno, node.col_offset)
    if getattr(node, "decorator_list", None):  # `lineno` is that of the def, and a decorator's that of its name
        first = node.decorator_list[0]
        start = lines.source.rfind("@", 0, _place(lines, first.lineno, first.col_offset))
    return start, _place(lines, node.end_lineno, node.end_col_offset)


def _clauses(lines: Lines, statement: ast.stmt) -> tuple[list[list[ast.stmt]], list[ast.AST]]:
    """The blocks of a compound statement in order, and the nodes to look for its own expressions in; a chain of elif
    is one statement.
    """
    parts: list[ast.AST] = [statement]
    bodies: list[list[ast.stmt]] = []
    last: Any = statement
    while isinstance(last, ast.If) and len(last.orelse) == 1 and isinstance(last.orelse[0], ast.If):
        link = last.orelse[0]
        if not lines.source.startswith("elif", _span(lines, link)[0]):
            break
        bodies.append(last.body)
        parts.append(link)
        last = link
    bodies.append(getattr(last, "body", []))
    bodies += [clause.body for name in ("handlers", "cases") for clause in getattr(last, name, [])]
    bodies += [getattr(last, name, []) for name in ("orelse", "finalbody")]
    return [body for body in bodies if body], parts


def _expressions(lines: Lines, parts: list[ast.AST]) -> Iterator[Span]:
    """Expressions below nodes, statements inside them left out. What parses in its place only is looked through: the
    slice of a subscript, the inside of a formatted string, `:=`.
    """
    waiting: list[ast.AST] = list(parts)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.expr):
            slices = isinstance(node, ast.Tuple) and any(isinstance(item, ast.Slice) for item in node.elts)
            if not slices and not isinstance(node, (ast.Slice, ast.NamedExpr)):
                yield _span(lines, node)
        if not isinstance(node, _TEMPLATES):
            waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.stmt)]


def _add_border(lines: Lines, borders: dict[int, int], start: int, depth: int, after: int) -> None:
    """A border before the line that begins with `start`, moved above the comments that stand right above it and below
    what ends at `after`.
    """
    if lines.begun_by(start) is None:
        return
    line = lines.line(start)
    column = start - lines.starts[line]
    if lines.text(line - 1).rstrip("\r\n").endswith("\\"):  # `a; \` and the next statement: one line to Python
        return
    while line - 1 > lines.line(after):
        above = lines.text(line - 1)
        if not above.lstrip(" \t\f").startswith("#") or len(above) - len(above.lstrip(" \t\f")) != column:
            break
        line -= 1
    borders.setdefault(lines.starts[line], depth)
