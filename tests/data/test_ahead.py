"""Reading ahead: order, errors, threads that end, and a stream that goes on after a kill."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moai_llm.data.ahead import Ahead
from moai_llm.data.loader import Batch, Loader
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.data.test_rows import make_store


def numbered(step: int) -> Batch:
    return {"input_ids": torch.tensor([step])}


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("moai-data")}


def numbers(batches: Ahead) -> list[int]:
    return [int(batch["input_ids"]) for batch in batches]


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (2, 1), (3, 7)])
def test_batches_come_in_order_whoever_is_first(workers: int, prefetch: int) -> None:
    def slow(step: int) -> Batch:
        time.sleep(random.Random(step).random() * 0.004)
        return numbered(step)

    with Ahead(slow, 5, 40, workers=workers, prefetch=prefetch) as batches:
        assert numbers(batches) == list(range(5, 40))
        with pytest.raises(StopIteration):
            next(batches)


def test_no_more_is_read_than_asked_for() -> None:
    read: list[int] = []

    def remember(step: int) -> Batch:
        read.append(step)
        return numbered(step)

    with Ahead(remember, 0, workers=2, prefetch=3) as batches:
        next(batches)
        time.sleep(0.05)
        assert sorted(read) == [0, 1, 2, 3]
    with Ahead(remember, 0, workers=0) as batches:
        read.clear()
        next(batches)
        assert read == [0]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_of_a_worker_is_the_error(workers: int) -> None:
    def broken(step: int) -> Batch:
        if step == 3:
            raise MoaiError("the store is damaged, prepare the data again")
        return numbered(step)

    got = []
    with pytest.raises(MoaiError, match="^the store is damaged"):
        with Ahead(broken, 0, workers=workers, prefetch=4) as batches:
            for batch in batches:
                got.append(int(batch["input_ids"]))
    assert got == [0, 1, 2] and not threads()


def test_threads_end() -> None:
    with Ahead(numbered, 0, workers=3) as batches:
        next(batches)
        assert threads()
    assert not threads()
    with pytest.raises(KeyboardInterrupt):
        with Ahead(numbered, 0, workers=3):
            raise KeyboardInterrupt
    assert not threads()


def test_waiting_is_counted() -> None:
    def slow(step: int) -> Batch:
        time.sleep(0.02)
        return numbered(step)

    with Ahead(slow, 0, 5, workers=0) as batches:
        numbers(batches)
        assert batches.waited >= 0.1
    with Ahead(slow, 0, 5, workers=1) as batches:
        for _ in batches:
            time.sleep(0.04)  # training, which takes longer
        assert batches.waited < 0.08  # the first batch alone


def test_torch_keeps_its_threads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    before = torch.get_num_threads()
    loader = Loader(make_store(tmp_path / "s", tokenizer), 50, step_rows=4)
    with Ahead(loader.step, 0, 9, workers=2) as batches:
        for _ in batches:
            assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


# ---------------------------------------------------------------- kill

PLAN = """
import hashlib
from moai_llm.data.loader import Loader, Source, Stage
from moai_llm.data.shards import Store

def digest(batch):
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in batch.values())).hexdigest()

def two_stores(first, second):
    a, b = Store(first), Store(second)
    stages = [Stage([Source(a, 0.3), Source(b, 0.7)], until=50 * 4 * 100), Stage([Source(b, 1.0), Source(a, 0.1)])]
    return Loader(stages, 50, seed=1, step_rows=4)
"""
READ = """
import sys
from moai_llm.data.ahead import Ahead
loader = two_stores(*sys.argv[1:3])
with Ahead(loader.step, int(sys.argv[3]), workers=int(sys.argv[4]), prefetch=3) as batches:
    for step, batch in enumerate(batches, int(sys.argv[3])):
        print(step, digest(batch), flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_killed_reader_goes_on_where_it_was(tmp_path: Path, tokenizer: Tokenizer, kills: int) -> None:
    """SIGKILL at any moment; the next process begins behind the last batch that was seen, with other workers."""
    stores = [make_store(tmp_path / "a", tokenizer), make_store(tmp_path / "b", tokenizer, "chat", seed=1)]
    paths = [str(store.path) for store in stores]
    rng, seen = random.Random(0), list[tuple[int, str]]()
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", PLAN + READ, *paths, str(len(seen)), str(kill % 3)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        threading.Timer(rng.random() * 0.02, process.kill).start()
        while line.endswith("\n"):
            step, found = line.split()
            seen.append((int(step), found))
            line = process.stdout.readline()
        assert process.wait() == -9
        process.stdout.close()
    here: dict[str, Any] = {}
    exec(PLAN, here)
    loader, digest = here["two_stores"](*paths), here["digest"]
    assert len(seen) >= kills and [step for step, _ in seen] == list(range(len(seen)))
    assert [found for _, found in seen] == [digest(loader.step(step)) for step in range(len(seen))]
