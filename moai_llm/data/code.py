"""Source code among the documents of a store: long files cut between statements, some rearranged to fill in the middle.

Which documents are source code is told by the suffix of the file they come from, or by the caller for records that
come from a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chunks import chunks
from moai_llm.tokenizer.fim import Fim, fim_document, fim_ids
from moai_llm.tokenizer.syntax import check_language, language_of

SMALLEST_CHUNK = 16  # tokens


@dataclass(frozen=True)
class CodeOptions:
    """What to do with source code.

    fim: rearrange a share of its documents to fill in the middle.
    chunk: the most tokens of a document; longer ones become several, cut between statements.
    language: of documents whose place does not tell.
    """

    fim: Fim | None = None
    chunk: int | None = None
    language: str | None = None

    def check(self, tokenizer: Tokenizer) -> None:
        """
        Raises:
            MoaiError: a tokenizer without the tokens of fill-in-the-middle, a chunk of nearly nothing, an unknown
                language.
        """
        if self.fim is not None:
            fim_ids(tokenizer)
        if self.chunk is not None and self.chunk < SMALLEST_CHUNK:
            raise MoaiError(f"a chunk of code must hold at least {SMALLEST_CHUNK} tokens, got {self.chunk}")
        if self.language is not None:
            check_language(self.language)


class Document(NamedTuple):
    """A document of the store."""

    ids: np.ndarray
    text_bytes: int
    text: int  # which of the texts it is, counted from 0
    is_code: bool = False
    is_filled: bool = False  # rearranged to fill in the middle


class _Piece(NamedTuple):
    of: int
    text: str
    is_last: bool
    is_code: bool
    filled: list[int] | None


def encode_documents(
    tokenizer: Tokenizer, texts: Iterable[tuple[int | None, str, str]], options: CodeOptions, *, threads: int = 1
) -> Iterator[Document]:
    """The documents that texts become: one each, or several where it is code longer than a chunk.

    A document ends with the end-of-text token. A piece of code that is not the last of its file has none, unless it is
    rearranged: there the token ends the middle.

    Args:
        texts: (number, text, place): the number and the seed decide whether a text is rearranged and how, None is never
            rearranged; the place says the language.
    """
    pieces = [piece for i, text in enumerate(texts) for piece in _pieces(tokenizer, i, *text, options)]
    plain = iter(tokenizer.encode_arrays([piece.text for piece in pieces if piece.filled is None], threads=threads))
    end = np.array([tokenizer.eos_id], np.uint32)
    for piece in pieces:
        size = len(piece.text) if piece.text.isascii() else len(piece.text.encode("utf-8", "replace"))
        if piece.filled is not None:
            yield Document(np.array(piece.filled, np.uint32), size, piece.of, True, True)
        else:
            ids = next(plain)
            yield Document(np.concatenate([ids, end]) if piece.is_last else ids, size, piece.of, piece.is_code)


def _pieces(
    tokenizer: Tokenizer, of: int, number: int | None, text: str, place: str, options: CodeOptions
) -> Iterator[_Piece]:
    language, fim = language_of(place) or options.language, options.fim if number is not None else None
    if language is None:
        yield _Piece(of, text, True, False, None)
        return
    cut = [text]
    if options.chunk is not None:
        room = options.chunk - (4 if fim is not None else 1)  # for the end, and the marks of three parts
        cut = chunks(text, room, language, lambda piece: len(tokenizer.encode(piece)))
    for part, piece in enumerate(cut):
        filled = None
        if fim is not None and number is not None:
            filled = fim_document(tokenizer, piece, fim, number, part=part, language=language)
        if filled is not None and options.chunk is not None and len(filled) > options.chunk:
            filled = None  # its parts, encoded apart, are a few tokens more than the whole
        yield _Piece(of, piece, part == len(cut) - 1, True, filled)
