"""Near-duplicates: documents per CPU-second and recall of planted ones, beside datasketch and rensa.

Every candidate gets the same texts and finds, for each planted document, whether its original is among its candidates:
128 permutations, 16 bands of 8 rows, shingles of 5 words. In a planted document 3 % of the words are changed. A library
that takes many other texts for near-duplicates is refused.
"""

from __future__ import annotations

import random
import sysconfig
import time
from pathlib import Path

from benchmarks.harness import Disagreement, Table

PLANTED, CHANGED = 300, 0.03
PERMUTATIONS, BANDS, ROWS, WORDS = 128, 16, 8, 5
Pairs = dict[int, set[int]]  # planted document -> documents it may be a copy of


def run(quick: bool = False) -> list[Table]:
    documents, originals = corpus(900 if quick else 4000)
    table = Table(
        f"{len(documents):,} documents, {sum(map(len, documents)) / 1e6:.1f} M characters, {PLANTED} planted, 1 thread",
        ("", "documents per CPU-second", "recall of planted", "wrong candidates"),
    )
    print(table.title)
    speeds, recalls = {}, {}
    for name, find in {"ours": ours, "datasketch": datasketch, "rensa (R-MinHash)": rensa}.items():
        find(documents[:50], {49: 0})  # compiles, loads
        taken = []
        for _ in range(1 if quick else 3):
            start = time.process_time()
            pairs = find(documents, originals)
            taken.append(time.process_time() - start)
        found = sum(original in pairs.get(copy, ()) for copy, original in originals.items())
        wrong = sum(len(others - {originals[copy]}) for copy, others in pairs.items())
        if wrong > 0.05 * PLANTED:
            raise Disagreement(f"{name} takes {wrong} different texts for near-duplicates: nothing is measured")
        speeds[name], recalls[name] = len(documents) / sorted(taken)[len(taken) // 2], found / PLANTED
        table.add(name, f"{speeds[name]:,.0f}", f"{found}/{PLANTED}", str(wrong))
    table.goal("documents per CPU-second against datasketch", speeds["ours"] / speeds["datasketch"], at_least=5)
    table.goal("recall less rensa's", recalls["ours"] - recalls["rensa (R-MinHash)"], at_least=-0.02)
    return [table]


def corpus(count: int) -> tuple[list[str], dict[int, int]]:
    """(documents, copy -> its original): pieces of the standard library's source, and altered copies of some."""
    rng, pieces = random.Random(0), list[str]()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py")):
        if len(pieces) >= count:
            break
        # in tests and tables of encodings are near-duplicates that nobody planted
        if not {"site-packages", "test", "tests", "encodings"} & set(path.parts):
            words = path.read_text(encoding="utf-8", errors="replace").split()
            pieces += [" ".join(words[i : i + 300]) for i in range(200, len(words) - 300, 300)]
    pieces = pieces[:count]
    chosen = rng.sample(range(len(pieces)), PLANTED)
    copies = []
    for i in chosen:
        words = pieces[i].split()
        for k in rng.sample(range(len(words)), round(CHANGED * len(words))):
            words[k] = f"x{rng.randrange(10**6)}"
        copies.append(" ".join(words))
    return pieces + copies, {len(pieces) + k: original for k, original in enumerate(chosen)}


def shingles(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))]


def ours(documents: list[str], originals: dict[int, int]) -> Pairs:
    """The kernels of `moai data dedup`, with its files and sorting."""
    import tempfile

    from moai_llm.data.dedup import text_digest
    from moai_llm.data.duplicates import DuplicateIndex
    from moai_llm.data.minhash import MinHash, MinHashOptions

    minhash = MinHash(MinHashOptions(BANDS, ROWS, WORDS))
    with tempfile.TemporaryDirectory() as folder:
        index = DuplicateIndex(Path(folder) / "index", minhash.options)
        for text in documents:
            index.add(text_digest(text), len(text), minhash.band_keys(text))
        roots = index.near_roots().tolist()
    members: dict[int, set[int]] = {}
    for i, root in enumerate(roots):
        members.setdefault(root, set()).add(i)
    return {copy: members[roots[copy]] - {copy} for copy in originals}


def datasketch(documents: list[str], originals: dict[int, int]) -> Pairs:
    from datasketch import MinHash, MinHashLSH

    index, signatures = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS)), []
    for i, text in enumerate(documents):
        signature = MinHash(PERMUTATIONS)
        signature.update_batch([shingle.encode() for shingle in shingles(text)])
        index.insert(i, signature)
        signatures.append(signature)
    return {copy: set(index.query(signatures[copy])) - {copy} for copy in originals}


def rensa(documents: list[str], originals: dict[int, int]) -> Pairs:
    from rensa import RMinHash, RMinHashLSH

    index, signatures = RMinHashLSH(threshold=0.7, num_perm=PERMUTATIONS, num_bands=BANDS), []
    for i, text in enumerate(documents):
        signature = RMinHash(PERMUTATIONS, 42)
        signature.update(shingles(text))
        index.insert(i, signature)
        signatures.append(signature)
    return {copy: set(index.query(signatures[copy])) - {copy} for copy in originals}
