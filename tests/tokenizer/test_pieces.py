"""Tokens as a person reads them, of every kind of vocabulary."""

from __future__ import annotations

import pytest

from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.pieces import Vocabulary, shortened, visible
from tests.tokenizer import foreign


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", ""),
        ("hello 가".encode(), "hello·가"),
        (b"\xe3", "⟨e3⟩"),
        (" 가".encode() + b"\xe3\x81", "·가⟨e3 81⟩"),
        (b"\x80a\xff\xfe", "⟨80⟩a⟨ff fe⟩"),
        (b" \n\t\r\n", "·⏎⇥␍⏎"),
        ("a\u3000b\u00a0\x00".encode(), "a⟨U+3000⟩b⟨U+00A0⟩⟨U+0000⟩"),
        ("\u202e".encode(), "⟨U+202E⟩"),  # would turn the rest of the line around
        ("👩\u200d👧".encode(), "👩\u200d👧"),  # one family
        ("\u200d👧".encode(), "⟨U+200D⟩👧"),  # a family cut in two
        ("\u0301x\u0301".encode(), "◌\u0301x\u0301"),
        (b"\xed\xa0\x80", "⟨ed a0 80⟩"),  # a surrogate is no UTF-8
    ],
)
def test_visible(data: bytes, shown: str) -> None:
    assert visible(data) == shown


def test_shortened() -> None:
    assert shortened("short") == "short" and shortened("a" * 24) == "a" * 24
    assert shortened("·" * 128) == "·×128"
    assert shortened("abcdefghijklmnopqrstuvwxyz" * 2) == "abcdefghijkl…pqrstuvwxyz"


def test_our_own(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.exact and vocabulary.kind == "byte-level BPE" and vocabulary.unknown is None
    assert len(vocabulary) == tokenizer.vocab_size
    text = "the quick 이자 🙂\n"
    ids = tokenizer.encode(text)
    assert b"".join(vocabulary.bytes_of[i] for i in ids) == text.encode()
    pieces = list(vocabulary.pieces([*ids, tokenizer.eos_id]))
    assert [piece.id for piece in pieces] == [*ids, tokenizer.eos_id]
    assert pieces[-1].text == "<|endoftext|>" and pieces[-1].kind == "special"
    assert [piece.text for piece in pieces if piece.kind == "cut"][-3:] == ["⟨9f⟩", "⟨99⟩", "⟨82⟩"]
    assert pieces[-2].text == "⏎" and pieces[-2].ends_line and not pieces[0].ends_line
    assert vocabulary.piece(10**9).text == ""  # a padding row


def test_wordpiece() -> None:
    made = Tokenizer(foreign.wordpiece(), {})
    vocabulary = Vocabulary(made)
    assert vocabulary.kind == "WordPiece" and not vocabulary.exact
    pieces = list(vocabulary.pieces(made.encode("Hello worldly ☃")))
    assert pieces[-1].text == "[UNK]" and pieces[-1].kind == "unknown" and pieces[-1].id == vocabulary.unknown
    assert "".join(piece.text for piece in pieces[:-1]).replace("##", "") == "helloworldly"
    assert any(piece.text.startswith("##") for piece in pieces)
    assert all(not vocabulary.bytes_of[piece.id].startswith(b"##") for piece in pieces)


def test_byte_fallback() -> None:
    made = Tokenizer(foreign.byte_fallback(), {})
    vocabulary = Vocabulary(made)
    pieces = list(vocabulary.pieces(made.encode("he 가나")))
    assert [piece.text for piece in pieces] == ["·he", "·", "가", "⟨eb⟩", "⟨82⟩", "⟨98⟩"]
    assert [piece.kind for piece in pieces][-3:] == ["cut"] * 3
    assert vocabulary.bytes_of[1 + 0xE3] == b"\xe3" and vocabulary.unknown == 0


def test_unigram_and_word_ends() -> None:
    made = Tokenizer(foreign.unigram(), {})
    vocabulary = Vocabulary(made)
    assert vocabulary.kind == "Unigram" and vocabulary.unknown == 1 == made.encode("☃")[-1]
    assert b"".join(vocabulary.bytes_of[i] for i in made.encode("the bank")) == b" the bank"
    made = Tokenizer(foreign.word_ends(), {})
    assert [piece.text for piece in Vocabulary(made).pieces(made.encode("hi h"))] == ["hi·", "<unk>"]
