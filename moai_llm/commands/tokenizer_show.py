"""moai tokenizer show: how tokenizers cut a text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    from moai_llm.tokenizer import Tokenizer
    from moai_llm.tokenizer.pieces import Piece

COLORS = ("black on bright_yellow", "black on bright_cyan", "black on bright_green", "black on bright_magenta")
STYLES = {"cut": ("white on red", "white on dark_red"), "special": ("bold white on blue",) * 2,
          "unknown": ("bold white on bright_black",) * 2, "text": COLORS}  # fmt: skip
NARROWEST = 44  # columns that a text needs beside another
USAGE = "moai tokenizer show TOKENIZER TEXT, or --text TEXT behind several tokenizers; - reads standard input"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [-h] TOKENIZER [TOKENIZER ...] {{TEXT | --text TEXT}} [--ids] [--special]"
    parser.add_argument(
        "words", nargs="+", metavar="TOKENIZER TEXT",
        help="a tokenizer or model directory, or several, and what to cut into tokens (- reads standard input)",
    )  # fmt: skip
    parser.add_argument("--text", help="the text, where every other word is a tokenizer (- reads standard input)")
    parser.add_argument("--ids", action="store_true", help="the id of each token under it")
    parser.add_argument(
        "--special", action="store_true", help="read control tokens in the text as such; else text stays text"
    )


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.commands.tokenizer_report import open_all
    from moai_llm.tokenizer.pieces import Vocabulary

    sources, text = _sources_and_text(arguments.words, arguments.text)
    tokenizers, console = open_all(sources), make_console()
    shown: list[RenderableType] = []
    for name, tokenizer in tokenizers.items():
        ids = encode_special(tokenizer, text) if arguments.special else tokenizer.encode(text)
        pieces = list(Vocabulary(tokenizer).pieces(ids))
        came_back = tokenizer.decode(ids)
        lost = "" if came_back == text else f"\ndoes not come back: {came_back!r}"
        size = len(text.encode("utf-8", "replace"))
        counted = f"{len(ids):,} tokens, {size:,} bytes, {size / max(1, len(ids)):.2f} bytes per token{lost}"
        header = f"{name}: " if len(tokenizers) > 1 else ""
        if console.is_terminal:
            width = console.width // len(tokenizers) - 2
            width = width if width >= NARROWEST else console.width
            body = _with_ids(pieces, width) if arguments.ids else _colored(pieces)
            summary = Text(header + counted, style="dim")
            shown.append(Group(summary, body, "") if header else Group(body, summary))
        else:
            lines = ["|".join(piece.text for piece in pieces)]
            lines += [" ".join(str(piece.id) for piece in pieces)] * arguments.ids
            console.print(Text("\n".join([*lines, header + counted])), soft_wrap=True)
    if shown:
        console.print(_beside(shown, console))


def encode_special(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text in which the names of control tokens stand for them; what is between is ordinary text."""
    import regex

    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    parts = regex.split(f"({'|'.join(map(regex.escape, names))})", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        special = tokenizer.special_ids.get(part)
        ids += tokenizer.encode(part) if special is None else [special]
    return ids


def _sources_and_text(words: Sequence[str], text: str | None) -> tuple[list[str], str]:
    if text is None:
        *sources, text = words
        if not sources:
            raise MoaiError(f"{'the text' if _is_tokenizer(text) else 'the tokenizer or the text'} is missing: {USAGE}")
        if _is_tokenizer(text):
            raise MoaiError(f"{text} is a tokenizer, and the text is missing: {USAGE}")
    else:
        sources = list(words)
    return sources, sys.stdin.read() if text == "-" else text


def _is_tokenizer(word: str) -> bool:
    try:
        path = Path(word)
        return (path / "tokenizer.json").is_file() or (path.suffix in (".tiktoken", ".json") and path.is_file())
    except (OSError, ValueError):  # a long text is no path
        return False


def _style(piece: Piece, number: int) -> str:
    styles = STYLES[piece.kind]
    return styles[number % len(styles)]


def _colored(pieces: Sequence[Piece]) -> Text:
    line = Text()
    for number, piece in enumerate(pieces):
        line.append(piece.text + "\n" * piece.ends_line, style=_style(piece, number))
    return line


def _with_ids(pieces: Sequence[Piece], width: int) -> Text:
    """Tokens in lines of a width, the ids of each line under it."""
    lines, upper, lower, used = Text(), Text(), Text(), 0
    for number, piece in enumerate(pieces):
        cell = max(cell_len(piece.text), len(str(piece.id))) + 1
        if used and used + cell > width:
            lines = lines + upper + "\n" + lower + "\n"
            upper, lower, used = Text(), Text(), 0
        upper.append(piece.text, style=_style(piece, number))
        upper.append(" " * (cell - cell_len(piece.text)))
        lower.append(f"{piece.id:<{cell}}", style="dim")
        used += cell
    return lines + upper + "\n" + lower


def _beside(shown: Sequence[RenderableType], console: Console) -> RenderableType:
    """Side by side where each has room, else one below the other."""
    if len(shown) == 1 or console.width // len(shown) - 2 < NARROWEST:
        return Group(*shown)
    grid = Table.grid(padding=(0, 2), expand=True)
    for _ in shown:
        grid.add_column(ratio=1)
    grid.add_row(*shown)
    return grid
