"""Places of syntax in a text: equal to what `ast` itself would cut out, whatever the line ends and letters."""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.syntax import SUFFIXES, Lines, Syntax, language_of, syntax_of
from moai_llm.tokenizer.syntax_python import parses
from tests.tokenizer.stdlib import stdlib_sources

HARD = '''# -*- coding: utf-8 -*-
"""Doc: 한국어 \u2028 and a form feed \x0c inside."""
import os
\x0c
@decorator
@another(
    1
)
# between
async def 함수(값, *, b=[x for x in "é가😀"]):
    """Doc."""

    # about the loop
    # in two lines
    for 이름, other in b:
        def inner(): return {값: other, **b}[1:2, 3]
        x = 1; y = 2
    else:
        print(f"{값!r:>{b}}" "more", (n := 10))
    if 값:
        pass
    elif b and \\
            not 값:
        return lambda: (yield 이름)
    else:
        raise ValueError from None
    try:
        z = 1
    except (TypeError, KeyError) as error:
        del z
    except ValueError:
        pass
    finally:
        await z
    match 값:
        case [1, *rest] if rest:
            pass
        case {"a": A(b=1)}:
            x[1:2] = 3


class A(B, metaclass=C):
    attribute: int = 1  # trailing
    @property
    def value(self): return self.attribute
'''


def cut_by_ast(source: str) -> Counter[str]:
    """The text of every statement and expression that is not inside a formatted string, by the places of `ast` as its
    documentation defines them: lines from 1, columns in bytes of UTF-8.
    """
    texts: Counter[str] = Counter()
    lines = source.encode().split(b"\n")
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.stmt, ast.expr)):
            slices = isinstance(node, ast.Tuple) and any(isinstance(item, ast.Slice) for item in node.elts)
            assert node.end_lineno is not None
            cut = lines[node.lineno - 1 : node.end_lineno]
            cut[-1] = cut[-1][: node.end_col_offset]
            cut[0] = cut[0][node.col_offset :]
            text = b"\n".join(cut).decode()
            kept = not slices and not isinstance(node, (ast.Slice, ast.NamedExpr)) and not text.startswith("elif")
            if kept and not getattr(node, "decorator_list", None):
                texts[text] += 1
        if not isinstance(node, ast.JoinedStr):
            waiting += ast.iter_child_nodes(node)
    return texts


def cut_by_us(source: str) -> Counter[str]:
    found = syntax_of(source, "python")
    assert found is not None
    texts = [source[start:end] for start, end in found.nodes]
    return Counter(text for text in texts if not text.startswith("@"))


VARIANTS = {
    "as it is": HARD,
    "CRLF": HARD.replace("\n", "\r\n"),
    "CR": HARD.replace("\n", "\r"),
    "tabs": HARD.replace("    ", "\t"),
    "no end": HARD.rstrip("\n"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_places_are_those_of_ast(variant: str) -> None:
    source = VARIANTS[variant]
    if variant == "CR":
        assert Counter(key.replace("\r", "\n") for key in cut_by_us(source).elements()) == cut_by_us(HARD)
    else:
        assert cut_by_us(source) == cut_by_ast(source)


def test_places_are_those_of_ast_on_the_standard_library() -> None:
    for source in stdlib_sources(60):
        assert cut_by_us(source) == cut_by_ast(source)


def border_lines(source: str, found: Syntax | None) -> list[tuple[int, str]]:
    assert found is not None
    lines = Lines(source)
    assert all(start in lines.starts for start in found.borders)
    return [(depth, lines.text(lines.line(start)).strip()) for start, depth in sorted(found.borders.items())]


PYTHON_BORDERS = [
    (0, "import os"),
    (0, "@decorator"),
    (1, "# about the loop"),
    (3, "x = 1; y = 2"),
    (2, "else:"),
    (1, "if 값:"),
    (2, "elif b and \\"),
    (2, "else:"),
    (1, "try:"),
    (2, "except (TypeError, KeyError) as error:"),
    (2, "except ValueError:"),
    (2, "finally:"),
    (1, "match 값:"),
    (2, 'case {"a": A(b=1)}:'),
    (0, "class A(B, metaclass=C):"),
    (1, "@property"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_borders(variant: str) -> None:
    source = VARIANTS[variant]
    assert border_lines(source, syntax_of(source, "python")) == PYTHON_BORDERS


def test_a_line_that_goes_on_is_no_border() -> None:
    assert border_lines("a = 1; \\\nb = 2\nc = 3\n", syntax_of("a = 1; \\\nb = 2\nc = 3\n", "python")) == [(0, "c = 3")]


def test_indented_text_is_parsed_where_it_stands() -> None:
    source = "\n    # first\n    def a(self):\n        return 1\n\n    def b(self):\n        return 2\n"
    assert parses(source) and border_lines(source, syntax_of(source, "python")) == [(0, "def b(self):")]
    assert not parses("    a\nb\n") and not parses("    a\nelse:\n    b\n")


def test_a_byte_order_mark_moves_nothing() -> None:
    found = syntax_of("\ufeffabc = 1\nd = 2\n", "python")
    assert found is not None and (1, 8) in found.nodes and found.borders == {9: 0}


@pytest.mark.parametrize(
    "source",
    [
        "def f(:\n",
        "x = 'never closed\n",
        "a\x00b",
        "x = '\ud800'",
        "print 'two'\n",
        "\t x\n        y\n",
        "\x1a",
        "(" * 500,
    ],
)
def test_what_does_not_parse_has_no_syntax(source: str) -> None:
    assert syntax_of(source, "python") is None and not parses(source)
    assert syntax_of(source, None) is None


def test_deep_nesting_is_no_error() -> None:
    chain = "if a:\n    pass\n" + "elif b:\n    pass\n" * 600
    found = syntax_of(chain, "python")
    assert found is None or set(found.borders.values()) <= {0, 1}
    syntax_of("-" * 20000 + "1", "python")
    syntax_of("x" + ".y" * 5000, "python")


@pytest.mark.parametrize("source", ["", "\n", "# only a comment", "   ", "\x0c"])
def test_empty_text(source: str) -> None:
    assert syntax_of(source, "python") == Syntax([], [], {})


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab_ (){}[]:=\n\r\t'\"\\#@if é가\x0c\ufeff", max_size=60))
def test_any_text_is_taken(source: str) -> None:
    found = syntax_of(source, "python")
    if found is not None:
        assert all(0 <= start < end <= len(source) for start, end in found.nodes)
        assert all(start in Lines(source).starts for start in found.borders)


# ---------------------------------------------------------------- other languages

SOURCES = {
    "c": "// né\nstatic int\nadd(int a)\n{\n    int b = a;\n    // then\n    if (b)\n    {\n        b = 1;\n    }\n"
    "    else\n    {\n        b = 2;\n    }\n    return b;\n}\n/* doc\n */\nint z;\n",
    "cpp": "namespace a {\nclass B {\n  int c;\n  int d;\n};\nint e;\n}\n",
    "javascript": "import a from 'a'\nclass B {\n  c() { return 1 }\n  // d\n  d() {}\n}\nexport default B\n",
    "typescript": "type A = string\ninterface B {\n  c: A\n  d: number\n}\n",
    "tsx": "const a = <div>\n  {b}\n</div>\nconst c = 1\n",
    "java": "class A {\n  int b;\n  /** doc */\n  int c() { return 1; }\n}\nclass D {}\n",
    "go": "package a\nfunc b() {\n\tc()\n\td()\n}\n",
    "rust": "use a;\n#[test]\nfn b() {\n    c();\n    d()\n}\n",
}
BORDERS = {
    "c": [(1, "// then"), (2, "else"), (1, "return b;"), (0, "/* doc")],
    "cpp": [(1, "int e;"), (2, "int d;")],
    "javascript": [(0, "class B {"), (1, "// d"), (0, "export default B")],
    "typescript": [(0, "interface B {"), (1, "d: number")],
    "tsx": [(0, "const c = 1")],
    "java": [(1, "/** doc */"), (0, "class D {}")],
    "go": [(0, "func b() {"), (1, "d()")],
    "rust": [(0, "#[test]"), (1, "d()")],
}  # fmt: skip


@pytest.mark.parametrize("language", SOURCES)
def test_tree_sitter(language: str) -> None:
    pytest.importorskip("tree_sitter", reason="needs the extra `code`")
    for source in (SOURCES[language], SOURCES[language].replace("\n", "\r\n"), "/* é가😀 */\n" + SOURCES[language]):
        found = syntax_of(source, language)
        assert found is not None
        assert sorted(border_lines(source, found)) == sorted(BORDERS[language])
        assert all(0 <= start < end <= len(source) for start, end in found.nodes)
    texts = [SOURCES[language][start:end] for start, end in syntax_of(SOURCES[language], language).nodes]  # type: ignore[union-attr]
    assert any(text in ("return b;", "int d;", "d() {}", "d: number", "{b}", "int b;", "c()", "c();") for text in texts)


def test_tree_sitter_works_around_errors() -> None:
    pytest.importorskip("tree_sitter", reason="needs the extra `code`")
    source = "int a;\nint b( { ; ;\n\x00 \ud800 }}}\nint c;\n"
    found = syntax_of(source, "c")
    assert found is not None and "int a;" in [source[start:end] for start, end in found.nodes]
    minified = "var a=1;" * 20000
    found = syntax_of(minified, "javascript")
    assert found is not None and not found.borders and len(found.nodes) > 20000


def test_every_language_has_a_grammar() -> None:
    pytest.importorskip("tree_sitter", reason="needs the extra `code`")
    for language in SUFFIXES:
        assert syntax_of("", language) == Syntax([], [], {})


def test_a_missing_grammar_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("moai_llm.tokenizer.syntax_tree_sitter")
    module._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.raises(MoaiError, match=r"'tree_sitter': pip install 'moai-llm\[code\]'"):
        syntax_of("int a;", "c")


def test_python_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def guarded(name: str, *rest: object, **more: object) -> object:
        assert not name.startswith("tree_sitter")
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert syntax_of("a = 1\n", "python") is not None


@pytest.mark.parametrize(
    ("place", "language"),
    [
        ("a.py", "python"),
        ("lib/a.PY:12", "python"),
        ("x.parquet: row 3", None),
        ("a.c: row 3", "c"),
        ("C:\\code\\a.h", "c"),
        ("a.tsx", "tsx"),
        ("notes.txt", None),
        ("Makefile", None),
        ("a.py/notes", None),
        ("", None),
    ],
)
def test_language_of_a_place(place: str, language: str | None) -> None:
    assert language_of(place) == language


def test_an_unknown_language() -> None:
    with pytest.raises(MoaiError, match=r"unknown language 'pyton' \(did you mean 'python'\?\); known are python, c,"):
        syntax_of("a", "pyton")
