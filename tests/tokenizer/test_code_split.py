"""The split of a tokenizer on source code: indentation runs, operators, numbers and strings come out as pieces."""

from __future__ import annotations

import pytest

from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import train_tokenizer

PYTHON = '''
class Point:
    """A place in the plane."""

    def move(self, dx: float, dy: float = 0.5) -> "Point":
        for name, delta in (("x", dx), ("y", dy)):
            if delta != 0 and name == "x":
                self.history[name] = [value // 2 for value in self.history[name]]
                    # deeper than it should be
        return Point(self.x + dx, self.y + dy)
'''
C = """
int parse(struct parser *p, const char *text)
{
\tif (p->state == DONE || text[0] != '\\n') {
\t\treturn p->next->count++;  // the end
\t}
\treturn std::max(0x1F, 3.14e-5f);
}
"""
JAVASCRIPT = """
const load = async (path) => {
  if (path === '' || path !== cache?.path) {
    return items.map(item => ({ ...item, label: `${item.name}: ${item.size}` }));
  }
};
"""


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([PYTHON * 20, C * 20, JAVASCRIPT * 20], 800, fewer=True)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """What no merge crosses."""
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cut]


def tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    "operator",
    ["->", "==", "!=", "::", "=>", "//", "**", "&&", "||", "<<=", ">>>", "===", "!==", "+=", ":=", "/*", "...", "?."],
)
@pytest.mark.parametrize("space", ["", " "])
def test_an_operator_is_one_piece(trained: Tokenizer, operator: str, space: str) -> None:
    assert pieces(trained, f"a{space}{operator}{space}b") == ["a", space + operator, space + "b"]


@pytest.mark.parametrize("width", [2, 3, 4, 8, 12, 16, 24, 40])
@pytest.mark.parametrize("follows", ["return", "(x", "# why"])
def test_an_indentation_is_one_piece_but_for_its_last_space(trained: Tokenizer, width: int, follows: str) -> None:
    first, second, *_ = pieces(trained, " " * width + follows)
    assert first == " " * (width - 1)
    assert second == (" return" if follows == "return" else " " + follows[:1])


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("\t\treturn x", ["\t", "\treturn", " x"]),
        ("\t\t// x", ["\t", "\t", "//", " x"]),  # a tab, unlike a space, does not join an operator
        ("        1", ["       ", " ", "1"]),
        ("x = 1\r\n    y\r\n", ["x", " =", " ", "1", "\r\n", "   ", " y", "\r\n"]),
        ("f():\r\n\r\n    y", ["f", "():\r\n\r\n", "   ", " y"]),
        ("\x0c\nclass A:\n", ["\x0c\n", "class", " A", ":\n"]),
        ("x\n\n\n    y", ["x", "\n\n\n", "   ", " y"]),
        ("x  \n    \n    y", ["x", "  \n    \n", "   ", " y"]),
        ("0x1F 3.14e-5 1_000", ["0", "x", "1", "F", " ", "3", ".", "14", "e", "-", "5", " ", "1", "_", "000"]),
        ("1234567", ["123", "456", "7"]),
        ("= 'ab' + \"it's\" + `${c}`", ["=", " '", "ab", "'", " +", ' "', "it's", '"', " +", " `${", "c", "}`"]),
        ("getHTTPServer snake_case_2", ["get", "HTTPServer", " snake", "_case", "_", "2"]),
        ("__init__(self)", ["__", "init", "__(", "self", ")"]),
        # known and kept: an apostrophe of English behind a prefix of a string
        ("f'test'", ["f't", "est", "'"]),
    ],
)
def test_pieces(trained: Tokenizer, text: str, cut: list[str]) -> None:
    assert pieces(trained, text) == cut


def test_training_on_code_merges_what_code_repeats(trained: Tokenizer) -> None:
    for width in (4, 8, 12):
        assert tokens(trained, f"{' ' * width}return self") == [" " * (width - 1), " return", " self"]
    for operator in (" ->", " ==", " !=", " =>", " //", " ===", " !==", " ||"):
        assert tokens(trained, f"x{operator} y")[1] == operator
    assert tokens(trained, "\treturn p->state")[:2] == ["\treturn", " p"]
    for code in (PYTHON, C, JAVASCRIPT, C.replace("\n", "\r\n"), "\t\x0c\r\n \u2028x" + PYTHON):
        assert trained.decode(trained.encode(code)) == code


def test_control_a_tokenizer_of_prose_pays_for_each_space() -> None:
    prose = train_tokenizer(["The quick brown fox jumps over the lazy dog. " * 40], 300, fewer=True)
    assert len(prose.encode(" " * 8 + "the")) == 8
