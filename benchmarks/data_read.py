"""Reading packed rows: tokens per CPU-second beside datasets and torch's DataLoader, and what each knob does.

Documents of 500 tokens on average in a store of 20 M tokens, rows of 2,048, steps of 32 rows, one thread unless said
otherwise. Ours makes four tensors of each row (ids, labels, positions, document numbers); datasets reads rows that were
packed before and returns the ids alone. Candidates count only if they return the same tokens.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Disagreement, Table, interleave, threads
from moai_llm.data.ahead import Ahead
from moai_llm.data.loader import Batch, Loader
from moai_llm.data.mixing import Quotas
from moai_llm.data.packing import pack
from moai_llm.data.rows import row_reference
from moai_llm.data.shards import Kind, Store
from moai_llm.data.writer import StoreWriter
from moai_llm.tokenizer.train import train_tokenizer

SEQ_LEN, ROWS = 2048, 32


def run(quick: bool = False) -> list[Table]:
    with tempfile.TemporaryDirectory() as name, threads(1):
        folder, tokens = Path(name), 2_000_000 if quick else 20_000_000
        stores = {kind: make_store(folder / kind, kind, tokens) for kind in ("text", "chat")}
        return [
            speed(stores, folder, quick),
            threads_or_processes(stores["text"], quick),
            knobs(stores["text"], quick),
            opening(1_000_000 if quick else 10_000_000),
        ]


def make_store(path: Path, kind: Kind, tokens: int) -> Store:
    rng = np.random.default_rng(0)
    with StoreWriter(path, train_tokenizer(["some words to learn from " * 9], 270, fewer=True), kind) as writer:
        while writer.tokens < tokens:
            length = min(20_000, 1 + int(rng.lognormal(5.7, 1)))
            learn = None if kind == "text" else (rng.random(length) < 0.5).tolist()
            writer.add(rng.integers(0, 256, length).tolist(), length, learn)
        writer.close()
    return Store(path)


def speed(stores: dict[str, Store], folder: Path, quick: bool) -> Table:
    steps = 10 if quick else 60
    text, chat = (Loader(stores[kind], SEQ_LEN, step_rows=ROWS) for kind in ("text", "chat"))
    truth = [text.step(i)["input_ids"] for i in range(steps)]

    def all_steps(read: Callable[[int], Batch]) -> Callable[[], Any]:
        return lambda: [read(step) for step in range(steps)]

    def reference(step: int) -> Batch:
        rows = [row_reference(text.sources[0], int(i)) for i in text._at(step * ROWS, ROWS)[1]]
        return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in rows[0]}

    built = {key: torch.cat([text.step(i)[key] for i in range(steps)]) for key in text.step(0)}

    def kept(step: int) -> Batch:
        order = torch.arange(step * ROWS, step * ROWS + ROWS)  # rows in an order that was drawn before
        return {key: tensor[order] for key, tensor in built.items()}

    candidates = {
        "ours, text": all_steps(text.step),
        "ours, conversations": all_steps(chat.step),
        "copies of finished batches in memory": all_steps(kept),
        "our reference in NumPy": all_steps(reference),
        "torch DataLoader, our rows one by one": lambda: list(DataLoader(SingleRows(text, steps), ROWS)),
        **hub_datasets(truth, folder / "arrow"),
    }
    for name, candidate in candidates.items():
        if name != "ours, conversations":
            got = torch.stack([batch["input_ids"] for batch in candidate()])
            if not torch.equal(got.long(), torch.stack(truth)):
                raise Disagreement(f"{name} returns other tokens: nothing is measured")
    times = interleave(candidates, rounds=1 if quick else 7)
    table = Table(
        f"{text.sources[0].store.manifest.tokens / 1e6:.0f} M tokens, steps of {ROWS} rows, 1 thread",
        ("", "M tokens per CPU-second", "ours is times as fast"),
    )
    print(table.title)
    for name, timing in times.items():
        table.add(name, steps * ROWS * SEQ_LEN / timing.cpu / 1e6, timing.cpu / times["ours, text"].cpu)
    table.goal(
        "M tokens per CPU-second from the memory map",
        steps * ROWS * SEQ_LEN / times["ours, text"].cpu / 1e6,
        at_least=50,
    )
    return table


class Steps(Dataset):
    """Our batches as a data set of torch, one item a step."""

    def __init__(self, loader: Loader, steps: int) -> None:
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        return self.loader.step(step)


class SingleRows(Steps):
    """Rows one by one, for torch to put together."""

    def __len__(self) -> int:
        return self.steps * ROWS

    def __getitem__(self, position: int) -> Batch:
        return {key: tensor[0] for key, tensor in self.loader.rows(position, 1).items()}


def hub_datasets(truth: list[torch.Tensor], folder: Path) -> dict[str, Callable[[], Any]]:
    """datasets, memory-mapped: rows in a random order one by one and as a list, and neighbours."""
    try:
        import datasets
    except ImportError:
        print("  datasets is left out, it is not installed: pip install 'moai-llm[data]'")
        return {}
    datasets.disable_progress_bars()
    rows = torch.cat(truth).numpy().astype(np.int32)
    place = np.random.default_rng(0).permutation(len(rows))
    shuffled = np.empty_like(rows)
    shuffled[place] = rows
    made: dict[str, Any] = {}
    for name, table in {"in order": rows, "shuffled": shuffled}.items():
        datasets.Dataset.from_dict({"input_ids": table}).save_to_disk(str(folder / name))
        made[name] = datasets.load_from_disk(str(folder / name)).with_format("torch")

    def one_by_one(step: int) -> Batch:
        wanted = place[step * ROWS : step * ROWS + ROWS]
        return {"input_ids": torch.stack([made["shuffled"][int(i)]["input_ids"] for i in wanted])}

    def random_rows(step: int) -> Batch:
        return {"input_ids": made["shuffled"][place[step * ROWS : step * ROWS + ROWS].tolist()]["input_ids"]}

    def neighbours(step: int) -> Batch:
        return {"input_ids": made["in order"][step * ROWS : step * ROWS + ROWS]["input_ids"]}

    ways = {"random rows one by one": one_by_one, "random rows": random_rows, "neighbouring rows": neighbours}
    return {
        f"datasets, {name}": lambda read=read: [read(step) for step in range(len(truth))]  # type: ignore[misc]
        for name, read in ways.items()
    }


def threads_or_processes(store: Store, quick: bool) -> Table:
    """CPU time of the program and its workers together."""
    steps = 40 if quick else 300
    loader = Loader(store, SEQ_LEN, step_rows=ROWS)
    table = Table(f"{steps} steps read ahead, the same batches", ("", "M tokens per CPU-second", "seconds"))
    print(table.title)

    def by_thread() -> None:
        with Ahead(loader.step, 0, steps, workers=1, prefetch=2) as batches:
            for _ in batches:
                pass

    def by_process() -> None:
        for _ in DataLoader(Steps(loader, steps), batch_size=None, num_workers=1, prefetch_factor=2):
            pass

    for name, read in {"ours, a thread": by_thread, "torch DataLoader, a process": by_process}.items():
        rounds = []
        for _ in range(1 if quick else 5):
            before, began = os.times(), time.perf_counter()
            read()
            after, wall = os.times(), time.perf_counter() - began
            rounds.append((sum(after[:4]) - sum(before[:4]), wall))
        cpu, wall = sorted(rounds)[len(rounds) // 2]
        table.add(name, steps * ROWS * SEQ_LEN / cpu / 1e6, wall)
    return table


def knobs(store: Store, quick: bool) -> Table:
    """Share of its time that a training step of 20 ms waits for data."""
    table = Table(
        "share of the time spent waiting, a training step takes 20 ms",
        ("data.workers", "data.prefetch", "memory map", "every tenth step 60 ms later", "every step 30 ms later"),
    )
    print(table.title)
    steps = 15 if quick else 60
    loader = Loader(store, SEQ_LEN, step_rows=ROWS)

    def waiting(workers: int, prefetch: int, late: Callable[[int], float]) -> float:
        def read(step: int) -> Batch:
            time.sleep(late(step))  # storage that answers late
            return loader.step(step)

        with Ahead(read, 0, steps, workers=workers, prefetch=prefetch) as batches:
            began = time.perf_counter()
            for _ in batches:
                time.sleep(0.02)
            return batches.waited / (time.perf_counter() - began)

    storages: list[Callable[[int], float]] = [lambda i: 0, lambda i: 0.06 * (i % 10 == 9), lambda i: 0.03]
    found = {}
    for workers, prefetch in ((0, 1), (1, 1), (1, 4), (4, 4), (4, 8)):
        found[workers, prefetch] = [waiting(workers, prefetch, late) for late in storages]
        shown = [f"{share:.1%}" for share in found[workers, prefetch]]
        table.add(str(workers), str(prefetch) if workers else "-", *shown)
    table.goal("share spent waiting as it is by default, memory map", found[1, 4][0], at_most=0.02)
    return table


def opening(documents: int) -> Table:
    """What is done once: packing, and entering a mixture far from its beginning."""
    table = Table("what is done once", ("", "CPU-seconds", "peak memory, bytes a document"))
    print(table.title)
    from benchmarks.harness import peak_memory

    lengths = np.minimum(1 + np.random.default_rng(0).lognormal(5.7, 1, documents).astype(np.int64), 20_000)
    pack(lengths[:1000], SEQ_LEN)
    began = time.process_time()
    packing = pack(lengths, SEQ_LEN)
    spent = time.process_time() - began
    del packing
    table.add(
        f"packing {documents / 1e6:g} M documents",
        spent,
        f"{peak_memory(lambda: pack(lengths, SEQ_LEN)) / documents:.0f}",
    )
    quotas = Quotas(np.random.default_rng(0).random(20).tolist())
    quotas.locate(0, 1)
    began = time.process_time()
    for i in range(100):
        quotas.counts(10**9 + i)
    table.add("entering a mixture of 20 stores after 10^9 rows", (time.process_time() - began) / 100, "-")
    return table
