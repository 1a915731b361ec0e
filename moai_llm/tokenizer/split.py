"""The regular expressions that split text before BPE, and which of them both regex engines read alike.

`tokenizers` splits with Oniguruma, tiktoken with Rust's fancy-regex. The same pattern can mean two things: `{1,3}+` is
possessive in one and a nested repetition in the other, `$` is the end of a line in one and of the text in the other,
and `tokenizers` keeps text that no alternative matches, which tiktoken drops.
"""

from __future__ import annotations

# Of words a leading space, contractions of English; runs of digits, of signs, of spaces. A ByteLevel pre-tokenizer
# without a pattern applies it.
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
