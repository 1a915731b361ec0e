"""A tokenizer at run time: `tokenizer.json` on disk, a tiktoken twin of the same merges for encoding.

Ordinary text never becomes a control token here: `encode` has no way to produce one. Control tokens are placed by
`chat.render` and by id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moai_llm.runtime import MoaiError
from moai_llm.tokenizer.byte_level import BYTE_OF
from moai_llm.tokenizer.split import GPT2_SPLIT

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PADDED_TO = 128  # models round the vocabulary up to this, with rows that no token uses


class Tokenizer:
    """Encode, decode and the ids that matter.

    Args:
        backend: a `tokenizers.Tokenizer`.
        roles: names of the special tokens: `pad_token`, `eos_token`, `bos_token`.
        chat_template: Jinja source kept for transformers; rendering here goes through tokenizer/chat.py.
    """

    def __init__(self, backend: tokenizers.Tokenizer, roles: dict[str, str], chat_template: str | None = None) -> None:
        self.backend, self.roles, self.chat_template = backend, roles, chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        self._plain = tokenizers.Tokenizer.from_str(backend.to_str())
        self._plain.encode_special_tokens = True  # text that looks like a control token stays text

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary of a model for this tokenizer: rounded up to a multiple of 128."""
        return -(-self.vocab_size // PADDED_TO) * PADDED_TO

    @property
    def eos_id(self) -> int:
        """Ends a document."""
        return self._role("eos_token")

    @property
    def pad_id(self) -> int:
        return self._role("pad_token")

    @property
    def stop_ids(self) -> list[int]:
        """Tokens at which generation stops: the end of a document, and of an answer by the chat template in force."""
        from moai_llm.tokenizer.chat import turn_ends

        return list(dict.fromkeys([self.eos_id, *turn_ends(self)]))

    def _role(self, role: str) -> int:
        token = self.roles.get(role)
        if token is None or token not in self.special_ids:
            some = ", ".join(list(self.special_ids)[:4]) or "it has none, so add one first"
            raise MoaiError(
                f"this tokenizer has no {role}: name one of its special tokens ({some}) as {role!r} in its "
                "tokenizer_config.json, a token that stands for nothing else"
            )
        return self.special_ids[token]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json's content: equal where every text gets equal ids."""
        return hashlib.sha256(json.dumps(json.loads(self.backend.to_str()), sort_keys=True).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. A lone surrogate is encoded as U+FFFD."""
        if self._twin is None:
            return self._plain.encode(_clean(text), add_special_tokens=False).ids
        return self._twin.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._twin is None:
            encoded = self._plain.encode_batch([_clean(text) for text in texts], add_special_tokens=False)
            return [e.ids for e in encoded]
        return [self._twin.encode_ordinary(text) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Ids outside the vocabulary (padding rows) give
        nothing.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self.backend.decode(kept, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one ordinary token; b"" for special tokens and padding rows."""
        return self._bytes_of[token_id] if token_id < len(self._bytes_of) else b""

    def byte_lengths(self) -> np.ndarray:
        """(padded vocabulary,) int64: bytes of text each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.padded_vocab_size, dtype=np.int64)
        lengths[: len(self._bytes_of)] = [len(b) for b in self._bytes_of]
        return lengths

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        special = set(self.special_ids.values())
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in special:
                known = all(c in BYTE_OF for c in token)
                table[i] = bytes(BYTE_OF[c] for c in token) if known else token.encode("utf-8", "replace")
        return table

    @cached_property
    def _twin(self) -> Any:
        """tiktoken over the same merges, several times faster; None where ids are not in merge order."""
        ranks = merge_ranks(json.loads(self.backend.to_str()))
        if ranks is None:
            return None
        import tiktoken

        pattern, mergeable = ranks
        return tiktoken.Encoding("moai", pat_str=pattern, mergeable_ranks=mergeable, special_tokens={})

    def save(self, directory: str | Path) -> Path:
        """Write the files transformers reads: tokenizer.json, tokenizer_config.json, chat_template.jinja."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(path / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **self.roles}
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        if self.chat_template is not None:
            (path / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        return path


def _clean(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge_ranks(spec: dict[str, Any]) -> tuple[str, dict[bytes, int]] | None:
    """(split pattern, bytes -> rank) of a byte-level BPE whose ids are in merge order, else None."""
    model = spec["model"]
    pattern = _split_pattern(spec.get("pre_tokenizer"))
    if model.get("type") != "BPE" or pattern is None or spec.get("normalizer") is not None:
        return None
    if model.get("ignore_merges") or model.get("byte_fallback"):
        return None
    vocab: dict[str, int] = model["vocab"]
    if not all(c in BYTE_OF for token in vocab for c in token):
        return None
    ranks = {bytes(BYTE_OF[c] for c in token): i for token, i in vocab.items()}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    made = [vocab.get(a + b, -1) for a, b in merges]
    singles = [ranks[bytes([b])] for b in range(256) if bytes([b]) in ranks]
    in_order = all(x < y for x, y in zip(made, made[1:])) and len(singles) == 256
    complete = len(ranks) == 256 + len(made) and (not made or max(singles) < made[0])
    return (pattern, ranks) if in_order and complete else None


def _split_pattern(pre: dict[str, Any] | None) -> str | None:
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
        plain = not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]
        return steps[0]["pattern"].get("Regex") if plain else None
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return GPT2_SPLIT
    return None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory (a tokenizer's or a model's) or of a tokenizer.json.

    Raises:
        MoaiError: there is none, or it cannot be read.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        raise MoaiError(f"{path}: no tokenizer.json there; train one with `moai tokenizer train`")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise MoaiError(f"{file} is not a readable tokenizer: {error}") from None
    config: dict[str, Any] = {}
    config_file = file.with_name("tokenizer_config.json")
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
    roles = {}
    for role in ("pad_token", "eos_token", "bos_token"):
        value = config.get(role)
        if value is not None:
            roles[role] = value["content"] if isinstance(value, dict) else value
    template_file = file.with_name("chat_template.jinja")
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several by name, as older files have them
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return Tokenizer(backend, roles, template)
