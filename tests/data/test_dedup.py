"""Deduplication of a corpus: planted duplicates of every kind, and what must not be taken for one."""

from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moai_llm.data import duplicates
from moai_llm.data.dedup import DedupOptions, DedupReport, dedup, text_digest
from moai_llm.data.documents import Document, DocumentWriter, read_documents
from moai_llm.data.duplicates import DuplicateIndex
from moai_llm.data.lines import LineCounts
from moai_llm.data.minhash import MinHash, MinHashOptions, jaccard
from moai_llm.data.python_identity import python_identity
from moai_llm.data.sources import Reading
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

ENGLISH = [f"{a}{b}" for a, b in itertools.product(("re", "un", "pre", "over", "sub"), ("act", "form", "load", "view"))]
ENGLISH += [f"{word}{end}" for word in ENGLISH for end in ("ed", "ing", "er", "s", "ment", "able", "less", "ness")]
SYLLABLES = {
    "ko": [chr(c) for c in range(0xAC00, 0xD7A3, 37)],
    "ja": [chr(c) for c in range(0x3041, 0x3094)] + [chr(c) for c in range(0x4E00, 0x5E00, 23)],
    "zh": [chr(c) for c in range(0x4E00, 0x8000, 11)],
}


def invent(language: str, rng: random.Random, size: int = 150) -> list[str]:
    """Units of a text: words, or characters (Korean ones with spaces between some)."""
    if language == "en":
        return [f"{word} " for word in rng.choices(ENGLISH, k=size)]
    return [
        c + (" " if language == "ko" and rng.random() < 0.3 else "")
        for c in rng.choices(SYLLABLES[language], k=2 * size)
    ]


def change(units: list[str], rng: random.Random, share: float, language: str) -> list[str]:
    other = invent(language, rng, len(units))
    return [other[i] if rng.random() < share else unit for i, unit in enumerate(units)]


def run(texts: list[str], tmp_path: Path, name: str = "out.jsonl", **options: Any) -> tuple[list[str], DedupReport]:
    """Texts that are kept, with the report."""
    index = options.pop("index", None)
    places = options.pop("places", [f"t:{i + 1}" for i in range(len(texts))])

    def read() -> Iterator[Document]:
        yield from (Document(text, place, {"source": place}) for text, place in zip(texts, places))

    report = dedup(read, tmp_path / name, DedupOptions(**options), index=index, overwrite=True)
    kept = [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
    assert report.read == len(texts) and report.kept == len(kept)
    assert report.read == report.kept + report.exact + report.near + report.empty
    return kept, report


def test_equal_texts(tmp_path: Path) -> None:
    texts = ["a b c", "other", "a  b\nc ", "e\u0301t\u00e9 one", "\u00e9t\u00e9 one", "A b c", "a b d"]
    kept, report = run(texts, tmp_path, near=False)
    assert kept == ["a b c", "other", texts[3], "A b c", "a b d"] and (report.exact, report.near) == (2, 0)
    assert report.examples == [("t:3", "t:1", "equal"), ("t:5", "t:4", "equal")]
    assert (report.clusters, report.largest) == (2, 2)


@pytest.mark.parametrize("language", ["en", "ko", "ja", "zh"])
def test_near_duplicates_are_found_and_others_are_kept(language: str, tmp_path: Path) -> None:
    rng = random.Random(language)
    originals = [invent(language, rng) for _ in range(60)]
    near = [change(units, rng, 0.01, language) for units in originals[:30]]
    far = [change(units, rng, 0.4, language) for units in originals[30:]]
    texts = ["".join(units) for units in [*originals, *near, *far]]
    kept, report = run(texts, tmp_path)
    assert set(texts[:60]) <= set(kept) and set(texts[90:]) <= set(kept), "an original, or a text half of which is new"
    assert report.near + report.exact >= 26 and report.clusters == report.near + report.exact
    assert {row[2] for row in report.examples} <= {"near", "equal"}
    no_near, _ = run(texts, tmp_path, near=False)
    assert len(set(no_near)) == len(set(texts)), "the control: without MinHash the near-duplicates stay"


def test_longest_or_first(tmp_path: Path) -> None:
    rng = random.Random(3)
    units = invent("en", rng, 200)
    short, long, other = "".join(units), "".join(units) + "and a few more words", "".join(invent("en", rng))
    assert run([short, other, long], tmp_path)[0] == [short, other]
    kept, report = run([short, other, long], tmp_path, keep="longest")
    assert kept == [other, long] and report.examples == [("t:1", "t:3", "near")]


def test_verified_pairs_are_as_alike_as_asked(tmp_path: Path) -> None:
    rng = random.Random(5)
    originals = [invent("en", rng) for _ in range(40)]
    texts = ["".join(u) for u in originals] + ["".join(change(u, rng, 0.05, "en")) for u in originals]
    loose, exact = MinHashOptions(bands=64, rows=2), MinHash()
    similar = [jaccard(exact.shingles(a), exact.shingles(b)) for a, b in zip(texts[:40], texts[40:])]
    above = sum(s >= 0.7 for s in similar)
    assert 5 < above < 35
    _, report = run(texts, tmp_path, minhash=loose, verify=True, threshold=0.7)
    assert report.near == above
    assert run(texts, tmp_path, minhash=loose)[1].near > above, "the control: so loose bands join what is less alike"


def test_order_and_memory_change_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    texts = ["".join(invent("en", rng, 60)) for _ in range(80)]
    texts += texts[:20] + ["".join(change(t.split(" "), rng, 0.0, "en")) for t in texts[:5]]
    once = run(texts, tmp_path, "a.jsonl")
    again = run(texts, tmp_path, "b.jsonl", memory=1 << 12)
    assert once == again and (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_an_index_remembers_earlier_documents(tmp_path: Path) -> None:
    rng = random.Random(9)
    first = ["".join(invent("en", rng)) for _ in range(10)]
    near = "".join(change([w + " " for w in first[0].split()], rng, 0.005, "en"))
    new = "".join(invent("en", rng))
    run(first, tmp_path, index=tmp_path / "index")
    kept, report = run([near, new, new, first[1]], tmp_path, index=tmp_path / "index")
    assert kept == [new] and report.read == 4
    assert ("t:4", "a document of an earlier run", "equal") in report.examples
    assert run([new, first[2]], tmp_path, index=tmp_path / "index")[0] == []
    with (tmp_path / "index" / "lengths.bin").open("ab") as file:  # a later run that died while it wrote
        file.write(b"12345678rubbish")
    assert run([new, near], tmp_path, index=tmp_path / "index")[0] == []
    with pytest.raises(MoaiError, match=r"other options \(bands\)"):
        run([new], tmp_path, index=tmp_path / "index", minhash=MinHashOptions(bands=8))
    (tmp_path / "index" / "band-03.bin").write_bytes(b"")
    with pytest.raises(MoaiError, match="cut short"):
        run([new], tmp_path, index=tmp_path / "index")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "photo.png").write_bytes(b"x")
    with pytest.raises(MoaiError, match="holds no index"):
        run([new], tmp_path, index=tmp_path / "else")
    assert (tmp_path / "else" / "photo.png").exists()


def slow_clusters(pairs: list[tuple[int, int]], n: int) -> list[int]:
    """Connected components by repeated relabelling."""
    label = list(range(n))
    changed = True
    while changed:
        changed = False
        for i, j in pairs:
            low = min(label[i], label[j])
            changed |= label[i] != low or label[j] != low
            label[i] = label[j] = low
    return label


@pytest.mark.parametrize("seed", range(5))
def test_union_find_gives_the_connected_components(seed: int) -> None:
    rng = random.Random(seed)
    n = 200
    pairs = [(rng.randrange(n), rng.randrange(n)) for _ in range(20 * seed + 30)]
    roots = np.arange(n)
    for i, j in pairs:
        duplicates._join(roots, i, j)
    duplicates._flatten(roots)
    assert roots.tolist() == slow_clusters(pairs, n)


def sorting_memory(folder: Path, memory: int) -> tuple[int, list[int]]:
    """(most bytes allocated while clusters are found, the roots)."""
    rng = np.random.default_rng(0)
    index = DuplicateIndex(folder, MinHashOptions(bands=2, rows=1), memory=memory)
    keys = rng.integers(0, 2**63, (40_000, 2), dtype=np.uint64) * np.uint64(2)
    keys[20_000:, 0][:100] = keys[:100, 0]
    for i in range(len(keys)):
        index.add(keys[i].tobytes(), 1, keys[i])
    index._flush()
    tracemalloc.start()
    roots = index.near_roots().tolist()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - 8 * len(roots), roots


def test_sorting_stays_within_its_memory(tmp_path: Path) -> None:
    sorting_memory(tmp_path / "warm", 1 << 20)  # compiles
    small, roots = sorting_memory(tmp_path / "a", 1 << 18)
    large, same = sorting_memory(tmp_path / "b", 1 << 26)
    assert roots == same and roots[20_000:20_100] == list(range(100)) and roots[20_100] == 20_100
    assert small < 2.5e6 < large, (small, large)  # two lists of 40,000 numbers among it


def test_lines_that_many_documents_share(tmp_path: Path) -> None:
    notice = "All rights reserved by the Example Company"
    texts = [f"{notice}\nText number {i} has a line of its own here.\nshort line\n" for i in range(6)]
    texts[4] += notice.upper() + "\n"
    texts.append(f"  {notice}  \n")
    kept, report = run(texts, tmp_path, near=False, lines=3)
    assert [notice in text for text in kept] == [True] * 3 + [False] * 3
    assert all("short line" in text and "of its own" in text for text in kept)
    assert report.lines == 5 and report.empty == 1 and report.frequent_lines[0] == (notice, 4)
    kept, report = run(texts, tmp_path, near=False, lines=7)
    assert kept == texts and report.lines == 0


def test_counting_lines_in_parts_counts_the_same(tmp_path: Path) -> None:
    texts = [f"a line that is number {i % 700:05d}\nand one that is number {i:05d}" for i in range(1500)]
    whole, parts = LineCounts(tmp_path / "a", 2), LineCounts(tmp_path / "b", 2, memory=1 << 12)
    for text in texts:
        whole.count(text)
        parts.count(text)
    assert whole.finish() == parts.finish() == 100 and whole._left == parts._left


PROGRAM = '''
import os

def total(prices, rate=1.5):
    """Sum."""
    amount = 0
    for price in prices:
        amount += price * rate  # each
    return os.path.join("x", str(amount))
'''
REFORMATTED = (
    PROGRAM.replace("# each", "").replace('"x"', "'x'").replace("import os", "import os # system").replace("    ", "  ")
)
RENAMED = PROGRAM.replace("price", "cost").replace("amount", "s").replace("total", "add_up")


def test_programs_are_compared_by_their_syntax(tmp_path: Path) -> None:
    other = PROGRAM.replace("+=", "-=")
    assert python_identity(PROGRAM) == python_identity(REFORMATTED) != python_identity(RENAMED)
    assert python_identity(PROGRAM, rename=True) == python_identity(RENAMED, rename=True)
    swapped = "def f(a, b):\n    return a - b\n", "def f(a, b):\n    return b - a\n"
    for rename in (False, True):
        assert python_identity(PROGRAM, rename) != python_identity(other, rename)
        assert python_identity(swapped[0], rename) != python_identity(swapped[1], rename)
    assert python_identity("x = 1") != python_identity("x = '1'") != python_identity("x = 1.0")
    assert python_identity("global_ = 1\ndef f():\n global a\n a = 1", True) == python_identity(
        "g = 1\ndef f():\n global b\n b = 1", True
    )
    for one, two in (
        ("sum(x)", "max(x)"),
        ("x.append(1)", "x.remove(1)"),
        ("import os", "import sys"),
        ("f(a=1)", "f(b=1)"),
    ):
        assert python_identity(one, rename=True) != python_identity(two, rename=True)
    assert python_identity("def (") is None and python_identity("# only a comment") is None
    texts, places = [PROGRAM, REFORMATTED, RENAMED, other], [f"{c}.py" for c in "abcd"]
    assert run(texts, tmp_path, near=False, places=places)[0] == texts
    assert run(texts, tmp_path, near=False, places=places, code="tree")[0] == [PROGRAM, RENAMED, other]
    assert run(texts, tmp_path, near=False, places=places, code="names")[0] == [PROGRAM, other]
    assert run(texts, tmp_path, near=False, code="names")[0] == texts, "the control: nothing says they are Python"
    assert run(texts, tmp_path, near=False, code="names", python=True)[0] == [PROGRAM, other]
    deep = "x = " + "-" * 500 + "1"
    assert python_identity(deep) is not None and python_identity("x = " + "(" * 5000) is None


def test_sources_that_change_are_noticed_and_nothing_is_left(tmp_path: Path) -> None:
    for sizes, words in (((3, 5), "more documents"), ((5, 3), "fewer documents")):
        count = iter(sizes)

        def read(count: Iterator[int] = count) -> Iterator[Document]:
            yield from (Document(f"text {i}", str(i), {}) for i in range(next(count)))

        with pytest.raises(MoaiError, match=words):
            dedup(read, tmp_path / "out.jsonl")
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.5}, {"lines": 0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(MoaiError):
        DedupOptions(**options)


def test_nothing_at_all(tmp_path: Path) -> None:
    assert run([], tmp_path, lines=2, verify=True, keep="longest")[0] == []
    kept, report = run(["", " ", "..."], tmp_path)
    assert kept == ["..."] and (report.exact, report.empty) == (1, 1)


def test_digest_of_text() -> None:
    assert text_digest("a b") == text_digest(" a\n\tb") != text_digest("ab") and len(text_digest("")) == 16


@pytest.mark.parametrize("name", ["o.jsonl", "o.jsonl.zst", "o.jsonl.gz", "folder"])
def test_documents_come_back_with_their_columns(name: str, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    rows: list[dict[str, Any]] = [{"body": f"text {i} \ud800", "id": i, "more": {"a": [1, None]}} for i in range(40)]
    rows[3]["id"] = 2**70
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with DocumentWriter(tmp_path / name, part=500) as writer:
        for document in read_documents([source], Reading()):
            writer.write(document.text, document.columns)
    back = [(d.text, d.columns) for d in read_documents([tmp_path / name], Reading())]
    assert [text for text, _ in back] == [f"text {i} ?" for i in range(40)]
    assert back[0][1] == {"source": f"{source}:1", "id": 0, "more": {"a": [1, None]}}
    assert back[3][1]["id"] == str(2**70)
    assert (name != "folder") or len(list((tmp_path / name).iterdir())) > 3
    with pytest.raises(MoaiError, match="--overwrite"):
        DocumentWriter(tmp_path / name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RuntimeError), DocumentWriter(tmp_path / name, overwrite=True) as writer:
        writer.write("x", {})
        raise RuntimeError
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_output_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"x")
    refused: list[Callable[[], object]] = [
        lambda: DocumentWriter(tmp_path / "photos", overwrite=True),
        lambda: DocumentWriter(tmp_path / "out.parquet"),
    ]
    for call in refused:
        with pytest.raises(MoaiError):
            call()


@pytest.mark.parametrize("language", ["en", "ko", "ja", "zh"])
def test_planted_near_duplicates_in_a_real_book(language: str, tmp_path: Path) -> None:
    book = [d.text for d in read_documents([shared_data(f"{language}/rust_book.jsonl")], Reading())]
    pieces = [text[:3000] for text in book if len(text) > 3000]
    rng = random.Random(0)
    near = [piece[:1500] + f" {rng.randrange(10**6)} " + piece[1503:] for piece in pieces]
    base = run(pieces, tmp_path)[1]
    _, report = run(pieces + near, tmp_path)
    assert report.near + report.exact - base.near - base.exact >= 0.97 * len(near)
    assert base.near <= 0.02 * len(pieces)
