"""moai data show: what a model will read, decoded: rows with the borders of their documents, documents, pairs.

On a terminal a document has a colour, what is not learned is grey, and control tokens stand reversed. Elsewhere what is
not learned stands between ⟦ and ⟧, so that a file says the same.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moai_llm.commands.data_info import add_packing
from moai_llm.runtime import MoaiError, make_console

if TYPE_CHECKING:
    import numpy as np

    from moai_llm.data.pieces import Piece
    from moai_llm.data.shards import Part, Store
    from moai_llm.tokenizer import Tokenizer

COLORS = ("cyan", "green", "yellow", "magenta")
OPEN, CLOSE = "⟦", "⟧"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="a prepared store")
    parser.add_argument(
        "row", type=int, nargs="?", help="which row, preference pair or record of texts, from 0 (default 0)"
    )
    parser.add_argument("--document", type=int, metavar="N", help="show this document instead of a row")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a row (default 256)")
    add_packing(parser)


def run(arguments: argparse.Namespace) -> None:
    from moai_llm.data.pieces import whole_document
    from moai_llm.data.shards import Store

    store, console = Store(arguments.store), make_console()
    if arguments.document is not None:
        if arguments.row is not None:
            raise MoaiError("a row and --document: choose one of them")
        piece = whole_document(store, arguments.document)
        _legend(console)
        _show_piece(piece, piece.learned(in_row=False), COLORS[0], store.tokenizer(), console, store.parts())
    elif store.manifest.kind == "preference":
        show_pair(store, arguments.row or 0, console)
    elif store.manifest.kind == "embedding":
        show_related(store, arguments.row or 0, console)
    else:
        _show_row(store, arguments, console)


def _show_row(store: Store, arguments: argparse.Namespace, console: Console) -> None:
    from moai_llm.data.pieces import row_pieces

    row, size = arguments.row or 0, arguments.seq_len
    pieces, tokenizer = row_pieces(store, row, size, arguments.packing, arguments.overlong), store.tokenizer()
    _legend(console)
    for number, piece in enumerate(pieces):
        _show_piece(piece, piece.learned(), COLORS[number % len(COLORS)], tokenizer, console, store.parts())
    held = sum(piece.length for piece in pieces)
    _border(console, f"end of row {row:,}: {held:,} of {size:,} tokens, the rest is padding")


def _show_piece(
    piece: Piece, learned: np.ndarray, color: str, tokenizer: Tokenizer, console: Console, parts: list[Part]
) -> None:
    from moai_llm.data.overview import short_name

    title = f"document {piece.document:,}"
    if len(parts) > 1:
        title += f" of {short_name(piece.store, parts)}"
    if piece.length < piece.of:
        title += f", tokens {piece.start:,} to {piece.start + piece.length - 1:,} of {piece.of:,}"
    title += f": {piece.length:,} tokens, {int(learned.sum()):,} learned"
    _border(console, title)
    console.print(decoded(piece.ids(), learned, color, tokenizer, console), soft_wrap=True)


def _border(console: Console, title: str) -> None:
    console.rule(Text(f"── {title}"), align="left", style="dim")


def _legend(console: Console) -> None:
    if not console.is_terminal:
        console.print(f"{OPEN}not learned{CLOSE}")


def decoded(ids: np.ndarray, learned: np.ndarray, color: str, tokenizer: Tokenizer, console: Console) -> Text:
    """Tokens as text. A character may be spread over tokens, so those of one look are decoded together."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    text = Text()
    for wanted, run in groupby(zip(ids.tolist(), learned.tolist()), key=lambda token: token[1]):
        style = color if wanted else "dim"
        if not wanted and not console.is_terminal:
            text.append(OPEN)
        for control, tokens in groupby((i for i, _ in run), key=lambda i: i in names or not tokenizer.token_bytes(i)):
            if control:
                text.append("".join(names.get(i) or f"<{i}>" for i in tokens), style=f"{style} reverse")
            else:
                text.append(b"".join(map(tokenizer.token_bytes, tokens)).decode("utf-8", "replace"), style=style)
        if not wanted and not console.is_terminal:
            text.append(CLOSE)
    return text


def show_pair(store: Store, number: int, console: Console) -> None:
    """Both answers of a preference pair, below the prompt they share.

    Raises:
        MoaiError: there is no such pair.
    """
    from moai_llm.data.preference import Pairs

    pairs, tokenizer = Pairs(store), store.tokenizer()
    if not 0 <= number < len(pairs):
        raise MoaiError(f"there are {len(pairs)} pairs, counted from 0")
    pair = pairs[number]
    _legend(console)
    prompt = slice(0, pair.prompt)
    console.print(decoded(pair.chosen[prompt], pair.chosen_learn[prompt], "dim", tokenizer, console), soft_wrap=True)
    for name, ids, learn, color in (
        ("chosen", pair.chosen, pair.chosen_learn, "green"),
        ("rejected", pair.rejected, pair.rejected_learn, "red"),
    ):
        _border(console, name)
        console.print(decoded(ids[pair.prompt :], learn[pair.prompt :], color, tokenizer, console), soft_wrap=True)


def show_related(store: Store, number: int, console: Console) -> None:
    """The texts of a record: the anchor, what belongs to it, what does not.

    Raises:
        MoaiError: there is no such record.
    """
    from moai_llm.data.embedding_store import read_groups

    groups, tokenizer = read_groups(store), store.tokenizer()
    if not 0 <= number < len(groups.first) - 1:
        raise MoaiError(f"there are {len(groups.first) - 1} records, counted from 0")
    names = {1: ("anchor", "cyan"), 2: ("right", "green"), 3: ("wrong", "red")}
    for document in range(groups.first[number], groups.first[number + 1]):
        name, color = names[int(groups.role[document])]
        graded = f", grade {groups.score[document]:.2f}" if groups.score[document] >= 0 else ""
        ids = store.document(document)
        _border(console, f"{name}{graded}: {len(ids):,} tokens")
        console.print(decoded(ids, ids >= 0, color, tokenizer, console), soft_wrap=True)
