"""Source code as text for a tokenizer: the sub-words of identifiers, code found on this machine, and what a tokenizer
makes of it. Knows no syntax; see syntax.py for that.

Code needs no vocabulary of its own. Its tokens are those of byte-level BPE with a split that keeps indentation and
operators whole (split.O200K_SPLIT). A syntax tree is never a second vocabulary here: nodes do not become tokens, the
tree only says where text may be cut.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from moai_llm.tokenizer.load import Tokenizer

IDENTIFIER = re.compile(r"[^\W\d]\w*")
# Over one letter a character, see `_kinds`: an acronym ends before the capital of the next word; a capital belongs to
# the small letters behind it; digits, scripts without case and underscores stand apart; m is a combining mark.
_SUBWORD = re.compile(r"(?:Um*)+(?=Um*l)|(?:Um*)?(?:lm*)+|(?:Um*)+|(?:dm*)+|(?:om*)+|_+|m+")


@lru_cache(1 << 14)
def split_identifier(name: str) -> tuple[str, ...]:
    """Sub-words of camelCase, snake_case, SCREAMING_CASE, acronyms and digits; joined they give `name` back.

    >>> split_identifier("HTTPServerError2")
    ('HTTP', 'Server', 'Error', '2')
    >>> split_identifier("snake_case")
    ('snake', '_', 'case')
    """
    return tuple(name[found.start() : found.end()] for found in _SUBWORD.finditer("".join(map(_kind, name))))


def _kind(character: str) -> str:
    """U capital, l small, d digit, m mark, _ underscore, o anything else."""
    if character.islower():
        return "l"
    if character.isupper() or character.istitle():
        return "U"
    if character.isnumeric() and not character.isalpha():
        return "d"
    if character == "_":
        return "_"
    return "m" if unicodedata.category(character).startswith("M") else "o"


def identifier_alignment(tokenizer: Tokenizer, code: str | Iterable[str]) -> float:
    """Of the cuts a tokenizer makes inside identifiers, the share that lie between two sub-words.

    1.0: `getHTTPServer` is never cut inside `get`, `HTTP` or `Server`. A token may hold several sub-words; that is no
    cut. Only identifiers of several sub-words count; where none is cut the share is 1.0. Tokens of single bytes get
    the share of chance, about one in five.
    """
    right = cuts = 0
    for text in [code] if isinstance(code, str) else code:
        borders = {start for start, _ in tokenizer.backend.encode(text, add_special_tokens=False).offsets}
        for found in IDENTIFIER.finditer(text):
            parts = split_identifier(found[0])
            if len(parts) > 1:
                between = {found.start() + length for length in accumulate(map(len, parts))}
                inside = [place for place in range(found.start() + 1, found.end()) if place in borders]
                cuts += len(inside)
                right += sum(place in between for place in inside)
    return right / cuts if cuts else 1.0


class CodeMeasure(NamedTuple):
    """What a tokenizer makes of one language's samples."""

    label: str
    files: int
    text_bytes: int
    bytes_per_token: float
    alignment: float  # see `identifier_alignment`


def measure_code(tokenizer: Tokenizer, samples: dict[str, list[str]]) -> list[CodeMeasure]:
    """Bytes per token and alignment of each language in `samples`, which `code_samples` finds."""
    measures = []
    for label, texts in samples.items():
        size = sum(len(text.encode("utf-8", "replace")) for text in texts)
        tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
        measures.append(
            CodeMeasure(label, len(texts), size, size / max(1, tokens), identifier_alignment(tokenizer, texts))
        )
    return measures


# ---------------------------------------------------------------- code on this machine

_SUFFIXES = {"Python": (".py",), "C": (".h", ".c"), "JavaScript": (".js", ".mjs", ".cjs")}
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
_GENERATED = re.compile(r"\b(auto-?generated|generated\s+(by|from|automatically|with)|do not (edit|modify))\b", re.I)
_LONGEST_LINE, _MEAN_LINE = 1000, 120  # characters; above it a file is minified or a table


class CodeSamples(dict[str, list[str]]):
    """Texts by language. `where` says for every language looked for, also those not found, where from."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[str, str] = {}


def code_samples(budget: int = 1 << 20) -> CodeSamples:
    """Python, C and JavaScript that lies on this machine, to measure a tokenizer on: the standard library, headers,
    and the modules of node or of Python packages.

    At most `budget` bytes a language, each file giving at most an eighth of it, in an order that depends on the
    names of the files only, so two calls give the same. Generated and minified files, tests and files that are not
    UTF-8 are left out. A language of which nothing is found has no entry, and `where` names the folders looked in.
    """
    samples = CodeSamples()
    for label, suffixes in _SUFFIXES.items():
        texts: list[str] = []
        room, used = budget, []
        folders = _folders(label)
        for folder in folders:
            before = len(texts)
            for text in _texts(folder, suffixes, budget // 8):
                if len(text.encode()) <= room:
                    texts.append(text)
                    room -= len(text.encode())
                if room < budget // 64:
                    break
            used += [str(folder)] * (len(texts) > before)
            if room < budget // 64:
                break
        if texts:
            samples[label] = texts
        looked = ", ".join(map(str, folders)) or "nowhere to look"
        samples.where[label] = ", ".join(used) if texts else f"not found ({looked})"
    return samples


def _folders(label: str) -> list[Path]:
    """Where code of a language may lie, the best place first."""
    paths = sysconfig.get_paths()
    if label == "Python":
        wanted = [paths["stdlib"]]
    elif label == "C":
        wanted = [paths["include"], "/usr/include", "/usr/local/include"]
    else:
        node = shutil.which("node")
        wanted = [os.path.join(os.path.dirname(os.path.realpath(node)), "../lib/node_modules")] if node else []
        wanted += ["/usr/share/nodejs", "/usr/share/javascript", paths["purelib"]]
    folders = [Path(os.path.realpath(folder)) for folder in wanted]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def _texts(folder: Path, suffixes: Sequence[str], longest: int) -> Iterator[str]:
    """Hand-written files below a folder, each cut at a line end before `longest` bytes."""
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if name.endswith(tuple(suffixes)) and ".min." not in name]
    # by a hash of the name below the folder: no letter of the alphabet and no package is preferred
    found.sort(key=lambda path: hashlib.sha256(os.path.relpath(path, folder).encode("utf-8", "replace")).digest())
    for path in found:
        try:
            with open(path, "rb") as file:
                data = file.read(longest + 1)
            text = data[: data.rfind(b"\n", 0, longest) + 1 if len(data) > longest else None].decode("utf-8-sig")
        except (OSError, UnicodeDecodeError):
            continue
        if text.strip() and _is_written_by_hand(text):
            yield text


def _is_written_by_hand(text: str) -> bool:
    lines = text.splitlines()
    longest, mean = max(map(len, lines)), len(text) / len(lines)
    return longest <= _LONGEST_LINE and mean <= _MEAN_LINE and not _GENERATED.search(text[:2000])
