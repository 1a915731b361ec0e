"""Blocks, in their order, into one store or two, and the account of what became of every record.

All that it has counted can be written down as plain values and taken up again, so that a run that goes on says at its
end what one that was never stopped would say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moai_llm.data.blocks import CODE, CUT, FILLED, Block, Job, Part, PieceError
from moai_llm.data.shards import Manifest
from moai_llm.data.sources import Skipped
from moai_llm.data.sources.pieces import later_lines
from moai_llm.data.sources.records import Account, Row
from moai_llm.data.writer import StoreWriter
from moai_llm.runtime import MoaiError


@dataclass
class Report:
    """What `prepare` did; `dropped` counts records by reason, `skipped` what could not be read, `code` and `filled`
    documents of the store. `held_out` is the report of the second store, if one was asked for.
    """

    manifest: Manifest
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Skipped = field(default_factory=Skipped)
    code: int = 0  # in a language that is known
    filled: int = 0  # of them, rearranged to fill in the middle
    cut: int = 0  # conversations that were too long and lost a part
    held_out: Report | None = None


class Side:
    """A store and its own part of the account."""

    def __init__(self, writer: StoreWriter, counts: Mapping[str, Any] | None = None) -> None:
        counts = counts or {}
        self.writer = writer
        self.read: int = counts.get("read", 0)
        self.dropped = Counter[str](counts.get("dropped", {}))
        self.marked: dict[str, int] = dict(counts.get("marked", {"code": 0, "filled": 0, "cut": 0}))

    def add(self, block: Block, wanted: np.ndarray) -> None:
        """What a block holds of the wanted records, (records,) bool."""
        ids, learn, lengths, sizes, marks = block.ids, block.learn, block.lengths, block.text_bytes, block.marks
        if not wanted.all():
            documents = wanted[block.record]
            tokens = np.repeat(documents, lengths)
            ids, learn = ids[tokens], None if learn is None else learn[tokens]
            lengths, sizes, marks = lengths[documents], sizes[documents], marks[documents]
        self.writer.add_documents(ids, lengths, sizes, learn)
        self.read += int(wanted.sum()) - sum(bool(wanted[i]) for i in block.broken)
        self.dropped.update(reason for i, reason in block.dropped if wanted[i])
        for name, mark in (("code", CODE), ("filled", FILLED), ("cut", CUT)):
            self.marked[name] += int(np.count_nonzero(marks & mark))

    def counts(self) -> dict[str, Any]:
        return {"read": self.read, "dropped": dict(self.dropped), "marked": self.marked}


class Collector:
    """Takes blocks in their order.

    Args:
        sides: `train` and `valid`, or one of them; `train` has everything where nothing is held out.
        skipped: what was skipped before the first block; goes on being told.
        mark: what `mark` gave; the writers must be those of the same moment.
    """

    def __init__(
        self, job: Job, sides: Mapping[Part, StoreWriter], skipped: Skipped, mark: Mapping[str, Any] | None = None
    ) -> None:
        mark = mark or {}
        self.job, self.skipped = job, skipped
        if mark:
            skipped.take()
            rows, left_out = mark["skipped"]
            skipped.absorb(Account([Row(*row) for row in rows], [(a, b, c) for a, b, c in left_out]))
        self.unclean = Counter[str](mark.get("unclean", {}))
        self.slice: int = mark.get("slice", 0)  # that is being read
        self.done: int = mark.get("done", 0)  # of its records
        self.number: int = mark.get("number", 0)  # of the next record
        self.bytes_read: int = mark.get("bytes_read", 0)
        self._file: str = mark.get("file", "")  # whose lines are counted
        self._lines: int = mark.get("lines", 0)  # before the piece that is being read
        self.sides = {name: Side(writer, mark.get("sides", {}).get(name)) for name, writer in sides.items()}

    def mark(self) -> dict[str, Any]:
        """Everything counted so far, and how far the stores are, as plain values."""
        return {
            "slice": self.slice, "done": self.done, "number": self.number, "bytes_read": self.bytes_read,
            "file": self._file, "lines": self._lines, "skipped": self.skipped.account(), "unclean": self.unclean,
            "sides": {name: side.counts() for name, side in self.sides.items()},
            "stores": {name: side.writer.mark() for name, side in self.sides.items()},
        }  # fmt: skip

    @property
    def tokens(self) -> int:
        return sum(side.writer.tokens for side in self.sides.values())

    def add(self, block: Block) -> None:
        held = block.held
        if held is None:
            held = self.job.held_out(np.arange(self.number, self.number + block.records))
        for name, side in self.sides.items():
            side.add(block, held == (name == "valid"))
        self._count_lines(block)
        self.unclean.update(block.unclean)
        self.bytes_read += block.bytes_read
        self.number += block.records
        self.done += block.records
        if block.is_last:
            self.slice, self.done = self.slice + 1, 0

    def _count_lines(self, block: Block) -> None:
        file, begin = block.of
        if file != self._file or not begin:
            self._file, self._lines = file, 0
        account = block.skipped
        if self._lines:
            moved = [row._replace(example=later_lines(row.example, file, self._lines)) for row in account.bad]
            account = account._replace(bad=moved)
        self.skipped.absorb(account)
        self._lines += block.lines

    def explain(self, error: PieceError) -> MoaiError:
        """The same mistake, in the words of the whole file."""
        file, begin = error.of
        lines = self._lines if begin and file == self._file else 0
        return MoaiError(later_lines(str(error), file, lines) if lines else str(error))

    def check(self) -> None:
        """
        Raises:
            MoaiError: nothing is left for a store.
        """
        read = sum(side.read for side in self.sides.values())
        if self.unclean and not read:
            rules = ", ".join(f"{count:,} {rule}" for rule, count in self.unclean.most_common())
            raise MoaiError(f"the rules of cleaning drop all documents: {rules}; `moai data clean` shows examples")
        for side in self.sides.values():
            if self.job.kind != "text":
                from moai_llm.data.sft.encode import refuse_all_dropped

                refuse_all_dropped(side.read, side.dropped)
        if not read and self.skipped.bad_count:
            first = self.skipped.broken()[0].example
            raise MoaiError(f"nothing could be read: {self.skipped.bad_count:,} skipped; the first: {first}")
        empty = [side.writer.out for side in self.sides.values() if not side.writer.documents]
        if len(empty) < len(self.sides) and empty:
            why = f"{read:,} were read, and one of every {self.job.every} is held out"
            if self.job.few:
                why = (
                    f"of fewer than {self.job.every} texts the end of each is held out, and these are too short for it"
                )
            raise MoaiError(f"no document is left for {empty[0]}: {why}")

    def reports(self) -> dict[Part, Report]:
        """After the stores are finished."""
        made = {}
        for name, side in self.sides.items():
            read, dropped = side.read + self.unclean.total(), side.dropped + self.unclean
            code, filled, cut = (side.marked[name] for name in ("code", "filled", "cut"))
            made[name] = Report(side.writer.manifest, read, dropped, self.skipped, code, filled, cut)
        return made
