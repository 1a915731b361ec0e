"""What reading gives: records with the place they came from, and the account of what was not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moai_llm.runtime import MoaiError

MAX_RECORD = 64 << 20  # bytes of one record; what is longer is refused before it is in memory
DISTINCT = 1000  # (file, reason) pairs of an account; what comes after them is counted together


class Record(NamedTuple):
    columns: dict[str, Any]
    place: str  # file, and line, row or item where there are several
    source: str = ""  # the file alone


class Broken(MoaiError):
    """A file that cannot be read (on). A record that is broken is told to `Skipped.bad`, and the file goes on."""

    def __init__(self, place: str, reason: str, detail: str = ""):
        super().__init__(f"{printable(place)}: {reason}{detail}")
        self.reason = reason


class Source(NamedTuple):
    """One file, data set or repository. All but standard input and what lies in this process's memory can be pickled,
    so that another process can read it.
    """

    name: str
    size: int | None  # bytes as they are stored, None where only reading would tell
    read: Callable[[Reading, Skipped], Iterator[Record]]
    once: bool = False  # it cannot be read a second time
    here: bool = False  # only this process can read it
    origin: str = ""  # what the user wrote, without secrets; a repository with its commit
    path: Path | None = None  # of a file on this machine
    version: str = ""  # changes when its content does, as far as that can be told without reading it


@dataclass(frozen=True)
class Reading:
    """How to read.

    Args:
        mapping: our name of a column -> its name in the source; `a.b` is b within a.
        skip_bad: count broken records and files and go on, instead of raising at the first.
        max_record: bytes of a record that are still read.
        encoding: of text files, JSON and CSV; a byte order mark wins over it.
        streaming: data sets of the Hub are read from there as they come; else they are downloaded first.
        choose: from the columns of a table those to read. Files that are no tables give all they have.
        progress: called with the number of stored bytes read since the last call.
    """

    mapping: Mapping[str, str] = field(default_factory=dict)
    skip_bad: bool = False
    max_record: int = MAX_RECORD
    encoding: str = "utf-8"
    streaming: bool = True
    choose: Callable[[Sequence[str]], Collection[str]] | None = None
    progress: Callable[[int], None] | None = None

    def select(self, names: Sequence[str]) -> list[str]:
        """The columns of a table to read, in its order."""
        chosen = self.choose(names) if self.choose else names
        return [name for name in names if name in chosen]


class Row(NamedTuple):
    source: str
    reason: str
    times: int
    example: str  # the whole message of the first


class Account(NamedTuple):
    """What `Skipped` has counted, as plain values."""

    bad: list[Row]
    left_out: list[tuple[str, str, int]]  # source, reason, count


class Skipped:
    """The account of what was not read. It takes the same memory however much that is.

    What is broken is an error unless `allow_bad`, then it is counted. What is left out on purpose (a picture in a
    folder of texts, a link in a repository) is always counted.
    """

    def __init__(self, allow_bad: bool = False):
        self.allow_bad = allow_bad
        self.bad_count = 0
        self._bad: dict[tuple[str, str], Row] = {}
        self._left_out: Counter[tuple[str, str]] = Counter()

    def account(self) -> Account:
        return Account(list(self._bad.values()), [(*key, count) for key, count in self._left_out.items()])

    def take(self) -> Account:
        """The account, which then begins anew."""
        account = self.account()
        self.bad_count, self._bad, self._left_out = 0, {}, Counter()
        return account

    def absorb(self, account: Account) -> None:
        """Count what another one has counted, as if it had been told here."""
        for row in account.bad:
            self._count(row)
        for source, reason, count in account.left_out:
            self.leave_out(source, reason, count)

    def bad(self, source: str, place: str, reason: str, detail: str = "") -> None:
        """Count a broken record.

        Raises:
            Broken: unless `allow_bad`.
        """
        self.add(source, Broken(place, reason, detail))

    def add(self, source: str, error: Broken) -> None:
        if not self.allow_bad:
            raise error
        self._count(Row(printable(source), error.reason, 1, str(error)))

    def _count(self, row: Row) -> None:
        self.bad_count += row.times
        key = (row.source, row.reason)
        if key not in self._bad and len(self._bad) >= DISTINCT:
            key = ("further files", row.reason)
        before = self._bad.get(key) or Row(*key, 0, row.example)
        self._bad[key] = before._replace(times=before.times + row.times)

    def leave_out(self, source: str, reason: str, count: int = 1) -> None:
        key = (printable(source), reason)
        if key not in self._left_out and len(self._left_out) >= DISTINCT:
            key = ("further sources", reason)
        self._left_out[key] += count

    def broken(self) -> list[Row]:
        """What was broken, by file and reason, the most frequent first."""
        return sorted(self._bad.values(), key=lambda row: -row.times)

    def left_out(self) -> list[tuple[str, str, int]]:
        """(source, reason, count) of what was left out on purpose."""
        return [(*key, count) for key, count in self._left_out.most_common()]


def printable(name: str) -> str:
    """A name from outside, without the characters that would drive a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def read_size(text: str) -> int:
    """Bytes: `500`, `64MB`, `1.5 GiB`. The letters mean powers of 1024, as in `du -h`.

    Raises:
        MoaiError: not a size.
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    power = "KMGT".find(number[-1:]) + 1 if number else 0
    try:
        size = int(float(number[:-1] if power else number) * 1024**power)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise MoaiError(f"{text!r} is not a size; write e.g. 500KB, 64MB or 2GB")
    return size


def show_size(size: float) -> str:
    """64 MB: the other way round."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1024:
            break
        size, unit = size / 1024, "TB"
    return f"{size:.3g} {unit}"
