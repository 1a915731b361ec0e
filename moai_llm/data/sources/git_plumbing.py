"""Asking git, safely: only its plumbing, which shows objects.

A foreign repository can name programs in its own configuration. So there is no checkout, no hook, no filter, no text
conversion, no submodule, and no way into a network.
"""

from __future__ import annotations

import os
import subprocess
from typing import IO, NamedTuple

from moai_llm.runtime import MoaiError

# what would make git look into another repository than the one that is named
ELSEWHERE = {
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES",
    "GIT_COMMON_DIR", "GIT_NAMESPACE", "GIT_PREFIX", "GIT_EXTERNAL_DIFF",
}  # fmt: skip
NO_PROGRAMS = ("-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
NO_NETWORK = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}


class Entry(NamedTuple):
    mode: str
    object: str
    size: int  # bytes
    path: str


def ask(path: str, *arguments: str) -> bytes:
    """What git prints.

    Raises:
        MoaiError: git's own words, or that there is no git.
    """
    try:
        done = subprocess.run(
            _command(path, *arguments), capture_output=True, env=_environment(), stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise MoaiError("the program git is not installed") from None
    if done.returncode:
        words = done.stderr.decode("utf-8", "replace").strip().removeprefix("fatal: ")
        raise MoaiError(words or f"git {arguments[0]} failed")
    return done.stdout


def find_commit(path: str, revision: str) -> str | None:
    """The full name of a commit, None where there is none of that name."""
    try:
        found = ask(path, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except MoaiError:
        return None
    return found.decode().strip()


def list_tree(path: str, commit: str, folder: str = "") -> list[Entry]:
    """What a commit tracks, below a folder, in the order of git."""
    where = ["--", folder] if folder else []
    entries = []
    for line in ask(path, "ls-tree", "-r", "-l", "-z", "--full-tree", commit, *where).split(b"\0")[:-1]:
        facts, _, name = line.partition(b"\t")
        mode, _, object_id, size = facts.decode().split()
        entries.append(Entry(mode, object_id, 0 if size == "-" else int(size), os.fsdecode(name)))
    return entries


def list_changed(path: str, since: str, commit: str) -> set[str]:
    """The paths that differ between two commits, whether one is an ancestor of the other or not."""
    listing = ask(path, "diff-tree", "-r", "-z", "--no-renames", "--name-only", since, commit)
    return {os.fsdecode(name) for name in listing.split(b"\0")[:-1]}


def _command(path: str, *arguments: str) -> list[str]:
    return ["git", *NO_PROGRAMS, "-C", path, *arguments]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    return {**kept, **NO_NETWORK, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}


class Objects:
    """One `git cat-file --batch`, which is asked for one object after the other; a process per object would take
    fifteen times as long.
    """

    def __init__(self, path: str):
        self._path = path

    def __enter__(self) -> Objects:
        self._process = subprocess.Popen(
            _command(self._path, "cat-file", "--batch"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=_environment(),
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._in.close()
        self._out.close()
        self._process.wait()

    @property
    def _in(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _out(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    def read(self, object_id: str) -> bytes:
        """The content of an object.

        Raises:
            MoaiError: it is not there, as in a partial clone, or damaged.
        """
        try:
            self._in.write(object_id.encode() + b"\n")
            self._in.flush()
        except BrokenPipeError:
            raise MoaiError(
                f"{self._path}: git stopped while object {object_id} was read; git fsck tells more"
            ) from None
        head = self._out.readline().split()
        if len(head) != 3:
            raise MoaiError(
                f"{self._path}: object {object_id} is missing or damaged; a partial clone lacks what was not fetched"
            )
        data = self._out.read(int(head[2]) + 1)
        return data[:-1]
