"""Chunks: joined they are the text, none is too long, and they are cut where a reader would cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chunks import chunks
from moai_llm.tokenizer.syntax_python import parses
from tests.tokenizer.stdlib import stdlib_sources

SOURCE = '''import a
import b


class First:
    """Doc."""

    def one(self):
        return 1

    # leads two
    @property
    def two(self):
        return 2


def last():
    for i in range(3):
        print(i)
    return i
'''


def test_by_hand() -> None:
    assert chunks(SOURCE, 10_000, "python") == [SOURCE]
    imports, *rest = chunks(SOURCE, 150, "python")
    assert imports == "import a\nimport b\n\n\n"
    assert [piece.split("\n")[0] for piece in rest] == ["class First:", "def last():"]
    starts = [piece.split("\n")[0] for piece in chunks(SOURCE, 80, "python")]
    assert starts == ["import a", "class First:", "    # leads two", "def last():"]
    starts = [piece.split("\n")[0] for piece in chunks(SOURCE, 60, "python")]
    assert starts[-2:] == ["def last():", "    return i"]


def test_without_syntax_between_lines() -> None:
    text = "one two\nthree\n\nfour\nfive"
    assert chunks(text, 14, None) == ["one two\nthree\n", "\nfour\nfive"]
    broken = "def f(:\n    pass\nx = = 1\n"
    assert chunks(broken, 18, "python") == ["def f(:\n    pass\n", "x = = 1\n"]


def test_a_long_line_is_cut_within() -> None:
    minified = "var a=1;" * 1000
    assert chunks(minified, 64, None) == [minified[i : i + 64] for i in range(0, 8000, 64)]
    assert chunks("x" * 10 + "\ny", 4, None) == ["xxxx", "xxxx", "xx\n", "y"]
    assert chunks("", 5, "python") == []
    assert chunks("가나다", 2, None, lambda text: len(text.encode())) == ["가", "나", "다"]  # one letter is not cut


def check(source: str, size: int, language: str | None, measure=len) -> list[str]:  # type: ignore[no-untyped-def]
    pieces = chunks(source, size, language, measure)
    assert "".join(pieces) == source and all(pieces)
    assert all(measure(piece) <= size or len(piece) == 1 for piece in pieces)
    return pieces


def test_the_standard_library_in_tokens(tokenizer: Tokenizer) -> None:
    """Joined it is the text; most pieces parse alone, of fixed cuts (the control) hardly any."""
    size = 800  # about 1,300 characters with this tokenizer
    parsing = pieces = fixed_parsing = fixed = 0
    for source in stdlib_sources(13):
        for piece in check(source, size, "python", lambda text: len(tokenizer.encode(text))):
            pieces += 1
            parsing += parses(piece)
        for start in range(0, len(source), 1300):
            fixed += 1
            fixed_parsing += parses(source[start : start + 1300])
    assert pieces > 1000 and parsing / pieces > 0.8
    assert fixed_parsing / fixed < 0.2


def test_line_ends_and_tabs() -> None:
    for source in stdlib_sources(90):
        for variant in (source.replace("\n", "\r\n"), source.replace("    ", "\t"), "\ufeff" + source):
            check(variant, 700, "python")


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab (:=\n\r\t'#\\é😀\x0c", max_size=80), st.integers(1, 30))
def test_any_text(source: str, size: int) -> None:
    for language in ("python", None):
        check(source, size, language)
        check(source, size, language, lambda text: len(text.encode()))


@pytest.mark.parametrize("language", ["javascript", "c"])
def test_other_languages(language: str) -> None:
    pytest.importorskip("tree_sitter", reason="needs the extra `code`")
    one = (
        "function f%d() {\n  a();\n\n  b();\n}\n\n" if language == "javascript" else "int f%d(int a)\n{\n  b();\n}\n\n"
    )
    source = "".join(one % i for i in range(50))
    pieces = check(source, 200, language)
    assert all(piece.startswith(("function", "int")) and piece.endswith("}\n\n") for piece in pieces)
    assert all(piece.count("f") > 3 for piece in pieces[:-1])  # several to a chunk
    check("var a=1;" * 5000, 100, language)


def test_wrong_sizes() -> None:
    with pytest.raises(MoaiError, match="at least 1, got 0"):
        chunks("a", 0)
