"""What a token stands for, and how to show it to a person.

Whole characters are shown as they are, bytes cut out of a character as ⟨e3⟩, white space as · ⇥ ⏎. Knows how other
kinds of tokenizer spell their vocabulary: WordPiece's `##`, SentencePiece's `▁` and `<0xE3>`, `</w>` of older BPE.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from moai_llm.tokenizer.load import Tokenizer

WHITESPACE = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
JOINERS = "\u200c\u200d"  # they hold the parts of an emoji or of a word together
HIDDEN = ("Cc", "Cf", "Cn", "Co", "Zl", "Zp", "Zs")  # categories of characters that draw nothing of their own


class Piece(NamedTuple):
    """One token as shown: `cut` holds bytes of an unfinished character, `unknown` is what the tokenizer writes for
    text it has no token for.
    """

    id: int
    text: str
    kind: Literal["text", "cut", "special", "unknown"]
    ends_line: bool = False


class Vocabulary:
    """What each id of a tokenizer stands for.

    Attributes:
        kind: how it was made, in words.
        bytes_of: (vocabulary,) the UTF-8 bytes of each ordinary token, b"" for special ones.
        unknown: the id of text without a token; None where there is no such id.
        exact: whether tokens are plain bytes of the text (byte-level BPE), so that joining them gives it back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        backend: Any = tokenizer.backend
        steps = _decoder_steps(backend)
        model = type(backend.model).__name__
        names: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.exact = any(step["type"] == "ByteLevel" for step in steps)
        self.kind = "byte-level BPE" if self.exact and model == "BPE" else model
        self.special = {i: name for name, i in tokenizer.special_ids.items()}
        self.unknown = _unknown_id(backend)
        self.bytes_of = [b""] * (1 + max(names.values(), default=-1))
        for i in names.values():
            self.bytes_of[i] = tokenizer.token_bytes(i)
        self._prefix = next((step["prefix"] for step in steps if step["type"] == "WordPiece"), "")
        self._continued = {i for name, i in names.items() if self._prefix and name.startswith(self._prefix)}

    def __len__(self) -> int:
        return len(self.bytes_of)

    def piece(self, token_id: int) -> Piece:
        if token_id == self.unknown:
            return Piece(token_id, self.special.get(token_id) or visible(self.bytes_of[token_id]), "unknown")
        if token_id in self.special:
            return Piece(token_id, self.special[token_id], "special")
        data = self.bytes_of[token_id] if token_id < len(self.bytes_of) else b""
        text = (self._prefix if token_id in self._continued else "") + visible(data)
        return Piece(token_id, text, "text" if _is_text(data) else "cut", data.endswith(b"\n"))

    def pieces(self, ids: Iterable[int]) -> Iterator[Piece]:
        return map(self.piece, ids)


def visible(data: bytes) -> str:
    """Bytes as a person can read them, on one line: every byte that is not part of a whole character, every white
    space, control character and lone combining mark is spelled out.

    >>> visible(" 가\\n".encode() + b"\\xe3\\x81")
    '·가⏎⟨e3 81⟩'
    """
    shown: list[str] = []
    text = data.decode("utf-8", "surrogateescape")
    for found in re.finditer("[\udc80-\udcff]+|[^\udc80-\udcff]", text):
        part = found[0]
        kind = unicodedata.category(part[0])
        if kind == "Cs":
            shown.append(f"⟨{part.encode('utf-8', 'surrogateescape').hex(' ')}⟩")
            continue
        if part in WHITESPACE:
            shown.append(WHITESPACE[part])
        elif kind in HIDDEN and not (part in JOINERS and 0 < found.start() < len(text) - 1):
            shown.append(f"⟨U+{ord(part):04X}⟩")
        elif kind in ("Mn", "Me", "Mc") and not shown:
            shown.append("◌" + part)
        else:
            shown.append(part)
    return "".join(shown)


def shortened(shown: str, limit: int = 24) -> str:
    """A long token on little room: a run of one character as `·×128`, the middle of anything else left out."""
    if len(shown) <= limit:
        return shown
    runs = re.sub(r"(.)\1{5,}", lambda run: f"{run[1]}×{len(run[0])}", shown)
    return runs if len(runs) <= limit else runs[: limit // 2] + "…" + runs[-(limit // 2 - 1) :]


def _is_text(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoder_steps(backend: Any) -> list[dict[str, Any]]:
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return []
    spec = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = spec.get("decoders", [spec])
    return steps


def _unknown_id(backend: Any) -> int | None:
    model = backend.model
    if type(model).__name__ == "Unigram":  # it keeps the id only, and does not show it
        found: int | None = json.loads(model.__getstate__()).get("unk_id")
        return found
    name = getattr(model, "unk_token", None)
    return None if name is None else backend.token_to_id(name)
