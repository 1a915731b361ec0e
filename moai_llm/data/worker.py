"""A process that makes blocks: it reads slices from its standard input and writes blocks to its standard output.

It is started as a program of its own, not as a copy of the process that wants it, so it has neither that one's memory
nor its threads, and does not run a user's script a second time. It imports neither torch nor transformers. It ends when
its input does.

A message is the pickle of a value. A head before it says how long it is, and whether it is the last of its task.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from moai_llm.data.blocks import Encoder, few_collections
from moai_llm.data.sources import Piece
from moai_llm.runtime import MoaiError

START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from moai_llm.data.worker import main; main()"
HEAD = struct.Struct("<Q?")


class Task(NamedTuple):
    """A slice. `only_count` asks for the number of its records instead of its blocks."""

    pieces: Sequence[Piece]
    number: int = 0
    skip: int = 0
    only_count: bool = False


class Failure(NamedTuple):
    """What a worker says instead of a block when a slice cannot be finished."""

    message: str
    is_mistake: bool  # of the user; else `message` is a traceback of ours
    of: tuple[str, int] = ("", 0)  # see `PieceError`


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    tasks, blocks = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no message
    try:
        encoder = Encoder(receive(tasks))
        with few_collections():
            while (task := receive(tasks)) is not None:
                _do(encoder, task, blocks)
    except (BrokenPipeError, EOFError):  # nobody is left who wants the blocks
        os._exit(1)
    os._exit(0)  # nothing is left to do, and freeing a large vocabulary takes its time


def _do(encoder: Encoder, task: Task, blocks: IO[bytes]) -> None:
    try:
        if task.only_count:
            send(blocks, pickle.dumps(encoder.count(task.pieces)), True)
            return
        for block in encoder.blocks(task.pieces, number=task.number, skip=task.skip):
            send(blocks, pickle.dumps(block, protocol=5), block.is_last)
    except MoaiError as error:
        send(blocks, pickle.dumps(Failure(str(error), True, getattr(error, "of", ("", 0)))), True)
    except BrokenPipeError:
        raise
    except Exception:
        send(blocks, pickle.dumps(Failure(traceback.format_exc(), False)), True)


def send(file: IO[bytes], content: bytes, ends: bool = False) -> None:
    """
    Args:
        content: a pickle.
        ends: the task.
    """
    file.write(HEAD.pack(len(content), ends))
    file.write(content)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """The next message; None where there is none any more."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    size, _ = HEAD.unpack(head)
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)
