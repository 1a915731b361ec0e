"""Keys and values in a file that is mapped into memory, so that a context may be longer than the memory is large.

A layer has one file without a name: it is unlinked as soon as it is open, so nothing is left behind whatever happens.
It holds token after token, (tokens, 2, B, K, d), so that growing moves nothing. Attention reads it in blocks and gives
each block's pages back to the system; those that wait to be written are written first by it. Put it on a real disk: a
file in a file system that is itself in memory saves nothing.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moai_llm.inference.kv.layer import StreamedLayer
from moai_llm.runtime import MoaiError

BLOCK = 1024  # tokens that are read at a time
LEAST = 256  # tokens a file has room for at first; it doubles


def room(tokens: int) -> int:
    """Tokens a file is made for that must hold so many."""
    return max(LEAST, 1 << (tokens - 1).bit_length())


class _File:
    """A nameless file and its mapping."""

    def __init__(self, directory: Path | None) -> None:
        self._fd = -1
        try:
            self._fd, path = tempfile.mkstemp(prefix="moai-kv-", dir=directory)
        except OSError as error:
            raise MoaiError(f"no file for keys and values in {directory or tempfile.gettempdir()}: {error}") from None
        os.unlink(path)
        self._map: mmap.mmap | None = None

    def grow(self, size: int) -> mmap.mmap:
        """The file with at least this many bytes, whose disk space is taken now: a full disk is an error here and not
        a signal in the middle of a write.
        """
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            raise MoaiError(f"no room for {size:,} bytes of keys and values: {error.strerror}; see --kv-dir") from None
        self._map = mmap.mmap(self._fd, size)
        return self._map

    def give_back(self, start: int, stop: int) -> None:
        """The pages of these bytes leave our memory. The file keeps what they hold."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and stop > first and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


class MappedLayer(StreamedLayer):
    """Every token, in a file.

    Args:
        directory: where the file lies; the system's place for temporary files when None.
    """

    def __init__(self, directory: Path | None = None) -> None:
        super().__init__()
        self.directory = directory
        self._file: _File | None = None
        self._data: Tensor | None = None  # (room, 2, B, K, d)

    def start(self, k: Tensor, v: Tensor) -> None:
        if k.shape != v.shape:
            raise MoaiError("keys and values of different sizes do not go into one file: take --kv-cache dynamic")
        self._file, self._shape = _File(self.directory), (2, *k.shape[:2], k.shape[3])
        self._token_bytes = 2 * k.shape[0] * k.shape[1] * k.shape[3] * k.element_size()

    def append(self, k: Tensor, v: Tensor) -> None:
        assert self._file is not None
        stop = self.seen + k.shape[2]
        if self._data is None or stop > self._data.shape[0]:
            tokens = room(stop)
            mapped = self._file.grow(tokens * self._token_bytes)
            self._data = torch.frombuffer(
                mapped, dtype=self.dtype, count=tokens * self._token_bytes // k.element_size()
            )
            self._data = self._data.view(tokens, *self._shape)
        self._data[self.seen : stop] = torch.stack([k, v]).permute(3, 0, 1, 2, 4)
        self._file.give_back(self.seen * self._token_bytes, stop * self._token_bytes)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.seen, BLOCK):
            stop = min(start + BLOCK, self.seen)
            assert self._data is not None and self._file is not None
            block = self._data[start:stop].permute(1, 2, 3, 0, 4)
            # a copy: whoever keeps a block must not look at the file when it has grown or been written again
            keys, values = (t.contiguous().to(self.device) for t in block)
            yield keys, values
            self._file.give_back(start * self._token_bytes, stop * self._token_bytes)

    def tensors(self) -> list[Tensor]:
        return [] if self._data is None else [self._data]

    def reset(self) -> None:
        super().reset()
        self._file = self._data = None

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._rows(torch.arange(self._shape[1]).repeat_interleave(repeats))

    def _rows(self, indices: Tensor) -> None:
        """The rows of the batch become these: into a new file, block by block."""
        if not self.is_initialized:
            return
        fresh = MappedLayer(self.directory)
        for block in self.blocks():
            k, v = (t.index_select(0, indices.to(t.device)) for t in block)
            fresh.ready(k, v)
            fresh.append(k, v)
            fresh.seen += k.shape[2]
        self._file, self._data, self._shape = fresh._file, fresh._data, fresh._shape
        self._token_bytes = fresh._token_bytes
