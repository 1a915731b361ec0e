"""Duplicates of a corpus: equal texts, equal Python programs, near-duplicates, lines that many documents share.

Two passes over the sources: the first makes keys of every document, the second writes what is kept. What is remembered
between them lies in files, so a corpus may be larger than memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moai_llm.data.documents import Document, DocumentWriter
from moai_llm.data.duplicates import MEMORY, DuplicateIndex
from moai_llm.data.lines import SHORTEST, LineCounts
from moai_llm.data.minhash import NO_KEY, MinHash, MinHashOptions
from moai_llm.data.python_identity import python_identity
from moai_llm.runtime import MoaiError

EXAMPLES = 10
Progress = Callable[[str], None]


@dataclass(frozen=True)
class DedupOptions:
    """What counts as a duplicate, and which one is kept.

    near: also documents that share most of their n-grams; else only equal ones.
    verify: join candidates only when the Jaccard similarity of their shingles is at least `threshold`.
    lines: the most documents that may hold the same line of at least `shortest_line` characters; None keeps all lines.
    code: Python programs are equal when their syntax trees are (`tree`), or are so after their names are numbered
        (`names`); None compares them as text.
    keep: of a cluster.
    """

    near: bool = True
    minhash: MinHashOptions = field(default_factory=MinHashOptions)
    verify: bool = False
    threshold: float = 0.7
    lines: int | None = None
    shortest_line: int = SHORTEST
    code: Literal["tree", "names"] | None = None
    python: bool = False  # records without a suffix that tells are Python
    keep: Literal["first", "longest"] = "first"
    memory: int = MEMORY

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise MoaiError(f"the threshold of similarity must lie between 0 and 1, got {self.threshold}")
        if self.lines is not None and self.lines < 1:
            raise MoaiError(f"a line may stand in at least one document, got {self.lines}")


@dataclass
class DedupReport:
    """Counts of documents; `examples` are (place of a duplicate, place of what was kept instead, kind)."""

    read: int = 0
    kept: int = 0
    exact: int = 0
    near: int = 0
    empty: int = 0  # after the lines were taken out
    clusters: int = 0  # with more than one document
    largest: int = 0
    lines: int = 0  # removed
    frequent_lines: list[tuple[str, int]] = field(default_factory=list)
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            **vars(self),
            "frequent_lines": [{"line": line, "removed": count} for line, count in self.frequent_lines],
            "examples": [dict(zip(("document", "same as", "kind"), row)) for row in self.examples],
        }


def text_digest(text: str) -> bytes:
    """16 bytes, equal for texts that differ in white space or in how their characters are composed only."""
    plain = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()


def document_digest(document: Document, options: DedupOptions) -> bytes:
    """`text_digest`, or that of the program where programs are compared."""
    if options.code is not None:
        path = str(document.columns.get("path") or document.place).lower()
        if options.python or path.endswith((".py", ".pyi", ".pyw")):
            program = python_identity(document.text, options.code == "names")
            if program is not None:
                return program
    return text_digest(document.text)


def dedup(
    read: Callable[[], Iterable[Document]],
    out: str | Path,
    options: DedupOptions | None = None,
    *,
    index: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DedupReport:
    """Write the documents that are no duplicates, in their order.

    Args:
        read: gives the documents, the same ones each time it is called.
        index: a folder to keep the keys in. What a former run with this index has read counts as already there.

    Raises:
        MoaiError: output that is there, an index of other options, sources that changed between the two passes.
    """
    options, say = options or DedupOptions(), progress or (lambda text: None)
    writer = DocumentWriter(out, overwrite=overwrite)
    Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".tmp-{Path(out).name}-keys-{os.getpid()}-", dir=Path(out).absolute().parent))
    try:
        kind = f"near {options.near}, code {options.code}"
        keys = DuplicateIndex(
            Path(index) if index is not None else work / "index", options.minhash,
            verify=options.verify, kind=kind, memory=options.memory,
        )  # fmt: skip
        lines = None
        if options.lines is not None:
            lines = LineCounts(work / "lines.bin", options.lines, options.shortest_line, options.memory)
        _collect(read(), keys, lines, options, say)
        say("comparing ...")
        report = _write(read(), keys, lines, options, writer, say)
        keys.remove_results()
        if index is not None:
            keys.save()
        return report
    finally:
        shutil.rmtree(work)


def _collect(
    documents: Iterable[Document], keys: DuplicateIndex, lines: LineCounts | None, options: DedupOptions, say: Progress
) -> None:
    minhash, nothing = MinHash(options.minhash), np.full(options.minhash.bands, NO_KEY)
    for n, document in enumerate(documents):
        band_keys = minhash.band_keys(document.text) if options.near else nothing
        shingles = minhash.shingles(document.text) if options.verify else None
        keys.add(document_digest(document, options), len(document.text), band_keys, shingles)
        if lines is not None:
            lines.count(document.text)
        if n % 1000 == 0:
            say(f"{n:,} documents read")
    if lines is not None:
        lines.finish()


def _write(
    documents: Iterable[Document], keys: DuplicateIndex, lines: LineCounts | None, options: DedupOptions,
    writer: DocumentWriter, say: Progress,
) -> DedupReport:  # fmt: skip
    base, total, digests = keys.earlier, keys.documents, keys.digests()
    roots = keys.near_roots(options.threshold if options.verify else None) if options.near else keys.exact_roots()
    winners = keys.winners(roots, options.keep == "longest")
    report = DedupReport()
    report.clusters, report.largest = keys.cluster_sizes(winners)
    examples = _examples(winners, base)
    places = dict.fromkeys((i for pair in examples for i in pair), "a document of an earlier run")

    def is_equal(i: int, j: int) -> bool:
        return bool((digests[i] == digests[j]).all())

    with writer:
        for i, document in enumerate(documents, base):
            if i >= total:
                raise MoaiError("the sources have more documents than a moment ago: do not write to them meanwhile")
            if i in places:
                places[i] = document.place
            if report.read % 1000 == 0:
                say(f"{report.kept:,} of {total - base:,} documents kept")
            report.read += 1
            winner = int(winners[i])
            if winner != i:
                same = is_equal(i, winner)
                report.exact, report.near = report.exact + same, report.near + (not same)
                continue
            text = document.text if lines is None else lines.remove(document.text)
            if not text.strip():
                report.empty += 1
                continue
            writer.write(text, document.columns)
            report.kept += 1
        if report.read != total - base:
            raise MoaiError("the sources have fewer documents than a moment ago: do not write to them meanwhile")
    if lines is not None:
        report.lines = sum(lines.removed.values())
        report.frequent_lines = lines.removed.most_common(EXAMPLES)
    report.examples = [(places[i], places[j], "equal" if is_equal(i, j) else "near") for i, j in examples]
    return report


def _examples(winners: np.ndarray, base: int) -> list[tuple[int, int]]:
    """(a duplicate, what is kept instead) of the first few."""
    found: list[tuple[int, int]] = []
    for start in range(base, len(winners), 1 << 20):
        block = np.asarray(winners[start : start + (1 << 20)])
        dropped = np.flatnonzero(block != np.arange(start, start + len(block)))[: EXAMPLES - len(found)]
        found += [(int(k) + start, int(block[k])) for k in dropped]
        if len(found) == EXAMPLES:
            break
    return found
