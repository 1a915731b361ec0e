"""Does a corpus hold what models are evaluated on? Overlap of long n-grams, after GPT-3 (arXiv 2005.14165, appendix C).

An n-gram is 13 words, or 26 characters where single characters are the units (13 Korean characters are some four words,
which texts share by chance). Of evaluation sets only the hashes of n-grams are kept. One that stands in more than
`COMMON` items of an evaluation set is a phrase of its form, not of an item, and does not count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moai_llm.data.documents import Document, DocumentWriter
from moai_llm.data.sources import Reading, Source, expand, read_source
from moai_llm.data.sources.columns import lookup
from moai_llm.data.units import gram_hashes, located_grams
from moai_llm.runtime import MoaiError

COMMON = 10
EXAMPLES = 10


class EvaluationIndex:
    """The n-grams of evaluation sets.

    Attributes:
        names: of the sets, and `sizes`: items of each.
        too_short: items that are shorter than an n-gram; nothing can be said of them.
    """

    def __init__(self, words: int = 13, characters: int = 26) -> None:
        if min(words, characters) < 2:
            raise MoaiError(f"an n-gram needs at least 2 units, got {min(words, characters)}")
        self.words, self.characters = words, characters
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.too_short: list[int] = []
        self._grams, self._items = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._first_items: list[int] = [0]  # items are numbered through all sets

    def add(self, name: str, items: Iterable[str]) -> None:
        """One more evaluation set."""
        grams, numbers, first = [self._grams[:0]], [self._items[:0]], self._first_items[-1]
        size = short = 0
        for size, text in enumerate(items, 1):
            found = np.unique(gram_hashes(text, self.words, self.characters, whole=False))
            short += not len(found)
            grams.append(found)
            numbers.append(np.full(len(found), first + size - 1))
        values, item = np.concatenate(grams), np.concatenate(numbers)
        order = np.argsort(values, kind="stable")
        values, item = values[order], item[order]
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        rare = counts[inverse] <= COMMON
        values, item = np.concatenate([self._grams, values[rare]]), np.concatenate([self._items, item[rare]])
        order = np.argsort(values, kind="stable")
        self._grams, self._items = values[order], item[order]
        self.names.append(name)
        self.sizes.append(size)
        self.too_short.append(short)
        self._first_items.append(first + size)

    def items_in(self, text: str) -> list[int]:
        """Numbers of the evaluation items that share an n-gram with a text."""
        if not len(self._grams):
            return []
        found = np.unique(gram_hashes(text, self.words, self.characters, whole=False))
        low = np.searchsorted(self._grams, found, "left")
        high = np.searchsorted(self._grams, found, "right")
        hits = np.flatnonzero(high > low)
        return sorted({int(item) for k in hits for item in self._items[low[k] : high[k]]})

    def shared_phrase(self, text: str) -> str:
        """The first n-gram of a text that an evaluation set has, "" for none."""
        for gram, (start, end) in zip(*located_grams(text, self.words, self.characters)):
            k = int(np.searchsorted(self._grams, gram))
            if k < len(self._grams) and self._grams[k] == gram:
                return text[start:end]
        return ""

    def set_of(self, item: int) -> int:
        """Which set an item belongs to."""
        return int(np.searchsorted(self._first_items, item, "right")) - 1


def read_items(source: str | Path | Source, reading: Reading) -> Iterator[tuple[str, str]]:
    """(set, text) of the items of evaluation sets: all strings of a record, or the column that is mapped to `text`."""
    from moai_llm.data.sources import Skipped

    skipped, named = Skipped(reading.skip_bad), reading.mapping.get("text")
    for one in expand([source], skipped=skipped):
        for record in read_source(one, reading, skipped):
            value: Any = record.columns
            if named:
                there, value = lookup(record.columns, named)
                if not there:
                    skipped.bad(record.source, record.place, f"no column {named!r}")
                    continue
            yield one.name, "\n".join(_strings(value))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def index_evaluations(
    against: Iterable[str | Path], reading: Reading | None = None, *, words: int = 13, characters: int = 26
) -> EvaluationIndex:
    """The n-grams of evaluation sets, a set for each file or data set.

    Raises:
        MoaiError: sets that cannot be read, or in which there is nothing as long as an n-gram.
    """
    index = EvaluationIndex(words, characters)
    for path in against:
        texts: dict[str, list[str]] = {}
        for name, text in read_items(path, reading or Reading()):
            texts.setdefault(name, []).append(text)
        for name, items in texts.items():
            index.add(name, items)
    if not index.names or sum(index.too_short) == sum(index.sizes):
        raise MoaiError(
            f"no item of the evaluation sets is as long as an n-gram of {words} words or {characters} characters"
        )
    return index


class SetReport(NamedTuple):
    name: str
    items: int
    too_short: int
    found: int  # items that share an n-gram with the corpus


@dataclass
class ContaminationReport:
    """Counts of documents, and of items by evaluation set; `examples` are (place, set, the phrase they share)."""

    read: int = 0
    contaminated: int = 0
    sets: list[SetReport] = field(default_factory=list)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "read": self.read,
            "contaminated": self.contaminated,
            "sets": [row._asdict() for row in self.sets],
            "examples": [dict(zip(("document", "set", "phrase"), row)) for row in self.examples],
        }


def check_contamination(
    documents: Iterable[Document], index: EvaluationIndex, out: str | Path | None = None, *, overwrite: bool = False
) -> ContaminationReport:
    """Compare documents with evaluation sets; those that share nothing are written to `out`, if it is named."""
    if out is None:
        return _check(documents, index, None)
    with DocumentWriter(out, overwrite=overwrite) as writer:
        return _check(documents, index, writer)


def _check(documents: Iterable[Document], index: EvaluationIndex, writer: DocumentWriter | None) -> ContaminationReport:
    report, found = ContaminationReport(), set[int]()
    for document in documents:
        report.read += 1
        items = index.items_in(document.text)
        if items:
            report.contaminated += 1
            found.update(items)
            if len(report.examples) < EXAMPLES:
                name = index.names[index.set_of(items[0])]
                report.examples.append((document.place, name, index.shared_phrase(document.text)))
        elif writer is not None:
            writer.write(document.text, document.columns)
    by_set = Counter(index.set_of(item) for item in found)
    rows = zip(index.names, index.sizes, index.too_short)
    report.sets = [SetReport(*row, by_set[k]) for k, row in enumerate(rows)]
    return report
