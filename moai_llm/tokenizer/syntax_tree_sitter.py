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
    """See `syntax.syntax_of`; `language` is one of `_GRAMMARS`.

    Grammars name their nodes as they like, so what a list of statements is, is seen from the text: the children of a
    node that begin lines of their own.
    """
    lines = Lines(source)
    tree = _parser(language).parse(lines.data)
    root = tree.root_node
    found = Syntax([], [], {})
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        children = [(child, _bytes_to_span(lines, child)) for child in node.named_children]
        # a list of statements or members: children on lines of their own, the first of them not what begins the node,
        # as `static` does a function
        begin = -1 if node == root or node.type.endswith("list") else lines.character(node.start_byte)
        members = [
            (child, span)
            for child, span in children
            if lines.begun_by(span[0]) is not None and not source.startswith("{", span[0]) and span[0] > begin
        ]
        inner = depth
        if node == root or len(members) > 1 or any(child.type.endswith("clause") for child, _ in members):
            inner += 1
            if len(members) > 1 and not any(child.has_error for child, _ in members):
                found.runs.append([span for _, span in members])
            for (before, (before_start, before_end)), (_, (start, _)) in zip(children, children[1:]):
                leads = any(kind in before.type for kind in _LEADING) and lines.begun_by(before_start) is not None
                follows = lines.line(start) - lines.line(before_end) <= 1  # that no blank line parts them
                line_start = lines.begun_by(start)
                if line_start is not None and not source.startswith("{", start) and not (leads and follows):
                    found.borders.setdefault(line_start, depth)
        found.nodes.extend(span for child, span in children if span[0] < span[1] and not child.has_error)
        waiting += [(child, inner) for child, _ in children]
    return found


def _bytes_to_span(lines: Lines, node: Any) -> Span:
    return lines.character(node.start_byte), lines.character(node.end_byte)
