"""Documents into rows: how full, how even, how fast, beside next fit, concat and split, and trl's packer.

On the shared sets, tokenised by a vocabulary learned on the spot. Times are CPU-seconds. A packer counts only if every
token of the documents is in its rows once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.harness import Disagreement, Table, interleave
from moai_llm.data.balance import imbalance, rows_of_stream
from moai_llm.data.bins import best_fit_reference
from moai_llm.data.packing import STRATEGIES, pack
from moai_llm.tokenizer.train import train_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
RANKS, STEPS = 8, 60
CAPACITIES = (2048, 8192)


class Rows(NamedTuple):
    """What a packer made: the lengths of the pieces of each row; how many documents it cut that would have fitted."""

    starts: np.ndarray
    lengths: np.ndarray
    cut: int | None = None

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    def full(self, capacity: int) -> float:
        return float(100 * self.lengths.sum() / (self.count * capacity))

    def costs(self) -> np.ndarray:
        return np.add.reduceat(self.lengths.astype(np.float64) ** 2, self.starts[:-1])


def run(quick: bool = False) -> list[Table]:
    sets = lengths_of_sets(quick)
    peer = trl_packer()
    return [fullness(sets, peer), evenness(sets, peer), speed(100_000 if quick else 1_000_000, peer, 1 if quick else 5)]


def lengths_of_sets(quick: bool) -> dict[str, np.ndarray]:
    """Tokens of each document of each set, the end-of-text token included."""
    texts = {"Alpaca en, zh": alpaca(), "chats ko": chats(), "documents": documents(), "TAT-QA": reports()}
    if quick:
        texts = {name: found[:600] for name, found in texts.items()}
    tokenizer = train_tokenizer([text for found in texts.values() for text in found[::4]], 16_000, fewer=True)
    return {
        name: np.array([len(ids) + 1 for ids in tokenizer.encode_batch(found)], np.int64)
        for name, found in texts.items()
    }


def alpaca() -> list[str]:
    files = (DATA / "sft" / f"alpaca_{language}_demo.json" for language in ("en", "zh"))
    records = [record for file in files for record in json.loads(file.read_text(encoding="utf-8"))]
    return ["\n".join(str(record.get(key) or "") for key in ("instruction", "input", "output")) for record in records]


def chats() -> list[str]:
    with (DATA / "ko" / "ChatbotData.csv").open(encoding="utf-8") as file:
        return ["\n".join(row[:2]) for row in csv.reader(file)]


def documents() -> list[str]:
    """Books, courses and manuals in four languages, and pages of C4: from a few tokens to many rows."""
    files = [*DATA.glob("??/*_book.jsonl"), *DATA.glob("??/*_course.jsonl"), *DATA.glob("??/*_docs.jsonl")]
    lines = [line for file in sorted(files) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [json.loads(line)["text"] for line in lines]
    pages = (DATA / "sft" / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()
    return found + [json.loads(line)["text"] for line in pages]


def reports() -> list[str]:
    """Each question with the table and the paragraphs it is asked about."""
    found = []
    for report in json.loads((DATA / "finance" / "tatqa_dev.json").read_text(encoding="utf-8")):
        context = [" | ".join(map(str, row)) for row in report["table"]["table"]]
        context += [paragraph["text"] for paragraph in report["paragraphs"]]
        found += ["\n".join([*context, q["question"], str(q["answer"])]) for q in report["questions"]]
    return found


def ours(lengths: np.ndarray, capacity: int, strategy: str) -> Rows:
    packing = pack(lengths, capacity, strategy)
    if packing.length.sum() != lengths.sum():
        raise Disagreement(f"{strategy} lost tokens: nothing is measured")
    cut = np.bincount(packing.document, minlength=len(lengths)) > 1
    return Rows(packing.row_starts, packing.length, int((cut & (lengths <= capacity)).sum()))


Peer = Callable[[np.ndarray, int, "int | None"], Rows]


def trl_packer() -> Peer | None:
    """trl's best-fit packer that keeps what is longer than a row; None where trl is not installed."""
    try:
        import datasets
        import pyarrow
        from trl import pack_dataset
    except ImportError as error:
        print(f"  trl is left out, it is not installed ({error}): pip install 'moai-llm[bench]'")
        return None
    datasets.disable_progress_bars()

    def packed(lengths: np.ndarray, capacity: int, batch: int | None = 1000) -> Rows:
        offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        ids = pyarrow.ListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int32))
        made = pack_dataset(
            datasets.Dataset(pyarrow.table({"input_ids": ids})),
            capacity,
            "bfd_split",
            {"batch_size": batch, "keep_in_memory": True},
        )
        column = made.with_format("arrow")[:]["seq_lengths"].combine_chunks()
        rows = Rows(column.offsets.to_numpy().astype(np.int64), column.flatten().to_numpy())
        if rows.lengths.sum() != lengths.sum():
            raise Disagreement("trl lost tokens: nothing is measured")
        return rows

    return packed


def fullness(sets: dict[str, np.ndarray], peer: Peer | None) -> Table:
    table = Table(
        "How full the rows are, in percent, the sets as they are",
        ("set", "documents", "tokens in a row", "the fewest rows", *STRATEGIES, "trl bfd_split", "cut by concat"),
    )
    print(table.title)
    worst, cut = {"best-fit": 100.0, "balanced": 100.0}, 0
    for name, lengths in sets.items():
        for capacity in CAPACITIES:
            made = {strategy: ours(lengths, capacity, strategy) for strategy in STRATEGIES}
            fewest = int(-(-lengths.sum() // capacity))
            shown = [f"{rows.full(capacity):.2f}" for rows in made.values()]
            shown.append("not installed" if peer is None else f"{peer(lengths, capacity, 1000).full(capacity):.2f}")
            share = 100 * (made["concat"].cut or 0) / len(lengths)
            table.add(name, f"{len(lengths):,}", f"{capacity:,}", f"{fewest:,}", *shown, f"{share:.1f}% of documents")
            for strategy in worst:
                worst[strategy] = min(worst[strategy], 100 * fewest / made[strategy].count)
                cut += made[strategy].cut or 0
    for strategy, percent in worst.items():
        table.goal(f"percent, the fewest rows / rows of {strategy}, worst set", percent, at_least=99)
    table.goal("documents that fit and are cut by best-fit or balanced", cut, at_most=0)
    return table


def evenness(sets: dict[str, np.ndarray], peer: Peer | None) -> Table:
    """Sets drawn from with replacement until there are enough steps; only balanced has a say in what forms a step."""
    table = Table(
        f"Attention imbalance, mean of (max - x) / max over {RANKS} ranks with a row each, at least {STEPS - 10} steps",
        ("set, drawn from", "tokens in a row", "steps", "best-fit", "balanced", "next-fit", "concat", "trl bfd_split",
         "best-fit, % full", "balanced, % full"),
    )  # fmt: skip
    print(table.title)
    worst, least, full = 0.0, 10**9, {"best-fit": 100.0, "balanced": 100.0}
    for name, lengths in sets.items():
        for capacity in CAPACITIES:
            rng = np.random.default_rng(0)
            drawn = rng.choice(lengths, int(np.ceil(STEPS * RANKS * capacity / lengths.mean())))
            made = {s: ours(drawn, capacity, s) for s in ("best-fit", "balanced", "next-fit", "concat")}
            shown = {strategy: uneven(rows, strategy == "balanced") for strategy, rows in made.items()}
            other = "not installed" if peer is None else f"{uneven(peer(drawn, capacity, 1000), False):.3f}"
            steps = made["balanced"].count // RANKS
            filled = {strategy: made[strategy].full(capacity) for strategy in full}
            table.add(name, f"{capacity:,}", f"{steps}", *(f"{value:.3f}" for value in shown.values()), other,
                      *(f"{value:.2f}" for value in filled.values()))  # fmt: skip
            worst, least = max(worst, shown["balanced"]), min(least, steps)
            full = {strategy: min(full[strategy], filled[strategy]) for strategy in full}
    table.goal("imbalance of balanced, worst set", worst, at_most=0.1)
    table.goal("steps, fewest", least, at_least=50)
    for strategy, percent in full.items():
        table.goal(f"percent full, {strategy}, worst set", percent, at_least=99)
    return table


def uneven(rows: Rows, balanced: bool) -> float:
    steps = rows.count // RANKS
    order = rows_of_stream(np.arange(steps * RANKS), rows.count, seed=0, step=RANKS if balanced else 1)
    return imbalance(rows.costs()[order].reshape(steps, RANKS))


def speed(count: int, peer: Peer | None, rounds: int) -> Table:
    """Lengths alone, as a plan over a store needs; and tokens moved into rows, as trl does."""
    capacity = 2048
    lengths = lognormal(count)
    plans: dict[str, Callable[[], object]] = {}
    for strategy in STRATEGIES:
        plans[strategy] = lambda strategy=strategy: pack(lengths, capacity, strategy)  # type: ignore[misc]
    ordered = -np.sort(-np.minimum(lengths, capacity))
    plans["best-fit in plain Python, lengths sorted before"] = lambda: best_fit_reference(ordered, capacity)
    some = lognormal(count // 20)
    moved: dict[str, Callable[[], object]] = {"best-fit, tokens moved": lambda: move(some, capacity)}
    if peer is not None:
        moved["trl bfd_split, batches of 1,000 (its default)"] = lambda: peer(some, capacity, 1000)
        moved["trl bfd_split, all at once"] = lambda: peer(some, capacity, None)
    table = Table(f"CPU-seconds, rows of {capacity:,} tokens", ("packer", "documents", "CPU-s", "% full"))
    print(table.title)
    timings = interleave(plans, rounds) | interleave(moved, rounds)
    for name, timing in timings.items():
        n = count if name in plans else len(some)
        full = "" if name not in STRATEGIES else f"{100 * pack(lengths, capacity, name).efficiency:.2f}"
        if name.startswith("trl") and peer is not None:
            full = f"{peer(some, capacity, 1000 if 'default' in name else None).full(capacity):.2f}"
        if name == "best-fit, tokens moved":
            full = f"{100 * pack(some, capacity).efficiency:.2f}"
        table.add(name, f"{n:,}", f"{timing.cpu:.3f}", full)
    scale = 1_000_000 / count
    for strategy in ("best-fit", "balanced"):
        table.goal(f"CPU-seconds for a million documents, {strategy}", timings[strategy].cpu * scale, at_most=1.5)
    if peer is not None:
        best = min(timing.cpu for name, timing in timings.items() if name.startswith("trl"))
        table.goal("times less CPU than trl, tokens moved", best / timings["best-fit, tokens moved"].cpu, at_least=1)
    return table


def lognormal(count: int) -> np.ndarray:
    """Lengths as documents of the web have them: most short, some of many rows."""
    return np.minimum(np.random.default_rng(0).lognormal(5, 1.3, count).astype(np.int64) + 1, 50_000)


def move(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The tokens of every document, copied to where they stand in the rows: what trl's packer returns."""
    tokens = np.zeros(int(lengths.sum()), np.int32)
    packing = pack(lengths, capacity)
    begins = (lengths.cumsum() - lengths)[packing.document] + packing.start
    pieces = zip(begins.tolist(), (begins + packing.length).tolist())
    return np.concatenate([tokens[begin:end] for begin, end in pieces])
