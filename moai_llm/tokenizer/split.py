r"""The regular expressions that split text before BPE, and which of them both regex engines read alike.

`tokenizers` splits with Oniguruma, tiktoken with Rust's fancy-regex. The same pattern can mean two things: `{1,3}+` is
possessive in one and a nested repetition in the other, `$` is the end of a line in one and of the text in the other,
`\w` is another class, the two may know different versions of Unicode, and `tokenizers` keeps text that no alternative
matches where tiktoken drops it.
"""

from __future__ import annotations

import re
from functools import cache

import tokenizers
from tokenizers import normalizers

# GPT-2's: contractions of English; words, numbers and signs with the space before them; runs of spaces. It is what a
# ByteLevel pre-tokenizer applies when no pattern is written down.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_APOSTROPHE = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# cl100k_base; Llama 3 has the same, Qwen the same with single digits.
CL100K_SPLIT = "|".join(
    [
        _APOSTROPHE,
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# o200k_base, and what we train with: words by case and script, digits in groups of up to three, operators with their
# line end, line ends, runs of spaces.
O200K_SPLIT = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _APOSTROPHE + "?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _APOSTROPHE + "?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_BYTES = {bytes([i]): i for i in range(256)}

# what a safe pattern is made of
_CATEGORY = r"\\[pP]\{(?:[LMNPSZC]|L[ultmo]|M[nce]|N[dlo]|P[cdseifo]|S[mcko]|Z[slp]|C[cfon])\}|\\[sSdrnt]"
_LITERAL = r"[ A-Za-z0-9'\"/,:;<>=_!@#%`]|\\[.*+?()\[\]{}|^$\\/-]"
_CLASS = rf"\[\^?(?:A-Z|a-z|0-9|{_CATEGORY}|{_LITERAL}|[.*+?(){{}}|])+\]"
_ONE = rf"{_CATEGORY}|{_LITERAL}|{_CLASS}"
# Case-insensitive only are these: one engine also folds letters into several (ss), the other does not.
_CONTRACTIONS = "|".join(map(re.escape, ["(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)"]))
_UNIT = re.compile(
    rf"(?:{_ONE}|\(\?:(?:{_ONE})+(?:\|(?:{_ONE})+)*\)|{_CONTRACTIONS})"
    r"(?P<optional>[?*]|\{0+(?:,\d*)?\})?(?:\+|\{\d+(?:,\d*)?\})?(?![?*+{])"
)
_LAST_SPACE = r"\s+(?!\S)"

# Every ASCII character, and of the others one of each general category, U+0085 being also a space: a safe pattern
# cannot tell more apart.
_EVERY_KIND = [chr(i) for i in range(128)] + list(
    "Ààǅʰ가\u0301\u0903\u20dd٠Ⅷ²‿–⁅⁆«»¡±¢¨©\u00a0\u2028\u2029\u0080\u0085\u00ad\ue000\u0378"
)


def read_alike(pattern: str) -> bool:
    """Whether both engines surely split every text alike by this pattern, `strangers` apart.

    Sure are alternatives of literals, Unicode categories, classes of them, repetitions, plain groups, contractions of
    English and the lookahead of GPT-2's split, where every alternative takes at least one character and every text is
    taken as a whole. The splits of GPT-2, Llama 3, Qwen and o200k are such.
    """
    blind = "|".join(part for part in pattern.split("|") if part != _LAST_SPACE)
    return _is_safe(blind) and _matches_everything(blind)


def _is_safe(pattern: str) -> bool:
    position, takes = 0, False  # whether the alternative so far takes a character
    while position < len(pattern):
        if pattern[position] == "|":
            if not takes:
                return False
            position, takes = position + 1, False
            continue
        unit = _UNIT.match(pattern, position)
        if unit is None:
            return False
        position, takes = unit.end(), takes or unit["optional"] is None
    return takes


def _matches_everything(pattern: str) -> bool:
    """Whether some alternative matches at every place of every text. One that matches a single character matches
    wherever this character stands, since none looks ahead: so it is enough to try single characters.
    """
    import tiktoken

    try:
        splitter = tiktoken.Encoding("moai-split", pat_str=pattern, mergeable_ranks=_BYTES, special_tokens={})
    except ValueError:  # too large for that engine
        return False
    return all(splitter.decode(splitter.encode_ordinary(character)) == character for character in _EVERY_KIND)


@cache
def strangers() -> frozenset[str]:
    """Characters that the two engines put into different categories, being built for different versions of Unicode;
    none where the versions are the same. A new version always has new characters, so those decide.
    """
    every = _every_character()
    if _members(r"\p{Cn}", every) == _members_tiktoken(r"\p{Cn}", every):
        return frozenset()
    groups = {"L": "ultmo", "M": "nce", "N": "dlo", "P": "cdseifo", "S": "mcko", "Z": "slp", "C": "cfon"}
    atoms = [r"\s", *(rf"\p{{{group}{kind}}}" for group, kinds in groups.items() for kind in kinds)]
    return frozenset().union(*(set(_members(atom, every)) ^ set(_members_tiktoken(atom, every)) for atom in atoms))


def _members(atom: str, characters: str) -> str:
    """Those of the characters that `tokenizers` counts to a category, found by taking the others out."""
    others = tokenizers.Regex(atom[0] + atom[1].upper() + atom[2:] + "+")
    return normalizers.Replace(others, "").normalize_str(characters)


def _members_tiktoken(atom: str, characters: str) -> str:
    """The same of tiktoken, which drops what its pattern does not match."""
    import tiktoken

    splitter = tiktoken.Encoding("moai-split", pat_str=atom + "+", mergeable_ranks=_BYTES, special_tokens={})
    return splitter.decode(splitter.encode_ordinary(characters))


def _every_character() -> str:
    """All code points but surrogates and the planes without characters."""
    return "".join(map(chr, (*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000))))
