"""The syntax of text in other languages than Python, from tree-sitter grammars: one package a language, installed by
`pip install 'moai-llm[code]'`. Grammars that would be downloaded at run time are not used.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from moai_llm.runtime import require
from moai_llm.tokenizer.syntax import Lines, Span, Syntax

_GRAMMARS = {  # language -> package and function that hands out the grammar
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "java": ("tree_sitter_java", "language"),
    "go": ("tree_sitter_go", "language"),
    "rust": ("tree_sitter_rust", "language"),
}
_LEADING = ("comment", "attribute", "decorator")  # kinds of nodes that belong to what follows


@cache
def _parser(language: str) -> Any:
    package, function = _GRAMMARS[language]
    tree_sitter = require("tree_sitter", "code")
    return tree_sitter.Parser(tree_sitter.Language(getattr(require(package, "code"), function)()))


def tree_sitter_syntax(source: str, language: str) -> Syntax:
    """See `syntax.syntax_of`; `language` is one of `_GRAMMARS`."""
    lines = Lines(source)
    tree = _parser(language).parse(lines.data)
    root = tree.root_node
    found = Syntax([], [], {})
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        children = [(child, _bytes_to_span(lines, child)) for child in node.named_children]
        # a list of statements or members: children on lines of their own, behind the bracket that opens the list
        begin = lines.character(node.start_byte)
        members = [
            (child, span)
            for child, span in children
            if lines.begun_by(span[0]) is not None
            and source[span[0] : span[0] + 1] not in "{(["
            and (node == root or span[0] > begin)
        ]
        inner = depth
        if len(members) > 1 or any(child.type.endswith("clause") for child, _ in members):
            inner += 1
            if len(members) > 1 and not any(child.has_error for child, _ in members):
                found.runs.append([span for _, span in members])
            first, before = children[0][1][0], None
            for child, (start, end) in members:
                led = before is not None and lines.line(before) >= lines.line(start) - 1
                line_start = lines.begun_by(start)
                if start != first and not led and line_start is not None:
                    found.borders.setdefault(line_start, depth)
                before = end if any(kind in child.type for kind in _LEADING) else None
        found.nodes.extend(span for child, span in children if span[0] < span[1] and not child.has_error)
        waiting += [(child, inner) for child, _ in children]
    return found


def _bytes_to_span(lines: Lines, node: Any) -> Span:
    return lines.character(node.start_byte), lines.character(node.end_byte)
