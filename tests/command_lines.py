"""The `moai` command lines of a Markdown text, and a check that the real parsers take them.

Commands are looked for in fenced bash, sh, shell and console blocks. In a console block only what follows `$ ` is a
command, the rest is output; in the others every line is. `python -m moai_llm` counts as `moai`.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NamedTuple

from moai_llm import recipe as recipes
from moai_llm.cli import COMMANDS, Parser
from moai_llm.runtime import MoaiError

FENCE = re.compile(r"^ *(`{3,}|~{3,}) *([\w+-]*)")
SHELLS = ("bash", "sh", "shell", "console")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*|<[^>]+>|\.\.\.")  # RECIPE, <recipe>, ...


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line its text begins on."""

    language: str
    text: str
    line: int


class Command(NamedTuple):
    """One simple command as words, redirections and variable assignments left out, and the line it begins on."""

    words: list[str]
    line: int

    def __str__(self) -> str:
        return shlex.join(self.words)


def fenced_blocks(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text."""
    fence, language, start, lines = "", "", 0, list[str]()
    for number, line in enumerate(markdown.splitlines(), 1):
        found = FENCE.match(line)
        if not fence and found:
            fence, language, start, lines = found[1], found[2], number + 1, []
        elif fence and line.strip() == fence:
            yield Block(language, "\n".join(lines), start)
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        raise ValueError(f"the block that opens before line {start} is never closed")


def shell_commands(markdown: str) -> Iterator[Command]:
    """Every simple command of the shell blocks, in order."""
    for block in fenced_blocks(markdown):
        if block.language in SHELLS:
            for text, line in _logical_lines(block):
                yield from (Command(words, line) for words in _simple_commands(text))


def moai_commands(markdown: str) -> Iterator[Command]:
    """The commands that call `moai`, their words beginning with "moai"."""
    for words, line in shell_commands(markdown):
        if words[0].rsplit("/", 1)[-1] == "moai":
            yield Command(["moai", *words[1:]], line)
        elif words[0].startswith("python") and words[1:3] == ["-m", "moai_llm"]:
            yield Command(["moai", *words[3:]], line)


def check(line: str | Sequence[str]) -> None:
    """Parse a `moai ...` command line with the parser it meets at run time. Nothing is run, no file is looked for.

    Overrides of `moai train` and `moai recipes` are resolved: over the preset, or, where a recipe file or a
    placeholder such as RECIPE stands in its place, over an empty recipe.

    Raises:
        ValueError: the command line would be refused; the message says why.
    """
    words = shlex.split(line) if isinstance(line, str) else list(line)
    shown = shlex.join(words)
    if words[:1] != ["moai"]:
        raise ValueError(f"{shown}: not a moai command")
    arguments = words[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help", "--version"):
        return
    verb = arguments[0]
    if verb not in COMMANDS:
        raise ValueError(f"{shown}: there is no command {verb!r}")
    module = import_module(COMMANDS[verb][0])
    parser = Parser(prog=f"moai {verb}", description=module.__doc__)
    module.configure(parser)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            parsed = parser.parse_all(arguments[1:])
    except SystemExit as left:
        if not left.code:  # --help
            return
        raise ValueError(f"{shown}: {complaint.getvalue().strip()}") from None
    if verb in ("train", "recipes", "doctor"):
        name = getattr(parsed, {"train": "recipe", "recipes": "name", "doctor": "target"}[verb])
        if name is not None and (verb != "doctor" or parsed.overrides):  # what the doctor sees may be a folder
            _check_recipe(shown, name, parsed.overrides)


def _check_recipe(shown: str, name: str, overrides: list[str]) -> None:
    try:
        if name.endswith((".yaml", ".yml")) or PLACEHOLDER.fullmatch(name):
            tree: dict[str, object] = {}
            for item in overrides:
                recipes._override(tree, item)
            recipes.from_tree(tree, source=name)
        else:
            recipes.load(name, overrides)
    except MoaiError as error:
        raise ValueError(f"{shown}: {error}") from None


def _logical_lines(block: Block) -> Iterator[tuple[str, int]]:
    """(command line, its number): prompts taken off, lines that end in a backslash joined, here-documents left out."""
    console = block.language == "console"
    pending, first, end_of_document = "", 0, ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        if end_of_document:
            end_of_document = "" if line.strip() == end_of_document else end_of_document
            continue
        text = line.strip()
        if not pending:
            first = number
            if text.startswith("$ "):
                text = text[2:]
            elif console:
                continue
        elif text.startswith("> "):
            text = text[2:]
        if text.endswith("\\"):
            pending += text[:-1]
            continue
        here = re.search(r"<<-?\s*['\"]?(\w+)", text)
        end_of_document = here[1] if here else ""
        yield pending + text, first
        pending = ""
    if pending:
        raise ValueError(f"line {first}: the last line of the block ends in a backslash")


def _simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line with pipes, `&&`, `;` and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    skip = False
    for word in [*lexer, ";"]:
        if skip:  # the target of a redirection
            skip = False
        elif word.startswith("#"):
            break
        elif word in ("|", "||", "&&", ";", "&", "(", ")"):
            if words:
                yield words
            words = []
        elif set(word) <= set("<>&"):
            skip = True
        elif words or not re.fullmatch(r"\w+=.*", word):
            words.append(word)
    if words:
        yield words
