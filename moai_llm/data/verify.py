"""Whether a store is what its manifest says, read once in bounded memory; what is wrong is named by file and position.

A store that is damaged cannot be opened, so this reads the files themselves: here manifest, tokenizer and parts, in
`verify_shards.py` what the shards hold.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moai_llm.data.digests import Digests, Repeated
from moai_llm.data.manifest import inconsistent, malformed, parse_manifest, sha256_of
from moai_llm.data.shards import part_path
from moai_llm.data.verify_shards import Problem, Progress, ShardCheck, check_file
from moai_llm.runtime import MoaiError


@dataclass
class Verified:
    """What was found in a store. `notes` are worth knowing and no damage."""

    path: str
    kind: str = ""
    documents: int = 0
    tokens: int = 0
    vocab_size: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Verified] = field(default_factory=list)  # of a merged store; their problems are theirs
    lengths: dict[int, int] = field(default_factory=dict)  # tokens of a document -> how many have so many
    unused_ids: int | None = None  # None where nobody counted
    learned: int | None = None  # tokens
    repeated: Repeated | None = None
    bytes: int = 0
    seconds: float = 0.0
    used: np.ndarray | None = field(default=None, repr=False)  # (vocabulary,) bool

    def all_problems(self) -> list[Problem]:
        """Its own, and those of its parts."""
        return [*self.problems, *(problem for part in self.parts for problem in part.all_problems())]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        repeated = self.repeated
        return {
            "path": self.path,
            "sound": not self.all_problems(),
            "kind": self.kind,
            "documents": self.documents,
            "tokens": self.tokens,
            "vocab_size": self.vocab_size,
            "lengths": dict(zip(("p50", "p90", "p99", "max"), quantiles(self.lengths))) if self.lengths else None,
            "unused_ids": self.unused_ids,
            "learned_tokens": self.learned,
            "repeated_documents": None if repeated is None else repeated.documents,
            "first_repeated": None if repeated is None or not repeated.documents else [repeated.first, repeated.of],
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "problems": [problem._asdict() for problem in self.problems],
            "notes": self.notes,
            "parts": [part.to_dict() for part in self.parts],
        }


def quantiles(lengths: dict[int, int]) -> tuple[int, int, int, int]:
    """p50, p90, p99 and the largest of counted values: the value at that place when all stand in order."""
    values = np.array(sorted(lengths))
    ends = np.cumsum([lengths[int(value)] for value in values])
    places = [min(int(ends[-1]) - 1, int(ends[-1]) * q // 100) for q in (50, 90, 99, 100)]
    p50, p90, p99, most = (int(values[np.searchsorted(ends, place, side="right")]) for place in places)
    return p50, p90, p99, most


def verify(path: str | Path, *, quick: bool = False, progress: Progress | None = None) -> Verified:
    """Check a store, or a merged one with all its parts.

    Args:
        quick: manifests, sizes and the tokenizer's files only; no token is read.
    """
    began = time.monotonic()
    with Digests() as digests:
        found = _Check(Path(path), None if quick else digests, progress or (lambda size: None)).run()
        if digests.documents and not found.all_problems():
            found.repeated = digests.repeated()
    found.seconds = time.monotonic() - began
    return found


def size_of(path: str | Path) -> int:
    """Bytes that `verify` reads of shards, 0 where that cannot be told."""
    try:
        content, _ = parse_manifest(Path(path) / "manifest.json")
    except (MoaiError, OSError):
        return 0
    if any(malformed(content)):
        return 0
    files = [d["bytes"] for shard in content.get("shards", []) for d in shard["files"].values()]
    return sum(files) + sum(size_of(part_path(Path(path), part["path"])) for part in content.get("parts", []))


class _Check:
    """Of one store; `run` fills `found`."""

    def __init__(self, path: Path, digests: Digests | None, progress: Progress) -> None:
        self.path, self.digests, self.progress = path, digests, progress
        self.found, self.content = Verified(str(path)), dict[str, Any]()

    def wrong(self, file: Path, place: str, what: str) -> None:
        self.found.problems.append(Problem(str(file), place, what))

    def run(self) -> Verified:
        file, found = self.path / "manifest.json", self.found
        try:
            content, raw = parse_manifest(file)
        except MoaiError as error:
            self.wrong(file, "", str(error).removeprefix(f"{file} "))
            return found
        except OSError as error:
            self.wrong(file, "", error.strerror or str(error))
            return found
        bad = list(malformed(content))
        for problem in bad or inconsistent(content, raw):
            self.wrong(file, "", problem)
        if bad:
            return found
        self.content = content
        found.kind, found.documents, found.tokens = content["kind"], content["documents"], content["tokens"]
        found.vocab_size = content["vocab_size"]
        if not content.get("digest"):
            found.notes.append("the manifest has no checksums of itself and of the tokenizer's files")
        eos = self._tokenizer()
        if content.get("parts"):
            self._parts()
        else:
            self._shards(eos)
        if content["kind"] == "preference" and found.documents % 2:
            self.wrong(file, "", f"{found.documents:,} documents are no pairs")
        return found

    def _tokenizer(self) -> int | None:
        """Its files by their checksums, and whether it is the one that the fingerprint names. The end-of-text token."""
        folder, files = self.path / "tokenizer", self.content.get("tokenizer_files", {})
        problems = [problem for name in files for problem in check_file(self.path / name, files[name])]
        self.found.problems += problems
        if problems or self.digests is None:
            return None
        from moai_llm.tokenizer import load_tokenizer

        try:
            tokenizer = load_tokenizer(folder)
            if tokenizer.fingerprint != self.content["tokenizer"]:
                what = "is not the tokenizer that made this store, by its fingerprint"
                self.wrong(folder / "tokenizer.json", "", what)
                return None
            if tokenizer.vocab_size != self.content["vocab_size"]:
                what = f"has {tokenizer.vocab_size:,} ids, the manifest says {self.content['vocab_size']:,}"
                self.wrong(folder / "tokenizer.json", "", what)
            _ = tokenizer.pad_id
            return tokenizer.eos_id
        except MoaiError as error:
            self.wrong(folder, "", str(error))
            return None

    def _shards(self, eos: int | None) -> None:
        found = self.found
        check = ShardCheck(self.path, self.content, eos, self.digests, self.progress)
        for shard in self.content["shards"]:
            check.check(shard)
        check.end()
        found.problems += check.problems
        found.notes += check.notes
        found.bytes = check.bytes
        if self.digests is not None:
            found.lengths, found.used = check.lengths, check.used
            found.unused_ids = int((~check.used).sum())
            found.learned = None if found.kind == "text" else check.learned

    def _parts(self) -> None:
        found, used = self.found, np.zeros(self.content["vocab_size"], bool)
        for part in self.content["parts"]:
            path = part_path(self.path, part["path"])
            check = _Check(path, self.digests, self.progress)
            of_part = check.run()
            found.parts.append(of_part)
            found.bytes += of_part.bytes
            for length, count in of_part.lengths.items():
                found.lengths[length] = found.lengths.get(length, 0) + count
            if self.content["kind"] != "text" and self.digests is not None:
                found.learned = (found.learned or 0) + (of_part.tokens if of_part.learned is None else of_part.learned)
            if of_part.used is not None and of_part.used.shape == used.shape:
                used |= of_part.used
            self._part(path / "manifest.json", check.content, part)
        found.unused_ids = None if self.digests is None else int((~used).sum())

    def _part(self, file: Path, content: dict[str, Any], part: dict[str, Any]) -> None:
        """Whether a part is the store of the merge, and one that can be a part."""
        if not content:
            return
        if sha256_of(file) != part["manifest"]:
            self.wrong(file, "", f"is not that of the store which {self.path} was merged of")
        if content.get("parts"):
            self.wrong(file, "", "is a merged store, and a part must be a plain one")
        for key in ("tokenizer", "vocab_size", "dtype"):
            if content[key] != self.content[key]:
                self.wrong(file, key, f"differs from that of {self.path}")
        kinds = (self.content["kind"], content["kind"])
        if kinds[0] != kinds[1] and kinds != ("chat", "text"):
            self.wrong(file, "kind", f"a store of {kinds[1]} cannot be a part of one of {kinds[0]}")
