"""Several workers, and what they make in the order of the slices, in bounded memory.

Slices are handed out one at a time, in their order. A worker that is ahead of its turn is not listened to once enough
lies here waiting; its pipe fills, and it waits until the slice whose turn it is has come through.
"""

from __future__ import annotations

import io
import json
import pickle
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import IO, Any, cast

from moai_llm.data.blocks import Job, PieceError
from moai_llm.data.worker import HEAD, START, Failure, Task, send
from moai_llm.runtime import MoaiError

AHEAD_BYTES = 4 << 20  # of blocks that wait for their turn, for each worker


class Pool:
    """Worker processes for one job. To be used in a `with`, which ends them."""

    def __init__(self, job: Job, workers: int) -> None:
        content = pickle.dumps(job, protocol=5)
        self._limit = AHEAD_BYTES * workers
        self._workers: list[_Worker] = []
        try:
            self._workers += [_Worker() for _ in range(workers)]
            for worker in self._workers:
                worker.tell(content)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.close()

    def work(self, tasks: Iterable[Task]) -> Iterator[Any]:
        """The blocks of each task, or its number of records, one task after the other.

        Raises:
            MoaiError: what a worker says is the user's mistake; a worker that was ended.
            RuntimeError: a worker failed; its traceback.
        """
        tasks, order = iter(tasks), deque[_Portion]()  # what was handed out, the one whose turn it is first
        while True:
            while order and order[0].waiting:
                yield _opened(order[0].waiting.popleft())
                if order[0].ended and not order[0].waiting:
                    order.popleft()
            waiting = sum(len(message) for portion in order for message in portion.waiting)
            for worker in self._workers:
                if worker.portion is None and waiting < self._limit and (task := next(tasks, None)) is not None:
                    order.append(worker.begin(task))
            if not order:
                return
            _listen([w for w in self._workers if w.portion and (waiting < self._limit or w.portion is order[0])])


def _opened(message: bytes) -> Any:
    value = pickle.loads(message)
    if isinstance(value, Failure):
        if value.is_mistake:
            raise PieceError(value.message, value.of)
        raise RuntimeError(f"a worker failed:\n{value.message}")
    return value


def _listen(workers: Iterable[_Worker]) -> None:
    """Wait for a message of one of them; take one from each that has one."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker.output, selectors.EVENT_READ, worker)
        for key, _ in selector.select():
            key.data.hear()


class _Portion:
    """A task that was handed out, and its messages that wait for their turn."""

    def __init__(self) -> None:
        self.waiting = deque[bytes]()
        self.ended = False


class _Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
        )  # fmt: skip
        self._input = io.BufferedWriter(cast(io.RawIOBase, self.process.stdin))
        self.output = cast(IO[bytes], self.process.stdout)
        self.portion: _Portion | None = None  # at work

    def begin(self, task: Task) -> _Portion:
        self.tell(pickle.dumps(task, protocol=5))
        self.portion = _Portion()
        return self.portion

    def tell(self, content: bytes) -> None:
        try:
            send(self._input, content)
        except BrokenPipeError:
            self._died()

    def hear(self) -> None:
        """Take one message."""
        assert self.portion is not None
        size, ended = HEAD.unpack(self._read(HEAD.size))
        self.portion.waiting.append(self._read(size))
        if ended:
            self.portion.ended, self.portion = True, None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            block = self.output.read(size - len(data))
            if not block:
                self._died()
            data += block or b""
        return bytes(data)

    def _died(self) -> None:
        code = self.process.wait()
        how = f"ended with code {code}; what it says stands above"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += ", as happens where memory runs out: fewer --workers need less of it"
        raise MoaiError(f"a worker process {how}")

    def close(self) -> None:
        with suppress(OSError):
            self._input.close()
        self.output.close()
        self.process.wait()
