"""The folder beside a store in which it is made, so that a run which was stopped can be continued.

.partial-NAME/
  lock          held while somebody writes here
  job.json      what is to be done; another job does not go on from here
  sources.tsv   the files and data sets it reads, with what tells that one of them changed
  state.json    how far it is, replaced as a whole every few seconds
  store/        becomes NAME
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from moai_llm.data.sources import Source
from moai_llm.data.writer import publish, sync_folder
from moai_llm.runtime import MoaiError

MAY_CHANGE = {"skip_bad": (False, True)}  # what was read until there had nothing to skip


class Partial:
    """The folder of a job, to be used in a `with`, which holds the lock.

    Args:
        out: the store.
        also: a second store of the same job; it lies in a folder of its own beside its place.
    """

    def __init__(self, out: Path, also: Path | None = None) -> None:
        self.outs = [out] if also is None else [out, also]
        self.folder = _folder(out)
        self.is_saved = False  # there is something to go on from
        self._lock: IO[bytes] | None = None

    def work(self, out: Path) -> Path:
        """Where a store lies until it is finished."""
        return _folder(out) / "store"

    def __enter__(self) -> Partial:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("ab")
        if not _lock(self._lock):
            self._lock.close()
            raise MoaiError(f"{self.outs[0]} is being prepared by another process at this moment")
        self.is_saved = (self.folder / "state.json").is_file()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_saved:
            self.remove()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def open(
        self, job: Mapping[str, Any], sources: Iterable[Source], *, anew: bool, drop: bool
    ) -> dict[str, Any] | None:
        """What was saved of this job; None where it begins.

        Args:
            anew: forget what is there.
            drop: forget it if it is of another job.

        Raises:
            MoaiError: it is of another job.
        """
        job, lines = json.loads(json.dumps(job)), [f"{s.name}\t{s.size}\t{s.version}\n" for s in sources]
        state = None if anew else _read(self.folder / "state.json")
        if state is not None:
            other = list(_differences(self.folder, job, lines))
            if other and not drop:
                raise MoaiError(
                    f"{self.folder} holds what another run had done when it was stopped, with {'; '.join(other)}. "
                    "Run that one again to finish it, or pass --fresh to begin anew"
                )
            state = None if other else state
        if state is None:
            self.is_saved = False
            self.remove(keep_lock=True)
            (self.folder / "sources.tsv").write_text("".join(lines), encoding="utf-8")
        _write(self.folder / "job.json", job)
        return state

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace what was saved; a moment without either there is none."""
        _write(self.folder / "state.json", state)
        self.is_saved = True

    def publish(self) -> None:
        """Put the finished stores into their places, and forget the job. After a stop it may be called again."""
        for out in reversed(self.outs):
            if self.work(out).is_dir():
                publish(self.work(out), out)
        self.is_saved = False

    def remove(self, keep_lock: bool = False) -> None:
        """Delete it all. What says how far the job is goes first: half of a store is nothing to go on from."""
        (self.folder / "state.json").unlink(missing_ok=True)
        for out in self.outs:
            if _folder(out) != self.folder:
                shutil.rmtree(_folder(out), ignore_errors=True)
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if path.name == "lock":
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not keep_lock:
            shutil.rmtree(self.folder, ignore_errors=True)


def _folder(out: Path) -> Path:
    return out.with_name(f".partial-{out.name}")


def _differences(folder: Path, job: Mapping[str, Any], lines: list[str]) -> Iterator[str]:
    """What another job than this one had been begun with."""
    before = _read(folder / "job.json") or {}
    for name in dict.fromkeys([*before, *job]):
        old, new = before.get(name), job.get(name)
        if old != new and MAY_CHANGE.get(name) != (old, new):
            words = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
            yield f"{name} {words[0]}, now {words[1]}" if max(map(len, words)) < 200 else f"another {name}"
    there = folder / "sources.tsv"
    with there.open(encoding="utf-8", newline="\n") if there.is_file() else open(os.devnull) as file:
        for old, new in zip_longest(file, lines):
            if old != new:
                yield _changed(old, new)
                return


def _changed(old: str | None, new: str | None) -> str:
    if old is None or new is None:
        return f"{'more' if new is None else 'fewer'} sources"
    names = [line.split("\t")[0] for line in (old, new)]
    return f"another state of {names[0]}" if names[0] == names[1] else f"{names[0]} where {names[1]} is now"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Replace a file; after a crash there is the old one or the new one."""
    temporary = file.with_name(file.name + ".new")
    with temporary.open("w", encoding="utf-8") as opened:
        json.dump(value, opened, ensure_ascii=False)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def _lock(file: IO[bytes]) -> bool:
    """Take a file for this process; the system gives it back when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # not POSIX
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
