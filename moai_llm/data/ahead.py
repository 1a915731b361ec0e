"""Batches made before they are asked for, by threads.

Threads and not processes: what costs time in a batch is compiled and leaves Python's lock, so threads run beside
training; they share the memory map, need no copy of a batch and no second program in memory. A batch is a pure function
of its step, so neither their number nor who comes first changes what is read.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from moai_llm.data.loader import Batch


class Ahead:
    """The batches of steps first to last (None: without end), in order.

    Args:
        read: makes the batch of a step.
        workers: threads; with 0 each batch is made when it is asked for.
        prefetch: steps that are read or being read before they are asked for, at least one for each worker.

    Attributes:
        waited: seconds the caller has waited for batches so far.

    Leave it as a context, so that its threads end; they keep no program alive.
    """

    def __init__(
        self, read: Callable[[int], Batch], first: int, last: int | None = None, *, workers: int = 1, prefetch: int = 4
    ) -> None:
        self.waited = 0.0
        self._read, self._next, self._last = read, first, last
        self._pool = ThreadPoolExecutor(workers, "moai-data") if workers else None
        self._depth = max(workers, prefetch)
        self._ahead: deque[Future[Batch]] = deque()
        self._fill()

    def _fill(self) -> None:
        while self._pool and len(self._ahead) < self._depth and (self._last is None or self._next < self._last):
            self._ahead.append(self._pool.submit(self._read, self._next))
            self._next += 1

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch; an error of the thread that made it is raised here."""
        began = time.perf_counter()
        if self._pool is not None:
            if not self._ahead:
                raise StopIteration
            batch = self._ahead.popleft().result()
            self._fill()
        else:
            if self._next == self._last:
                raise StopIteration
            batch = self._read(self._next)
            self._next += 1
        self.waited += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """End the threads; what they have begun is finished and forgotten."""
        if self._pool is not None:
            self._last = self._next
            self._ahead.clear()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
