"""The fault campaign: processes killed at random moments, files damaged, disks that fill up, signals. Whatever happens,
no good checkpoint is lost, all damage is found, and the final weights are those of a run that nothing happened to.

The fast suite has a small one; `make faults` the whole.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moai_llm.data.prepare import prepare
from moai_llm.tokenizer import Tokenizer
from moai_llm.training.checkpoint import Checkpoints, problems
from tests.training.fault_server import FAILED
from tests.training.test_run import same

SIZES = [pytest.param("small"), pytest.param("whole", marks=[pytest.mark.faults, pytest.mark.slow])]
KILLS = {"small": 20, "whole": 100}
CORRUPTIONS = {"small": 12, "whole": 100}
SIGTERMS = {"small": 3, "whole": 20}
LAST = "step-00000024"


class Trainers:
    """Trainers of one recipe, one at a time, in processes that may be killed."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder, self.store = folder, store
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.training.fault_server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, out: Path, *overrides: str, resume: bool = True) -> int:
        """The pid of a trainer that goes on with the run in `out`."""
        base = [
            f"data.train={self.store}", f"train.out={out}", "data.seq_len=32", "train.steps=24",
            "train.batch_tokens=64", "train.micro_batch_size=2", "train.precision=fp32", "train.device=cpu",
            "checkpoint.every=1", "checkpoint.keep_last=2", "log.every=1",
        ]  # fmt: skip
        self._say({"overrides": [*base, *overrides], "resume": resume})
        return int(self._read("pid"))

    def end(self) -> int:
        """How the trainer ended: its exit status, negative for a signal."""
        return int(self._read("end"))

    def run(self, out: Path, *overrides: str, resume: bool = True) -> int:
        self.start(out, *overrides, resume=resume)
        return self.end()

    def _say(self, order: dict[str, object]) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()

    def _read(self, word: str) -> str:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            first, _, rest = line.strip().partition(" ")
            if first == word:
                return rest
            self.said = line.strip()
        raise AssertionError(f"the server ended: {getattr(self, 'said', '')}")

    def close(self) -> None:
        self._server.kill()
        self._server.wait()
        for pipe in (self._server.stdin, self._server.stdout):
            pipe.close()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Trainers]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Interest on deposit {i} is paid. 이자는 {i}번 붙어요. " * (1 + i % 5)}) + "\n"
                for i in range(60))
    )  # fmt: skip
    prepare([folder / "text.jsonl"], tokenizer, folder / "store")
    trainers = Trainers(folder, folder / "store")
    yield trainers
    trainers.close()


@pytest.fixture(scope="module")
def whole(trainers: Trainers) -> Path:
    """The last checkpoint of the run that nothing happens to."""
    assert trainers.run(trainers.folder / "whole") == 0
    return trainers.folder / "whole" / "checkpoints" / LAST


def sound(out: Path) -> list[int]:
    """The steps of all checkpoints that are visible; each must be whole."""
    checkpoints = Checkpoints(out / "checkpoints")
    damaged = [step for step in checkpoints.steps() if list(problems(out / "checkpoints" / f"step-{step:08d}"))]
    assert not damaged, f"half-written checkpoints are visible: {damaged}"
    return checkpoints.steps()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", ["synchronous", "asynchronous"])
def test_kills_at_random_moments(trainers: Trainers, whole: Path, tmp_path: Path, size: str, way: str) -> None:
    rng, kills, halves, finished = random.Random(0), 0, 0, 0
    options = [f"checkpoint.asynchronous={str(way == 'asynchronous').lower()}", "checkpoint.permanent_every=7"]
    wanted = KILLS[size] // 2  # each way has its half
    begun = time.monotonic()
    assert trainers.run(tmp_path / "timed", *options) == 0
    takes = time.monotonic() - begun
    while kills < wanted or not finished:
        out = tmp_path / f"run{finished}"
        before = sound(out) if out.exists() else []
        pid = trainers.start(out, *options)
        time.sleep(rng.uniform(0.1, 0.9) * takes if kills < wanted else 0)
        if kills < wanted:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        status = trainers.end()
        assert status in (0, -signal.SIGKILL)
        after = sound(out) if out.exists() else []
        assert not before or after and after[-1] >= before[-1], "a good checkpoint is lost"
        halves += any((out / "checkpoints").glob(".tmp-*"))
        kills += status != 0
        if status == 0:
            assert same(whole, out / "checkpoints" / LAST) and {7, 14, 21} <= set(after)
            assert not list((out / "checkpoints").glob("damaged-*"))
            finished += 1
    assert halves or size == "small", "no kill fell into a save: the test shows less than it says"
    print(f"{kills} kills, {halves} in the middle of a save, {finished} runs to their end")


@pytest.mark.parametrize("size", SIZES)
def test_corruptions_are_found(trainers: Trainers, whole: Path, tmp_path: Path, size: str) -> None:
    """The newest checkpoint is damaged; the one before is used, and the run ends the same."""
    rng = random.Random(1)
    source = whole.parents[1]
    for i in range(CORRUPTIONS[size]):
        out = tmp_path / f"run{i}"
        shutil.copytree(source, out)
        newest = out / "checkpoints" / LAST
        files = sorted(p for p in newest.rglob("*") if p.is_file())
        name = damage(rng.choice(files), rng)
        assert list(problems(newest)), f"not found: {name}"
        if i % 6 == 0:  # training takes longer than looking
            assert trainers.run(out) == 0, name
            assert same(whole, newest) and (out / "checkpoints" / f"damaged-{LAST}").is_dir()
        else:
            assert Checkpoints(out / "checkpoints").latest() == newest.with_name("step-00000023")
            assert (out / "checkpoints" / f"damaged-{LAST}").is_dir()  # set aside, not deleted
        shutil.rmtree(out)


def damage(file: Path, rng: random.Random) -> str:
    """Flip, cut off, zero or delete; returns what was done. A file of zeros would not change by zeroing."""
    content = bytearray(file.read_bytes())
    how = rng.choice(["flip", "truncate", "zero", "delete"])
    at = rng.randrange(len(content))
    if how == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del content[at:]
    elif how == "zero" and any(content[at:]):
        content[at:] = bytes(len(content) - at)
    else:
        file.unlink()
        return f"{file.name} deleted"
    file.write_bytes(content)
    return f"{file.name}: {how} at {at}"


@pytest.mark.parametrize("size", SIZES)
def test_sigterm_saves_at_a_step_border(trainers: Trainers, whole: Path, tmp_path: Path, size: str) -> None:
    rng, stopped = random.Random(2), 0
    for i in range(SIGTERMS[size]):
        out = tmp_path / f"run{i}"
        pid = trainers.start(out, "checkpoint.every=1000")
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").stat().st_size:
            time.sleep(0.01)  # handlers are there once the first step is logged
        time.sleep(rng.uniform(0, 0.3))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        assert trainers.end() == 0
        (step,) = sound(out)
        stopped += step < 24
        assert trainers.run(out, "checkpoint.every=1000") == 0 and same(whole, out / "checkpoints" / LAST)
    assert stopped


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many KiB; skipped where that is not allowed."""
    point = tmp_path / "disk"
    point.mkdir()

    def mount(size: int) -> Path:
        umount()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", point], capture_output=True)
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
        return point

    def umount() -> None:
        subprocess.run(["umount", point], capture_output=True)

    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    yield mount
    umount()


@pytest.mark.parametrize("size", SIZES)
def test_a_full_disk_at_every_write(
    trainers: Trainers, whole: Path, small_disk: Callable[[int], Path], size: str
) -> None:
    """The disk is made larger by little, so that it fills up at one write after the other; then there is room again."""
    checkpoint = sum(-(-p.stat().st_size // 4096) * 4 for p in whole.rglob("*") if p.is_file()) + 64
    sizes = range(64, 3 * checkpoint + 64, checkpoint if size == "small" else max(1, checkpoint // 6))
    failed = 0
    for kib in sizes:
        out = small_disk(kib) / "run"
        status = trainers.run(out)
        assert status in (0, FAILED, 1), trainers.said
        failed += status != 0
        if out.exists() and status:
            steps = sound(out)
            assert not steps or "Nothing was lost" in trainers.said or "No space left" in trainers.said, trainers.said
            subprocess.run(["mount", "-o", f"remount,size={20 * checkpoint}k", out.parent], check=True)
            assert trainers.run(out) == 0 and same(whole, out / "checkpoints" / LAST), trainers.said
    assert failed >= 2
