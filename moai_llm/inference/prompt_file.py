"""A file of prompts to a file of answers, so that a kill loses nothing: what is done stands in a partial file beside
the output, and the next run with the same prompts and settings does the rest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moai_llm.runtime import MoaiError

Record = dict[str, Any]


def read_prompts(path: Path) -> list[str]:
    """A prompt from each line that is not empty; of .jsonl, the `prompt` of each object, or the `text`.

    Raises:
        MoaiError: no such file, no prompt in it, or a line that holds none.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise MoaiError(f"{path}: prompts come from .txt, one a line, or .jsonl, with a `prompt` in each line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MoaiError(f"{path} cannot be read: {error}") from None
    prompts = [
        line if path.suffix == ".txt" else _of_json(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise MoaiError(f"{path} holds no prompt")
    return prompts


def _of_json(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise MoaiError(f"{where} is not JSON: {error}") from None
    prompt = record if isinstance(record, str) else None
    if isinstance(record, dict):
        prompt = record.get("prompt", record.get("text"))
    if not isinstance(prompt, str):
        raise MoaiError(f"{where} has no text as `prompt`")
    return prompt


class AnswerFile:
    """The answers that are there, and a place for the next.

    Args:
        path: ends in .json (one list) or .jsonl (a line for each prompt), in the order of the prompts.
        settings: whatever the answers depend on, beside the prompts.
        overwrite: begin again, and replace what is there.

    Attributes:
        done: place of a prompt -> its record.

    Raises:
        MoaiError: another ending, a finished file, or the rest of a run of other prompts or settings.
    """

    def __init__(self, path: Path, prompts: list[str], settings: Record, overwrite: bool = False) -> None:
        if path.suffix not in (".json", ".jsonl"):
            raise MoaiError(f"{path}: answers go to .json or .jsonl")
        if not path.parent.is_dir():
            raise MoaiError(f"{path.parent}: no such directory")
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.count, self.done = len(prompts), dict[int, Record]()
        content = json.dumps([settings, prompts], sort_keys=True, ensure_ascii=True)
        self._header = {"of": hashlib.sha256(content.encode()).hexdigest()}
        if overwrite:
            self.partial.unlink(missing_ok=True)
        elif path.exists():
            raise MoaiError(f"{path} is there already: name another file, or add --overwrite")
        elif self.partial.exists():
            self._take_over()

    def _take_over(self) -> None:
        lines = self.partial.read_bytes().split(b"\n")
        whole = [line for line in lines[:-1] if line]  # a kill may have cut the last one
        records = [json.loads(line) for line in whole]
        if not records or records[0] != self._header:
            raise MoaiError(
                f"{self.partial} is the beginning of a run with other prompts or settings: repeat them to go on, or "
                "add --overwrite to begin again"
            )
        self.done = {record["index"]: record for record in records[1:]}
        with self.partial.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in whole))

    @contextmanager
    def adding(self) -> Iterator[Callable[[int, Record], None]]:
        """A function that keeps one record for good. When all are there, they become the output."""
        with self.partial.open("a", encoding="utf-8") as file:

            def write(record: Record) -> None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()

            def add(index: int, record: Record) -> None:
                self.done[index] = {"index": index, **record}
                write(self.done[index])

            if not file.tell():
                write(self._header)
            yield add
        if len(self.done) == self.count:
            self._finish()

    def _finish(self) -> None:
        records = [self.done[i] for i in range(self.count)]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            if self.path.suffix == ".json":
                json.dump(records, file, ensure_ascii=False, indent=1)
            else:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        self.partial.unlink()
