"""What kind of text each token of a vocabulary is: letters by script, digits, punctuation, code, white space."""

from __future__ import annotations

import unicodedata

import numpy as np

from moai_llm.tokenizer import Tokenizer

CLASSES = (
    "latin", "hangul", "kana", "han", "cyrillic", "other letters", "digits", "punctuation", "code", "white space",
    "part of a character", "control",
)  # fmt: skip
CODE = frozenset("{}[]()<>=+*/\\|&^~#@$%_`;")  # signs that prose seldom has; brackets of prose are among them
SCRIPTS = {
    "LATIN": "latin", "HANGUL": "hangul", "HIRAGANA": "kana", "KATAKANA": "kana", "KATAKANA-HIRAGANA": "kana",
    "CJK": "han", "CYRILLIC": "cyrillic",
}  # fmt: skip


def token_classes(tokenizer: Tokenizer) -> np.ndarray:
    """(vocabulary,) int64: the number of the class of each id, in CLASSES."""
    number = {name: i for i, name in enumerate(CLASSES)}
    return np.array([number[class_of(tokenizer.token_bytes(i))] for i in range(tokenizer.vocab_size)], dtype=np.int64)


def class_of(piece: bytes) -> str:
    """Of one token: its letters decide where it has any, the script with most of them; then digits, then signs."""
    if not piece:
        return "control"
    try:
        text = piece.decode("utf-8")
    except UnicodeDecodeError:
        return "part of a character"
    text = "".join(text.split())
    if not text:
        return "white space"
    letters = [_script(c) for c in text if c.isalpha()]
    if letters:
        return max(dict.fromkeys(letters), key=letters.count)
    if any(c.isdigit() for c in text):
        return "digits"
    return "code" if any(c in CODE for c in text) else "punctuation"


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ", 1)[0]
    return SCRIPTS.get(name, "latin" if name == "FULLWIDTH" else "other letters")
