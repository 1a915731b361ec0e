"""Vectors that are done, in a file beside the output, so that a kill loses nothing: the next run with the same model,
texts and options does the rest, in the same batches, and ends with the same bytes.

The file is a line of JSON that says what it is of, then for each vector the number of its text and its numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moai_llm.data.shards import sha256_of
from moai_llm.inference.embed import Embedder
from moai_llm.runtime import MoaiError

NAMES = {
    "model": "another model", "texts": "other texts", "max_length": "another --max-length", "dtype": "another --dtype",
    "device": "another --device", "batch_tokens": "batches of another size", "width": "vectors of another width",
}  # fmt: skip


class PartialVectors:
    """Vectors of texts, kept as they come.

    Attributes:
        vectors: (texts, D) fp32, zero where none is known yet.
        done: (texts,) bool.

    Raises:
        MoaiError: the file is the beginning of something else.
    """

    def __init__(
        self, path: Path, embedder: Embedder, texts: Sequence[str], max_length: int | None, batch_tokens: int
    ) -> None:
        self.path, width = path, embedder.model.width
        self.vectors, self.done = np.zeros((len(texts), width), np.float32), np.zeros(len(texts), bool)
        self._record = np.dtype([("text", "<i8"), ("vector", "<f4", (width,))])
        self._header = {
            "model": _model(embedder.path), "texts": _digest(texts), "max_length": max_length,
            "dtype": str(embedder.model.dtype), "device": embedder.model.device.type, "batch_tokens": batch_tokens,
            "width": width,
        }  # fmt: skip
        if path.exists():
            self._take_over()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._header) + "\n", encoding="utf-8")

    def _take_over(self) -> None:
        with self.path.open("r+b") as file:
            line = file.readline()
            try:
                found = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                found = {}
            if found is None:  # a kill while it was begun: nothing is in it
                file.truncate(0)
                file.seek(0)
                file.write(json.dumps(self._header).encode() + b"\n")
                return
            if found != self._header:
                other = [what for key, what in NAMES.items() if found.get(key, "") != self._header[key]]
                raise MoaiError(
                    f"{self.path} is the beginning of a run with {', '.join(other)}: repeat that one to go on, or add "
                    "--overwrite to begin again"
                )
            content = file.read()
            count = len(content) // self._record.itemsize  # a kill may have cut the last one
            known = np.frombuffer(content, self._record, count)
            file.truncate(len(line) + count * self._record.itemsize)
        self.vectors[known["text"]] = known["vector"]
        self.done[known["text"]] = True

    def add(self, places: Sequence[int], vectors: np.ndarray) -> None:
        """Keep the vectors of a batch for good."""
        records = np.empty(len(places), self._record)
        records["text"], records["vector"] = places, vectors
        with self.path.open("ab") as file:
            file.write(records.tobytes())
        self.vectors[places], self.done[places] = vectors, True

    def close(self) -> None:
        """The output is there: what was kept for it goes."""
        self.path.unlink()


def _model(directory: Path) -> str:
    files = [*sorted(directory.glob("*.safetensors")), directory / "config.json", directory / "tokenizer.json"]
    return _digest([sha256_of(file) for file in files if file.is_file()])


def _digest(texts: Sequence[str]) -> str:
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()
