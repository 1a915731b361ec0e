"""Ordinary text through the `tokenizers` library: the definition of a tokenizer's ids, and what its tokens stand for.

Slower than the twin and right for every kind of tokenizer: WordPiece, Unigram, SentencePiece's BPE, byte-level BPE.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import unspell

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def plain_backend(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that never makes a control token of text, never truncates and never pads.

    Text that looks like a control token is not taken out for one. Where a control token also lies in the vocabulary of
    the model, as in SentencePiece's, the model itself could find it in the text: there it gets a name nobody can write.
    """
    spec = json.loads(backend.to_str())
    spec["truncation"] = spec["padding"] = spec["post_processor"] = None
    model = spec["model"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    in_use = {name for left, right in pairs for name in (left, right, left + right)} | {model.get("unk_token")}
    secret = secrets.token_hex(8)
    hidden = {
        token["content"]: f"{token['content']} {secret}"
        for token in spec["added_tokens"]
        if token["special"] and token["content"] not in in_use
    }
    if isinstance(model["vocab"], dict):
        inside = hidden.keys() & model["vocab"].keys()
        model["vocab"] = {hidden.get(name, name): i for name, i in model["vocab"].items()}
    else:  # Unigram: (piece, score)
        inside = hidden.keys() & {name for name, _ in model["vocab"]}
        model["vocab"] = [[hidden.get(name, name), score] for name, score in model["vocab"]]
    for token in spec["added_tokens"]:
        if token["content"] in inside:
            token["content"] = hidden[token["content"]]
    plain = tokenizers.Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    return plain


def encode_all(plain: tokenizers.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts, which may hold lone surrogates, in parallel.

    Raises:
        MoaiError: a text that the library's regular expressions give up on: one run of ten million spaces or letters.
    """
    try:
        if len(texts) == 1:  # without the threads of the library
            return [plain.encode(clean(texts[0]), add_special_tokens=False).ids]
        encoded = plain.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
        return [one.ids for one in encoded]
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a failed assertion in Rust arrives
            raise
        longest = max(map(len, texts))
        raise MoaiError(
            f"a text of {longest:,} characters holds too long a run without a break to be cut into tokens ({error}): "
            "cut it, or leave it out"
        ) from None


def clean(text: str) -> str:
    """Lone surrogates, which have no UTF-8, become U+FFFD; pairs of them the character they stand for."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bytes_reader(spec: Mapping[str, Any]) -> Callable[[str], bytes]:
    """How the names of a vocabulary are read as bytes of text, from the decoder of a tokenizer.json.

    Byte-level names are bytes, `<0xE3>` is the byte E3 where there is byte fallback, SentencePiece's `▁` and the end of
    a word are a space, a continuing `##` is nothing. The space that SentencePiece puts before a text counts as one.
    """
    decoder = spec.get("decoder")
    steps = [] if decoder is None else decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"]: step for step in steps}
    if "ByteLevel" in kinds:
        return lambda name: unspell(name) or name.encode()

    def read(name: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _FALLBACK_BYTE.fullmatch(name)):
            return bytes.fromhex(byte[1])
        if "WordPiece" in kinds:
            name = name.removeprefix(kinds["WordPiece"]["prefix"])
        if "BPEDecoder" in kinds:
            name = name.replace(kinds["BPEDecoder"]["suffix"], " ")
        if "Metaspace" in kinds:
            name = name.replace(kinds["Metaspace"]["replacement"], " ")
        for step in steps:
            if step["type"] == "Replace" and "String" in step["pattern"]:
                name = name.replace(step["pattern"]["String"], step["content"])
        return name.encode()

    return read
