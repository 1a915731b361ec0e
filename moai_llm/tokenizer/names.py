"""The encodings that OpenAI published for tiktoken, as tokenizers like any other: o200k_base, cl100k_base, r50k_base.

Their files hold the rank of each token's bytes and no merges. The merges are recovered from the ranks, so that a
`tokenizer.json` can be written; ids of ordinary text are those of tiktoken. To their own control tokens three are added
behind the last id: `<|pad|>`, `<|im_start|>` and `<|im_end|>`, for training and for chat.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import build_bpe, recover_merges, spell
from moai_llm.tokenizer.split import CL100K_SPLIT, GPT2_SPLIT, O200K_SPLIT

_END = "<|endoftext|>"
_PLACE = "https://openaipublic.blob.core.windows.net/encodings/"
ADDED = ("<|pad|>", "<|im_start|>", "<|im_end|>")


class Encoding(NamedTuple):
    """What is known of a published encoding: its file, the sha256 of it, and what the file does not say."""

    file: str
    sha256: str
    pattern: str
    special: dict[str, int]

    @property
    def url(self) -> str:
        return _PLACE + self.file


_R50K = Encoding(
    "r50k_base.tiktoken",
    "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    GPT2_SPLIT,
    {_END: 50256},
)
ENCODINGS = {
    "o200k_base": Encoding(
        "o200k_base.tiktoken",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        O200K_SPLIT,
        {_END: 199999, "<|endofprompt|>": 200018},  # 199998 and 200000 to 200017 stand for nothing
    ),
    "cl100k_base": Encoding(
        "cl100k_base.tiktoken",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        CL100K_SPLIT,
        {
            _END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "r50k_base": _R50K,
    "gpt2": _R50K,  # the same merges and ids
}


def load_named(name: str) -> tokenizers.Tokenizer:
    """An encoding by name. Its file is taken from tiktoken's cache, or fetched into it.

    Raises:
        MoaiError: it is not in the cache and cannot be fetched; the message says where to put the file.
    """
    from tiktoken.load import read_file_cached

    encoding = ENCODINGS[name]
    try:
        content = read_file_cached(encoding.url, encoding.sha256)
    except (OSError, ValueError) as error:  # those of requests are OSErrors
        key = hashlib.sha1(encoding.url.encode()).hexdigest()
        raise MoaiError(
            f"{name} is not on this machine and could not be fetched ({type(error).__name__}): get {encoding.url} "
            f"elsewhere and give the file itself, PATH/{encoding.file}, instead of the name; or set TIKTOKEN_CACHE_DIR "
            f"to a folder that holds it under the name {key}"
        ) from None
    return convert(read_ranks(content), encoding.pattern, encoding.special)


def load_file(path: Path) -> tokenizers.Tokenizer:
    """An encoding from its published `.tiktoken` file, whatever its name; it is known by its sha256.

    Raises:
        MoaiError: there is no such file, it is damaged, or it is none of those known here.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MoaiError(f"{path} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(content).hexdigest()
    for encoding in ENCODINGS.values():
        if encoding.sha256 == digest:
            return convert(read_ranks(content), encoding.pattern, encoding.special)
    if path.stem in ENCODINGS:
        raise MoaiError(
            f"{path} is not the published {path.stem} (its sha256 is {digest[:16]}..., not "
            f"{ENCODINGS[path.stem].sha256[:16]}...): it is damaged or cut short, get it again from "
            f"{ENCODINGS[path.stem].url}"
        )
    known = ", ".join(sorted({encoding.file for encoding in ENCODINGS.values()}))
    raise MoaiError(
        f"{path} is none of the files known here ({known}): a .tiktoken file says neither how text is split nor which "
        "control tokens there are. Convert it to a tokenizer.json first, with TikTokenConverter of transformers"
    )


def read_ranks(content: bytes) -> dict[bytes, int]:
    """Tokens and ranks of a `.tiktoken` file: a line each, the bytes in base64 and the rank."""
    lines = (line.split() for line in content.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def convert(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> tokenizers.Tokenizer:
    """A `tokenizers` tokenizer with the ids of a tiktoken encoding, and `ADDED` behind its last id.

    Args:
        ranks: of each token's bytes; they are the ids.
        pattern: how text is split.
        special: control tokens and their ids, which may leave holes.

    Raises:
        MoaiError: the ranks are not those of a byte-pair encoding.
    """
    merges = [(spell(left), spell(right)) for left, right in recover_merges(ranks)]
    control = dict(sorted(special.items(), key=lambda item: item[1]))
    last = max(*ranks.values(), *control.values())
    control.update({name: last + i for i, name in enumerate(ADDED, 1)})
    # The control tokens are written into the vocabulary as well, else `tokenizers` would count their ids from its size.
    vocab = {spell(token): rank for token, rank in ranks.items()} | control
    backend = build_bpe(vocab, merges, pattern)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return backend
