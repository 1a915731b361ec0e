"""Writes a token store; `shards.py` says what is in one and reads it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from moai_llm.data.shards import Kind, Manifest, close_synced, refuse_existing, sha256_of
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

SHARD_TOKENS = 1 << 26  # 128 or 256 MiB a shard


class StoreWriter:
    """Appends documents; `close` makes the store visible, an exception leaves nothing behind.

    Args:
        out: directory to create.
        overwrite: replace a store that is there; otherwise that is an error.
    """

    def __init__(
        self,
        out: str | Path,
        tokenizer: Tokenizer,
        kind: Kind = "text",
        *,
        overwrite: bool = False,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        self.out = Path(out)
        refuse_existing(self.out, overwrite)
        _ = tokenizer.eos_id, tokenizer.pad_id  # training needs both: a tokenizer without them is refused here
        self.tokenizer, self.shard_tokens = tokenizer, shard_tokens
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self.manifest = Manifest(kind, tokenizer.fingerprint, tokenizer.vocab_size, dtype)
        self._token_dtype = np.dtype(dtype).newbyteorder("<")
        self._tmp = self.out.with_name(f".tmp-{self.out.name}-{os.getpid()}")
        shutil.rmtree(self._tmp, ignore_errors=True)
        (self._tmp / "shards").mkdir(parents=True)
        self._borders = [0]
        self._files: dict[str, IO[bytes]] = {}

    def add(self, ids: list[int], text_bytes: int, learn: list[bool] | None = None) -> None:
        """Append one document; every store but one of text also needs `learn`, as long as ids."""
        assert (learn is None) == (self.manifest.kind == "text")
        if not ids:
            return
        self._file("bin").write(np.asarray(ids, dtype=self._token_dtype).tobytes())
        if learn is not None:
            assert len(learn) == len(ids)
            self._file("mask.bin").write(bytes(learn))
        self._borders.append(self._borders[-1] + len(ids))
        self.manifest.text_bytes += text_bytes
        if self._borders[-1] >= self.shard_tokens:
            self._finish_shard()

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return self.manifest.tokens + self._borders[-1]

    def _stem(self) -> str:
        return f"shards/{len(self.manifest.shards):05d}"

    def _file(self, suffix: str) -> IO[bytes]:
        if suffix not in self._files:
            self._files[suffix] = (self._tmp / f"{self._stem()}.{suffix}").open("wb")
        return self._files[suffix]

    def _finish_shard(self) -> None:
        if len(self._borders) == 1:
            return
        np.save(self._file("idx.npy"), np.asarray(self._borders, dtype=np.int64))
        described = {}
        for suffix, file in sorted(self._files.items()):
            close_synced(file)
            name = f"{self._stem()}.{suffix}"
            path = self._tmp / name
            described[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        tokens, documents = self._borders[-1], len(self._borders) - 1
        self.manifest.shards.append(
            {"stem": self._stem(), "tokens": tokens, "documents": documents, "files": described}
        )
        self.manifest.tokens += tokens
        self.manifest.documents += documents
        self._borders, self._files = [0], {}

    def close(self, sources: list[str] | None = None) -> Manifest:
        """Write what is left and the manifest, and rename into place.

        Raises:
            MoaiError: no document was added.
        """
        self._finish_shard()
        if not self.manifest.documents:
            self.abort()
            raise MoaiError("no document had any token: the sources are empty")
        self.manifest.sources = sources or []
        self.tokenizer.save(self._tmp / "tokenizer")
        file = (self._tmp / "manifest.json").open("wb")
        file.write(json.dumps(asdict(self.manifest), indent=2, ensure_ascii=False).encode())
        close_synced(file)
        replaced = self._tmp.with_name(self._tmp.name + "-old")
        if self.out.exists():
            os.replace(self.out, replaced)
        os.replace(self._tmp, self.out)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.manifest

    def abort(self) -> None:
        """Forget everything written so far."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._tmp, ignore_errors=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
