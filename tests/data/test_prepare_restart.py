"""A run that is stopped, at any moment, by anything, goes on; stores and report are those of an unbroken run."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from moai_llm.data import prepare as preparing
from moai_llm.data.code import CodeOptions
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.data.sources import Reading, pieces
from moai_llm.data.writer import StoreWriter
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer, load_tokenizer
from moai_llm.tokenizer.fim import Fim
from tests.data.test_prepare_workers import content, facts, filling, texts, write
from tests.tokenizer.conftest import tokenizer_for

ROOT = Path(__file__).parents[2]
# A process that does the work of `prepare` and is killed when it is about to do something lasting for the Nth time: an
# fsync, a rename, a deletion. Then another goes on, until one comes to the end. Forked, so that starting costs nothing.
CRASHING = """
    import json, os, random, shutil, signal, sys
    from pathlib import Path
    from moai_llm.data import prepare as preparing
    from moai_llm.data.sources import Reading, pieces
    from moai_llm.tokenizer import load_tokenizer

    folder, sources = Path(sys.argv[1]), sys.argv[3:]
    preparing.SAVE_SECONDS, pieces.PIECE_BYTES = 0, 20_000
    tokenizer = load_tokenizer(sys.argv[2])
    tokenizer.encode("the twin is made"), tokenizer.fingerprint
    done = 0

    def counted(function):
        def operation(*arguments, **options):
            global done
            done += 1
            if done == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return operation

    def attempt(name, limit_):
        global limit
        limit, pid = limit_, os.fork()
        if pid:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.fsync, os.replace, shutil.rmtree = counted(os.fsync), counted(os.replace), counted(shutil.rmtree)
        Path.unlink = counted(Path.unlink)
        report = preparing.prepare(
            sources, tokenizer, folder / name / "out", valid=folder / name / "valid", valid_share=0.05,
            reading=Reading(skip_bad=True), shard_tokens=20_000, workers=1,
        )
        facts = [[r.manifest.__dict__, r.read, r.dropped, r.skipped.broken(), r.skipped.left_out()]
                 for r in (report, report.held_out)]
        (folder / name / "report.json").write_text(json.dumps(facts))
        os._exit(0)

    for seed in range(SEEDS):  # 0 is never killed
        attempts, rng = 0, random.Random(seed)
        (folder / f"run {seed}").mkdir()
        while (code := attempt(f"run {seed}", rng.randrange(1, 70) if seed else 0)) != 0:
            assert code == -signal.SIGKILL, code
            attempts += 1
        print(attempts)
"""


def run(script: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which has none of the suite's threads."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes how far it is after every block."""
    monkeypatch.setattr(preparing, "SAVE_SECONDS", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)


def test_killed_before_everything_that_lasts(tmp_path: Path) -> None:
    sources = texts(tmp_path)
    tokenizer = tokenizer_for("chatml").save(tmp_path / "tokenizer")
    done = run(CRASHING.replace("SEEDS", "5"), tmp_path, tokenizer, *sources)
    assert done.returncode == 0, done.stderr
    none, *attempts = map(int, done.stdout.split())
    assert none == 0 and min(attempts) > 5
    unbroken = content(tmp_path / "run 0")
    assert len([name for name in unbroken if name.endswith(".bin")]) > 4
    assert all(content(tmp_path / f"run {seed}") == unbroken for seed in range(1, 5))


def stop_after(documents: int) -> Any:
    def progress(seen: int, _: int) -> None:
        if seen >= documents:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("workers", [1, 2])
def test_going_on_with_another_number_of_workers(workers: int, tmp_path: Path, saves: None) -> None:
    sources, tokenizer = texts(tmp_path), tokenizer_for("chatml")
    options: dict[str, Any] = {"reading": Reading(skip_bad=True), "valid_share": 0.05, "shard_tokens": 9000}
    whole = prepare(sources, tokenizer, tmp_path / "whole", valid=tmp_path / "held", workers=1, **options)
    for documents, number in ((300, workers), (700, 3 - workers), (1900, workers), (10**9, 3 - workers)):
        read: list[int] = []
        options["reading"] = Reading(skip_bad=True, progress=read.append)
        try:
            report = prepare(
                sources, tokenizer, tmp_path / "out", valid=tmp_path / "valid", workers=number,
                progress=stop_after(documents), **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            assert not (tmp_path / "out").exists() and (tmp_path / ".partial-out" / "state.json").is_file()
        if documents > 300:
            assert read[0] > 0  # what the others have read counts
    assert facts(report) == facts(whole)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert content(tmp_path / "valid") == content(tmp_path / "held")
    assert not list(tmp_path.glob(".*"))


def test_numbers_go_on(tmp_path: Path, saves: None) -> None:
    """What is done to source code depends on the number of the document."""
    rows = [{"text": f"def f{i}(x):\n    y = x + {i}\n    return y\n"} for i in range(1500)]
    file, tokenizer, made = write(tmp_path / "code.jsonl", rows), filling(), []
    options: dict[str, Any] = {"code": CodeOptions(Fim(0.5), language="python"), "workers": 1}
    for name, stops in (("whole", []), ("out", [1, 600, 1100])):
        for documents in stops:
            with pytest.raises(KeyboardInterrupt):
                prepare([file], tokenizer, tmp_path / name, progress=stop_after(documents), **options)
        made.append(facts(prepare([file], tokenizer, tmp_path / name, **options)))
    assert made[0] == made[1] and content(tmp_path / "out") == content(tmp_path / "whole")


def stopped(tmp_path: Path, **options: Any) -> tuple[list[Path], Tokenizer]:
    sources, tokenizer = texts(tmp_path), tokenizer_for("chatml")
    with pytest.raises(KeyboardInterrupt):
        prepare(
            sources, tokenizer, tmp_path / "out", reading=Reading(skip_bad=True), progress=stop_after(1500), **options
        )
    return sources, tokenizer


def test_another_job_does_not_go_on(tmp_path: Path, saves: None) -> None:
    sources, tokenizer = stopped(tmp_path)
    reading = Reading(skip_bad=True)
    for options, message in (
        ({"shard_tokens": 5000}, "with shard_tokens 67108864, now 5000. Run that one again to finish it"),
        ({"valid": tmp_path / "v"}, 'with one held out of 0, now 50; valid null, now ".*/v"'),
        ({"reading": Reading()}, "with skip_bad true, now false"),
        ({"kind": "chat"}, 'with kind "text", now "chat"'),
    ):
        with pytest.raises(MoaiError, match=message):
            prepare(sources, tokenizer, tmp_path / "out", **{"reading": reading, **options})
    with pytest.raises(MoaiError, match=r"with .*small0.jsonl where .*large.jsonl is now"):
        prepare(sources[4:], tokenizer, tmp_path / "out", reading=reading)
    with pytest.raises(MoaiError, match="with tokenizer "):
        prepare(sources, filling(), tmp_path / "out", reading=reading)
    os.utime(sources[2], ns=(1, 1))
    with pytest.raises(MoaiError, match=r"another state of .*small2.jsonl.*--fresh"):
        prepare(sources, tokenizer, tmp_path / "out", reading=reading)
    report = prepare(sources, tokenizer, tmp_path / "out", reading=reading, fresh=True)
    assert len(Store(tmp_path / "out")) == report.manifest.documents and not list(tmp_path.glob(".*"))


def test_overwrite_replaces_what_another_job_left(tmp_path: Path, saves: None) -> None:
    write(tmp_path / "old.jsonl", [{"text": "old"}])
    prepare([tmp_path / "old.jsonl"], tokenizer_for("chatml"), tmp_path / "out")
    sources, tokenizer = stopped(tmp_path, overwrite=True)
    assert len(Store(tmp_path / "out")) == 1  # until the new one is whole
    with pytest.raises(MoaiError, match="exists already"):
        prepare(sources, tokenizer, tmp_path / "out", reading=Reading(skip_bad=True))
    prepare([tmp_path / "old.jsonl"], tokenizer, tmp_path / "out", overwrite=True)
    assert len(Store(tmp_path / "out")) == 1 and not list(tmp_path.glob(".*"))


def test_damaged_notes_are_no_store(tmp_path: Path, saves: None) -> None:
    sources, tokenizer = stopped(tmp_path)
    shard = next((tmp_path / ".partial-out" / "store" / "shards").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(MoaiError, match="00000.bin is not as the run that was stopped left it: --fresh begins anew"):
        prepare(sources, tokenizer, tmp_path / "out", reading=Reading(skip_bad=True))
    assert not (tmp_path / "out").exists()


def test_two_at_once(tmp_path: Path, text_file: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / ".partial-out").mkdir()
    with (tmp_path / ".partial-out" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MoaiError, match="out is being prepared by another process"):
            prepare([text_file], tokenizer, tmp_path / "out")
    prepare([text_file], tokenizer, tmp_path / "out")


def test_a_broken_record_late_loses_nothing(tmp_path: Path, saves: None) -> None:
    """What was done is kept, and --skip-bad goes on from there."""
    file = write(tmp_path / "a.jsonl", [{"text": f"text {i} " * 20} for i in range(2000)] + ["{", {"text": "end"}])
    tokenizer = load_tokenizer(tokenizer_for("chatml").save(tmp_path / "tokenizer"))
    with pytest.raises(MoaiError, match=r"a.jsonl:2001: not JSON(?s:.*)kept in .*\.partial-out.*with --skip-bad past"):
        prepare([file], tokenizer, tmp_path / "out")
    read: list[int] = []
    report = prepare([file], tokenizer, tmp_path / "out", reading=Reading(skip_bad=True, progress=read.append))
    assert read[0] > 100_000 and report.read == 2001 and report.skipped.bad_count == 1
    assert content(tmp_path / "out") == content_of_whole(tmp_path, [file])


def content_of_whole(tmp_path: Path, sources: list[Path]) -> dict[str, bytes]:
    prepare(sources, load_tokenizer(tmp_path / "tokenizer"), tmp_path / "whole", reading=Reading(skip_bad=True))
    return content(tmp_path / "whole")


def test_a_short_run_leaves_nothing(tmp_path: Path, text_file: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([text_file], tokenizer, tmp_path / "out", progress=stop_after(40))
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk(tmp_path: Path) -> None:
    """The system refuses to let a file grow, as it does when the disk is full; then there is room, and it goes on."""
    file = write(tmp_path / "a.jsonl", [{"text": f"text {i} " * 20} for i in range(3000)])
    tokenizer = tokenizer_for("chatml").save(tmp_path / "tokenizer")
    script = """
        import resource, sys
        from moai_llm.data import prepare as preparing
        from moai_llm.tokenizer import load_tokenizer
        preparing.SAVE_SECONDS = 0
        if sys.argv[4]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), -1))
        try:
            report = preparing.prepare([sys.argv[1]], load_tokenizer(sys.argv[2]), sys.argv[3])
            print(report.read)
        except preparing.MoaiError as error:
            print(error)
    """
    full = run(script, file, tokenizer, tmp_path / "out", 150_000)
    assert (
        "File too large. What was done is kept in" in full.stdout
        and "goes on from there when there is room" in full.stdout
    )
    assert not (tmp_path / "out").exists()
    assert run(script, file, tokenizer, tmp_path / "out", "").stdout == "3000\n"
    assert content(tmp_path / "out") == content_of_whole(tmp_path, [file])


def test_a_finished_mark_needs_no_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    writer = StoreWriter(tmp_path / "out", tokenizer, work=tmp_path / "work")
    writer.add([1, 2, 3], 3)
    writer.finish(["here"])
    mark = json.loads(json.dumps(writer.mark()))
    writer.publish()
    assert (
        StoreWriter(tmp_path / "out", tokenizer, work=tmp_path / "work", mark=mark).manifest
        == Store(tmp_path / "out").manifest
    )


# ---------------------------------------------------------------- the command


def large(file: Path, megabytes: float) -> Path:
    rng, words = random.Random(0), [f"단어{i} word{i}" for i in range(5000)]
    with file.open("w", encoding="utf-8") as out:
        while out.tell() < megabytes * 1e6:
            text = " ".join(rng.choices(words, k=rng.randrange(5, 400)))
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return file


def start(tokenizer: Path, file: Path, out: Path, *options: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "moai_llm", "data", "prepare", str(file), "--tokenizer", str(tokenizer)]
    command += ["--out", str(out / "out"), "--valid", str(out / "valid"), "--workers", "2", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_all_processes(number: int, code: int, tmp_path: Path) -> None:
    tokenizer = tokenizer_for("chatml").save(tmp_path / "tokenizer")

    def hears() -> None:  # even where whoever runs the tests ignores it, as a shell does for what runs behind it
        signal.signal(number, signal.SIG_DFL)

    process = start(tokenizer, large(tmp_path / "a.jsonl", 40), tmp_path, preexec_fn=hears)
    parent, deadline = psutil.Process(process.pid), time.monotonic() + 60
    while len(workers := parent.children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output, output
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive and time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_thirty_times_at_random(tmp_path: Path) -> None:
    tokenizer, file = tokenizer_for("chatml").save(tmp_path / "tokenizer"), large(tmp_path / "a.jsonl", 60)
    for name in ("unhurt", "killed"):
        (tmp_path / name).mkdir()
    unhurt = start(tokenizer, file, tmp_path / "unhurt")
    output = unhurt.communicate()[0]
    assert unhurt.returncode == 0, output
    rng, kills, environment = random.Random(0), 0, dict(os.environ)
    hurry = "from moai_llm.data import prepare as p; p.SAVE_SECONDS = 0.1; from moai_llm.cli import main; main()"
    while True:
        command = [sys.executable, "-c", hurry, "data", "prepare", str(file), "--tokenizer", str(tokenizer), "--out"]
        command += [str(tmp_path / "killed" / "out"), "--valid", str(tmp_path / "killed" / "valid"), "--workers", "2"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            again = process.communicate(timeout=rng.uniform(0.5, 6) if kills < 30 else None)[0]
            if kills >= 30:
                break
            for path in (tmp_path / "killed").iterdir():  # it was faster than the kill: once more
                subprocess.run(["rm", "-r", path], check=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    assert process.returncode == 0 and content(tmp_path / "killed") == content(tmp_path / "unhurt")
    table = [line.replace("/killed/", "/unhurt/") for line in again.splitlines() if "% read: " not in line]
    assert table == [line for line in output.splitlines() if "% read: " not in line]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["out", "valid"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--clean", "default"]])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, options: list[str]) -> None:
    tokenizer = tokenizer_for("chatml").save(tmp_path / "tokenizer")
    peaks = {}
    for megabytes in (20, 120):
        process = start(tokenizer, large(tmp_path / "a.jsonl", megabytes), tmp_path, "--overwrite", *options)
        parent, peak = psutil.Process(process.pid), [0, 0]
        while process.poll() is None:
            try:
                peak[0] = max(peak[0], parent.memory_info().rss)
                peak[1] = max(peak[1], *(child.memory_info().rss for child in parent.children()), 0)
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.02)
        process.communicate()
        assert process.returncode == 0
        peaks[megabytes] = [size >> 20 for size in peak]
    print(peaks)
    assert all(small < 150 and big < small + 15 for small, big in zip(peaks[20], peaks[120])), peaks
