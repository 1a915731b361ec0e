"""Ends a process that hangs, after it has written where: a run that waits for ever earns nothing, and whoever started
it (a scheduler, a loop in a shell) can start it again with `--resume auto`.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

EXIT_CODE = 17  # of a process that ended itself because it hung


class Watchdog:
    """Between `with` and its end, `beat` must be called at least every `seconds`.

    If it is not, the stacks of all threads go to `out/hang.txt` and standard error, and the process ends at once with
    code 17: a thread that is stuck in a system call or a collective cannot be interrupted in any other way.

    Args:
        seconds: None watches nothing.
    """

    def __init__(self, seconds: float | None, out: Path) -> None:
        self.seconds, self.report = seconds, out / "hang.txt"
        self._last, self._paused, self._end = time.monotonic(), 0, threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes as long as it takes: an evaluation, a checkpoint."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            self.beat()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self.seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._end.wait(min(1.0, self.seconds / 4)):
            still = time.monotonic() - self._last
            if still > self.seconds and not self._paused:
                self._give_up(still)

    def _give_up(self, still: float) -> None:
        text = f"no step for {still:.0f} seconds (health.hang_seconds = {self.seconds:g}); the stacks of all threads:\n"
        try:
            with self.report.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                os.fsync(file.fileno())
            sys.stderr.write(f"{text}{self.report.read_text(encoding='utf-8')}")
            sys.stderr.flush()
        finally:
            os._exit(EXIT_CODE)
