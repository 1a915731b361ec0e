"""How fast a tokenizer encodes, against the `tokenizers` library on the same merges."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moai_llm.tokenizer.definition import encode_all
from moai_llm.tokenizer.load import Tokenizer


class Speed(NamedTuple):
    """UTF-8 megabytes (10^6) of text per CPU-second of the whole process."""

    ours: float
    library: float

    @property
    def ratio(self) -> float:
        return self.ours / self.library


def encode_speed(tokenizer: Tokenizer, texts: Sequence[str], repeats: int = 3) -> Speed:
    """Encode the texts by `Tokenizer.encode_batch` in one thread and by `tokenizers`, in turns; the best time counts.

    CPU time is that of all threads, so what runs beside it on the machine matters little. Building the twin is not
    counted.
    """
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    tokenizer.encode("a")
    ours = library = float("inf")
    for _ in range(repeats):
        ours = min(ours, _seconds(lambda: tokenizer.encode_batch(texts, threads=1)))
        library = min(library, _seconds(lambda: encode_all(tokenizer._plain, texts)))
    return Speed(size / ours, size / library)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
