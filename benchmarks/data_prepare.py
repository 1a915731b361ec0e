"""JSON lines to tokens on disk: `moai data prepare` beside datasets.map with tokenizers, and beside datatrove.

Every candidate is a program of its own that gets the same file and the same tokenizer, and ends each document with the
same token. Counted are the CPU-seconds of all its processes, and the most memory they held at the same time. Two sizes
tell what a MB costs from what it takes to start (imports, the tokenizer, processes). A candidate whose number of tokens
differs is refused. The second table lets the input grow.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from benchmarks.harness import Table

OURS, DATASETS, DATATROVE = "moai data prepare", "datasets.map, tokenizers", "datatrove DocumentTokenizer"
PARALLEL = "the same, 2 workers"
PREPARE = """
        import json, sys
        from moai_llm.cli import main
        source, tokenizer, out = sys.argv[1:]
        main(["data", "prepare", source, "--tokenizer", tokenizer, "--out", out, "--workers", "WORKERS"])
        print(json.load(open(out + "/manifest.json"))["tokens"])
"""
# each is given the file, the tokenizer's folder and where to write, and prints the number of tokens it wrote
CANDIDATES = {
    OURS: PREPARE.replace("WORKERS", "1"),
    PARALLEL: PREPARE.replace("WORKERS", "2"),
    DATASETS: """
        import datasets, pyarrow.compute, sys, tokenizers
        datasets.disable_progress_bars()
        tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
        end = tokenizer.token_to_id("<|endoftext|>")
        def encode(batch):
            encoded = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
            return {"input_ids": [[*one.ids, end] for one in encoded]}
        data = datasets.load_dataset("json", data_files=sys.argv[1], cache_dir=sys.argv[3] + "-cache", split="train")
        data = data.map(encode, batched=True, remove_columns=data.column_names)
        data.save_to_disk(sys.argv[3])
        print(pyarrow.compute.sum(pyarrow.compute.list_value_length(data.data.column("input_ids"))))
    """,
    DATATROVE: """
        import os, sys
        from datatrove.executor import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer
        folder, name = os.path.split(sys.argv[1])
        write = DocumentTokenizer(
            sys.argv[3], sys.argv[2] + "/tokenizer.json", eos_token="<|endoftext|>", shuffle_documents=False
        )
        LocalPipelineExecutor([JsonlReader(folder, glob_pattern=name), write], logging_dir=sys.argv[3] + "-logs").run()
        files = [os.path.join(sys.argv[3], name) for name in os.listdir(sys.argv[3]) if name.endswith(".ds")]
        print(sum(os.path.getsize(file) for file in files) // 2)
    """,
}


class Run(NamedTuple):
    tokens: int
    cpu: float  # seconds of all processes
    memory: int  # the most that all processes held at the same time, bytes
    largest: int  # the most that one of them held
    written: int  # bytes on disk


def run(quick: bool = False) -> list[Table]:
    from benchmarks.tokenizer import LANGUAGES, general
    from moai_llm.tokenizer.sample import sample_texts
    from moai_llm.tokenizer.train import train_tokenizer

    texts = {language: general(language, quick) for language in LANGUAGES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(sample_texts(texts, 10**9), 4000 if quick else 32000, engine="fast")
        tokenizer.save(folder / "tokenizer")
        # the libraries would take these for control tokens
        pool = [text for each in texts.values() for text in each if "<|" not in text]
        return [beside(pool, folder, 20 if quick else 40, 1 if quick else 7), *growing(pool, folder, quick)]


def beside(pool: list[str], folder: Path, megabytes: int, rounds: int) -> Table:
    from benchmarks.harness import Disagreement, Table

    files = [corpus(pool, folder / f"{size}.jsonl", size) for size in (megabytes / 5, megabytes)]
    table = Table(
        f"{megabytes} MB of ko, en, ja, zh as JSON lines ({rounds} rounds, one thread but where it says so)",
        ("", "CPU-s to start", "MB per CPU-s then", "times our CPU-s", "MB in memory", "of one process", "MB on disk"),
    )
    print(table.title)
    runs: dict[str, list[list[Run]]] = {name: [] for name in CANDIDATES}
    for _ in range(rounds):
        for name in CANDIDATES:
            runs[name].append([measure(name, file, folder) for file in files])
            for mine, theirs in zip(runs[OURS][0], runs[name][-1]):
                if theirs.tokens != mine.tokens:
                    raise Disagreement(f"{name} wrote {theirs.tokens:,} tokens, ours {mine.tokens:,}")
    cost = {  # of a MB beyond the smaller file
        name: [(large.cpu - small.cpu) / (0.8 * megabytes) for small, large in several]
        for name, several in runs.items()
    }
    ratio = {
        name: statistics.median(theirs / mine for theirs, mine in zip(several, cost[OURS]))
        for name, several in cost.items()
    }
    for name, several in runs.items():
        each = statistics.median(cost[name])
        start = statistics.median(large.cpu for _, large in several) - each * megabytes
        most = (max(getattr(large, what) for _, large in several) for what in ("memory", "largest", "written"))
        table.add(name, start, 1 / each, ratio[name], *(f"{size / 1e6:.0f}" for size in most))
    for name in (DATASETS, DATATROVE):
        table.goal(f"MB per CPU-second against {name}", ratio[name], at_least=4)
    return table


def growing(pool: list[str], folder: Path, quick: bool) -> Iterator[Table]:
    """Our time and memory on ten times the text."""
    from benchmarks.harness import Table

    if quick:
        return
    table = Table(
        "moai data prepare, 2 workers, on more text", ("", "CPU-seconds per MB", "memory of the largest process, MB")
    )
    print(table.title)
    found = {}
    for megabytes in (100, 1000):
        file = corpus(pool, folder / "corpus.jsonl", megabytes)
        found[megabytes] = once = measure(PARALLEL, file, folder)
        table.add(f"{megabytes:,} MB", once.cpu / megabytes, f"{once.largest / 1e6:.0f}")
    small, large = found[100], found[1000]
    table.goal("CPU-seconds of 1 GB against ten times those of 100 MB", large.cpu / (10 * small.cpu), at_most=1.1)
    table.goal("memory of the largest process, MB", large.largest / 1e6, at_most=150)
    table.goal("memory at 1 GB against 100 MB", large.largest / small.largest, at_most=1.1)
    yield table


def corpus(pool: list[str], file: Path, megabytes: float) -> Path:
    """Pieces of the texts, of 200 to 6,000 characters."""
    rng, size = random.Random(0), 0
    with file.open("wb") as out:
        while size < megabytes * 1e6:
            text = rng.choice(pool)
            start = rng.randrange(max(1, len(text) - 3000))
            text = text[start : start + rng.randrange(200, 6000)]
            size += out.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
    return file


def measure(name: str, file: Path, folder: Path) -> Run:
    """Run a candidate, and watch all of its processes."""
    import psutil

    out = Path(tempfile.mkdtemp(dir=folder)) / "out"
    script = "\n".join(line.removeprefix(" " * 8) for line in CANDIDATES[name].splitlines())
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LOGURU_LEVEL": "ERROR"}
    environment["TOKENIZERS_PARALLELISM"] = "false"  # two threads on one core would cost more CPU-seconds
    with (out.parent / "errors").open("wb+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(file), str(folder / "tokenizer"), str(out)],
            stdout=subprocess.PIPE, stderr=errors, env=environment, text=True,
        )  # fmt: skip
        tree, memory, largest = psutil.Process(process.pid), 0, 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            sizes = list(_sizes(tree))
            memory, largest = max(memory, sum(sizes)), max([largest, *sizes])
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stdout is not None
        output = process.stdout.read()
        process.stdout.close()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{name} failed:\n{errors.read().decode()}")
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and "tokenizer" not in path.parts)
    return Run(int(output.split()[-1]), usage.ru_utime + usage.ru_stime, memory, largest, written)


def _sizes(tree: object) -> Iterator[int]:
    import psutil

    assert isinstance(tree, psutil.Process)
    for process in [tree, *tree.children(recursive=True)]:
        try:
            yield process.memory_info().rss
        except psutil.Error:  # it has ended
            continue
