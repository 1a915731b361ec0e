"""A tokenizer at run time: `tokenizer.json` on disk, a tiktoken twin of the same merges for encoding.

Ordinary text never becomes a control token here: `encode` has no way to produce one. Control tokens are placed by
`chat.render` and by id.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from moai_llm.runtime import MoaiError, did_you_mean, processors
from moai_llm.tokenizer.definition import bytes_reader, clean, encode_all, plain_backend

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
PADDED_TO = 128  # models round the vocabulary up to this, with rows that no token uses
WORTH_THREADS = 1 << 18  # characters of a batch from which on threads gain more than they cost


class Tokenizer:
    """Encode, decode and the ids that matter.

    Args:
        backend: a `tokenizers.Tokenizer`.
        roles: names of the special tokens: `pad_token`, `eos_token`, `bos_token`.
        chat_template: Jinja source kept for transformers; rendering here goes through tokenizer/chat.py.

    Attributes:
        vocab_size: the largest id plus one. Where a vocabulary has holes, as o200k_base has, there are fewer tokens.
        special_ids: the id of each control token.
    """

    def __init__(self, backend: tokenizers.Tokenizer, roles: dict[str, str], chat_template: str | None = None) -> None:
        self.backend = backend
        self.roles, self.chat_template = roles, chat_template
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self._added = {i: token.content for i, token in sorted(backend.get_added_tokens_decoder().items())}
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self.special_ids: dict[str, int] = {content: i for i, content in self._added.items() if i in special}

    def __len__(self) -> int:
        return self.vocab_size

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the twin comes along, and the backend is built there only if something needs it."""
        state = {name: value for name, value in vars(self).items() if name not in ("backend", "_plain")}
        return {**state, "_twin": self._twin, "_packed": zlib.compress(self.backend.to_str().encode(), 1)}

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """What defines the tokenizer."""
        return tokenizers.Tokenizer.from_str(zlib.decompress(vars(self)["_packed"]).decode())

    def __repr__(self) -> str:
        kind = type(self.backend.model).__name__
        return f"Tokenizer({kind}, {self.vocab_size:,} ids, special tokens: {' '.join(self.special_ids) or 'none'})"

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary of a model for this tokenizer: rounded up to a multiple of 128."""
        return -(-self.vocab_size // PADDED_TO) * PADDED_TO

    @property
    def special_tokens(self) -> list[str]:
        """Names of the control tokens, by id."""
        return list(self.special_ids)

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
        """Ids of ordinary text. A lone surrogate is encoded as U+FFFD.

        Raises:
            MoaiError: one run of ten million spaces; some tokenizers also refuse such a run of letters.
        """
        if self._twin is not None:
            try:
                ids = self._twin.encode(text)
            except UnicodeEncodeError:
                text = clean(text)
                ids = self._twin.encode(text)
            if ids is not None:
                return ids
        return encode_all(self._plain, [text])[0]

    def encode_batch(self, texts: Iterable[str], *, threads: int | None = None) -> list[list[int]]:
        """`encode` of each text.

        Args:
            threads: at most so many, one for each processor by default. A small batch uses one. Tokenizers without a
                twin choose for themselves.
        """
        texts = list(texts)
        if self._twin is None:
            return encode_all(self._plain, texts)
        threads = threads or processors()
        if threads == 1 or sum(map(len, texts)) < WORTH_THREADS:
            return [self.encode(text) for text in texts]
        step = -(-len(texts) // (4 * threads))  # a few chunks each, so that one long text does not keep all waiting
        with ThreadPoolExecutor(threads) as pool:
            chunks = pool.map(
                lambda start: [self.encode(text) for text in texts[start : start + step]], range(0, len(texts), step)
            )
            return [ids for chunk in chunks for ids in chunk]

    def encode_array(self, text: str) -> np.ndarray:
        """`encode` as (tokens,) uint32."""
        if self._twin is not None:
            try:
                ids = self._twin.encode_array(text)
            except UnicodeEncodeError:
                text = clean(text)
                ids = self._twin.encode_array(text)
            if ids is not None:
                return ids
        return np.array(encode_all(self._plain, [text])[0], dtype=np.uint32)

    def encode_arrays(self, texts: Sequence[str], *, threads: int = 1) -> list[np.ndarray]:
        """`encode_array` of each text, in so many threads."""
        if self._twin is None:
            return [np.array(ids, dtype=np.uint32) for ids in encode_all(self._plain, texts)]
        if threads == 1 or sum(map(len, texts)) < WORTH_THREADS:
            return [self.encode_array(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode_array, texts))

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Ids that stand for nothing (padding rows, holes) give
        nothing.
        """
        kept = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if not self._is_byte_level:
            return self.backend.decode(kept, skip_special_tokens=skip_special)
        names = {} if skip_special else {i: name.encode() for name, i in self.special_ids.items()}
        return b"".join([self._bytes_of[i] or names.get(i, b"") for i in kept]).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of a control token by its name, else of the token that stands for this text; None if there is none."""
        if token in self.special_ids:
            return self.special_ids[token]
        return self._id_of_bytes.get(token.encode("utf-8", "replace"))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one ordinary token; b"" for special tokens, holes and padding rows."""
        return self._bytes_of[token_id] if token_id < len(self._bytes_of) else b""

    def byte_lengths(self) -> np.ndarray:
        """(padded vocabulary,) int64: bytes of text each id stands for, 0 for special tokens."""
        lengths = np.zeros(self.padded_vocab_size, dtype=np.int64)
        lengths[: len(self._bytes_of)] = [len(b) for b in self._bytes_of]
        return lengths

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        read = bytes_reader(json.loads(self.backend.to_str()))
        table = [b""] * self.vocab_size
        for i, content in self._added.items():  # as it is, not in the spelling of the vocabulary
            table[i] = content.encode()
        for token, i in self.backend.get_vocab(with_added_tokens=False).items():
            table[i] = read(token)
        for i in self.special_ids.values():
            table[i] = b""
        return table

    @cached_property
    def _id_of_bytes(self) -> dict[bytes, int]:
        return {token: i for i, token in reversed(list(enumerate(self._bytes_of))) if token}

    @cached_property
    def _is_byte_level(self) -> bool:
        return type(self.backend.decoder).__name__ == "ByteLevel"

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """What defines the ids; slower than the twin."""
        return plain_backend(self.backend)

    @cached_property
    def _twin(self) -> Any:
        """tiktoken over the same merges; None where there is no certain one."""
        from moai_llm.tokenizer.twin import make_twin

        return make_twin(self.backend)

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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory (a tokenizer's or a model's), of a tokenizer.json, of a published `.tiktoken` file,
    or one of the encodings known by name: o200k_base, cl100k_base, r50k_base, gpt2.

    Raises:
        MoaiError: there is none, or it cannot be read.
    """
    from moai_llm.tokenizer.names import ENCODINGS, load_file, load_named

    name, path = str(path), Path(path)
    if name in ENCODINGS and not path.exists():
        return _from_encoding(load_named(name))
    if path.suffix == ".tiktoken":
        return _from_encoding(load_file(path))
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        hint = did_you_mean(name, ENCODINGS) if not path.exists() else ""
        raise MoaiError(f"{path}: no tokenizer.json there{hint}; train one with `moai tokenizer train`")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise MoaiError(f"{file} is not a readable tokenizer: {error}") from None
    config = _read_config(file.with_name("tokenizer_config.json"))
    roles = {}
    for role in ("pad_token", "eos_token", "bos_token"):
        value = config.get(role)
        if value is not None:
            roles[role] = value["content"] if isinstance(value, dict) else value
    template_file = file.with_name("chat_template.jinja")
    try:
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    except UnicodeDecodeError as error:
        raise MoaiError(f"{template_file} is not text in UTF-8: {error}") from None
    if isinstance(template, list):  # several by name, as older files have them
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return Tokenizer(backend, roles, template)


def _from_encoding(backend: tokenizers.Tokenizer) -> Tokenizer:
    from moai_llm.tokenizer.chat import CHATML_JINJA

    return Tokenizer(backend, {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PAD}, CHATML_JINJA)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MoaiError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise MoaiError(f"{file} is not an object of JSON")
    return config
