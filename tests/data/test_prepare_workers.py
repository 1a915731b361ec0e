"""Several processes make the store that one makes, byte for byte, with the same report; so do pieces of a source."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from moai_llm.data import pool
from moai_llm.data import prepare as preparing
from moai_llm.data.blocks import Job
from moai_llm.data.clean import Cleaner, config_from_tree
from moai_llm.data.code import CodeOptions
from moai_llm.data.collect import Report
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.data.sources import Piece, Reading, Record, Skipped, Source, expand, pieces, read_piece, read_records
from moai_llm.data.worker import Task
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.fim import FIM_TOKENS, Fim
from moai_llm.tokenizer.train import train_tokenizer
from tests.tokenizer.conftest import tokenizer_for

SMALL = 20_000  # bytes of a piece


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(preparing, "SAVE_SECONDS", 1e9)  # however slow the machine is


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def facts(report: Report) -> list[Any]:
    held_out = [] if report.held_out is None else facts(report.held_out)
    return [
        report.manifest, report.read, dict(report.dropped), report.code, report.filled, report.cut,
        report.skipped.broken(), report.skipped.left_out(), report.skipped.bad_count, *held_out,
    ]  # fmt: skip


def write(file: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def texts(folder: Path) -> list[Path]:
    """A file that is cut, with what is broken and empty in it; small files; a table; one that cannot be cut."""
    rows: list[Any] = [{"text": f"Document {i}. 이자는 {i}번 붙어요. " * (1 + i % 7)} for i in range(900)]
    rows[100], rows[333], rows[334], rows[700], rows[701] = '{"text": ', "", {"text": " "}, {"body": 1}, "[1]"
    large = write(folder / "large.jsonl", rows)
    small = [write(folder / f"small{i}.jsonl", [{"text": f"small {i}"}] * 3) for i in range(9)]
    csv = folder / "t.csv"
    csv.write_text("text,n\n" + "".join(f'"row, {i}\nand a line",{i}\n' for i in range(2000)))
    return [*small[:4], large, *small[4:], csv]


def talks(folder: Path) -> list[Path]:
    rows: list[Any] = [{"Q": f"question {i}", "A": f"answer {i} " * (i % 30)} for i in range(1200)]
    rows[1100] = {"Q": 5, "A": "a"}
    user, assistant = ({"role": role, "content": role} for role in ("user", "assistant"))
    other = [{"messages": [user, assistant]}] * 5
    return [write(folder / "qa.jsonl", rows), write(folder / "messages.jsonl", other)]


def pairs(folder: Path) -> list[Path]:
    rows = [{"prompt": f"q {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(900)]
    rows[::9] = [{**row, "rejected": row["chosen"]} for row in rows[::9]]
    return [write(folder / "pairs.jsonl", [*rows, {"prompt": "q", "chosen": None, "rejected": "b"}, *rows])]


def programs(folder: Path) -> list[Path]:
    folder = folder / "lib"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.py").write_text(f"def f{i}(x):\n    y = x + {i}\n    return y\n\n\n" * (1 + i % 30))
    return [folder]


def filling() -> Tokenizer:
    names = ["<|endoftext|>", "<|pad|>", *FIM_TOKENS]
    return train_tokenizer(["def f(x):\n    return x\n" * 50], 300, fewer=True, special_tokens=names)


JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (texts, {}),
    "text, no part held out": (texts, {"valid": None, "shard_tokens": 3000}),
    "text, what is held out": (texts, {"valid": None, "part": "valid"}),
    "cleaned": (texts, {"clean": ("language", "en")}),
    "chat": (talks, {"kind": "chat"}),
    "preference": (pairs, {"kind": "preference"}),
    "code": (programs, {"code": CodeOptions(Fim(0.7), chunk=64)}),
}


@pytest.mark.parametrize("name", JOBS)
def test_every_number_of_workers_makes_the_same(name: str, tmp_path: Path) -> None:
    make, options = JOBS[name]
    sources, tokenizer = make(tmp_path), filling() if name == "code" else tokenizer_for("chatml")
    options = {"valid": "valid", "valid_share": 0.05, "shard_tokens": 20_000, **options}
    if "clean" in options:
        config = {"language": "en", "rules": {"min_words": 5, "max_words": 30, "min_stop_words": None}}
        options["clean"] = Cleaner(config_from_tree(config))
    made = {}
    for workers in (1, 2, 3) if name == "text" else (1, 2):
        folder = tmp_path / f"{workers} workers"
        folder.mkdir()
        stores = {**options, "valid": options["valid"] and folder / "valid"}
        reading = Reading(skip_bad=True)
        report = prepare(sources, tokenizer, folder / "out", reading=reading, workers=workers, **stores)
        made[workers] = content(folder), facts(report)
        assert not list(Store(folder / "out").problems())
    assert all(one == made[1] for one in made.values())
    if name == "code":
        assert made[1][1][4] > 10  # rearranged
    if name == "text":
        assert made[1][1][8] == 3 and "large.jsonl:101: " in str(made[1][1]) and "large.jsonl:702: " in str(made[1][1])
        assert len([path for path in made[1][0] if path.endswith(".bin")]) > 4


@pytest.mark.parametrize("name", JOBS)
def test_pieces_make_what_the_whole_makes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, options = JOBS[name]
    sources, tokenizer = make(tmp_path), filling() if name == "code" else tokenizer_for("chatml")
    options = {name: value for name, value in options.items() if name != "clean"}
    made = []
    for size in (SMALL, 1 << 30):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        cut = list(pieces.slices(expand(sources), Reading()))
        assert (len(cut) > 2) == (size == SMALL) or name == "code"
        report = prepare(sources, tokenizer, tmp_path / str(size), reading=Reading(skip_bad=True), workers=1, **options)
        made.append((content(tmp_path / str(size)), facts(report)))
    assert made[0] == made[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_the_line_of_the_file(workers: int, tmp_path: Path) -> None:
    for at, line, message in ((650, "{", "not JSON"), (800, '{"text": 1}', "the text is int, not text")):
        rows: list[Any] = [{"text": f"Document {i} " * 9} for i in range(900)]
        rows[at] = line
        large = write(tmp_path / "large.jsonl", rows)
        with pytest.raises(MoaiError, match=rf"large\.jsonl:{at + 1}: {message}"):
            prepare([large], tokenizer_for("chatml"), tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("end", ["\n", "", "\n\n \n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_pieces_of_lines(end: str, bom: bytes, tmp_path: Path) -> None:
    """Lines of any length, across borders, as long as several pieces, blank, with other line ends, at every size."""
    file = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"{i} " + "é" * (i * 37 % 90)}, ensure_ascii=False) for i in range(40)]
    rows[7], rows[8], rows[20] = "", json.dumps({"text": "x" * 700}), rows[20] + "\r"
    file.write_bytes(bom + ("\n".join(rows) + end).encode())
    (source,) = expand([file])
    whole = [(r.columns["text"], int(r.place.rpartition(":")[2])) for r in read_records([file])]
    for size in (1, 7, 64, 200, 333, file.stat().st_size // 2):
        found, lines = [], 0
        for piece in pieces.cut(source, Reading(), size):
            records = read_piece(piece, Reading(), Skipped())
            while True:
                try:
                    record = next(records)
                except StopIteration as stop:
                    lines += stop.value
                    break
                found.append((record.columns["text"], lines + int(record.place.rpartition(":")[2])))
        assert found == whole and lines == file.read_bytes().count(b"\n"), size


@pytest.mark.parametrize(
    ("name", "head"), [("a.jsonl", "é".encode("utf-16")), ("a.jsonl", b"\x1f\x8b"), ("a.jsonl.gz", b""), ("a.csv", b"")]
)
def test_what_cannot_be_cut(name: str, head: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(head + b"x" * 1000)
    (source,) = expand([tmp_path / name])
    assert pieces.cut(source, Reading(), 10) == [Piece(source)]
    (tmp_path / "b.jsonl").write_bytes(b"x" * 1000)
    (source,) = expand([tmp_path / "b.jsonl"])
    assert len(pieces.cut(source, Reading(encoding="cp949"), 10)) == 1 and len(pieces.cut(source, Reading(), 10)) == 100


def test_pieces_of_a_table(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": [f"row {i} {i * i}" for i in range(997)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=50)
    (source,) = expand([tmp_path / "t.parquet"])
    cut = pieces.cut(source, Reading(), 2000)
    assert 3 < len(cut) < 20 and [piece.begin for piece in cut[1:]] == [piece.end for piece in cut[:-1]]
    found = [record for piece in cut for record in read_piece(piece, Reading(), Skipped())]
    assert found == list(read_records([tmp_path / "t.parquet"])) and found[-1].place.endswith("row 997")
    (tmp_path / "t.parquet").write_bytes(b"x" * 5000)
    (source,) = expand([tmp_path / "t.parquet"])
    assert pieces.cut(source, Reading(), 100) == [Piece(source)]  # reading it says what is wrong


def test_a_file_that_changes_meanwhile_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "x"}] * 100)
    (source,) = expand([file])
    write(file, [{"text": "x"}] * 101)
    with pytest.raises(MoaiError, match="a.jsonl has changed while it was read"):
        list(read_piece(pieces.cut(source, Reading(skip_bad=True), 100)[1], Reading(), Skipped()))


# ---------------------------------------------------------------- processes


def test_a_worker_imports_only_what_it_needs() -> None:
    heavy = ("torch", "transformers", "numba", "pyarrow", "pandas", "rich", "jinja2")
    code = f"import sys, moai_llm.data.worker; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


NUMBERED = """
import os, signal
from functools import partial
from moai_llm.data.sources import Record, Source

def read(count, reading, skipped):
    for i in range(count):
        if i == 3 and count == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 3 and count == 4:
            raise RuntimeError("an accident")
        yield Record({"text": f"{count} {i} " + "word " * 300}, f"{count}:{i}", str(count))

def numbered(count):
    return Source(str(count), None, partial(read, count))
"""


@pytest.fixture
def numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Source]:
    """Sources from a module of their own, which workers find by the path of this process."""
    (tmp_path / "numbered_sources.py").write_text(NUMBERED)
    monkeypatch.syspath_prepend(tmp_path)
    return import_module("numbered_sources").numbered  # type: ignore[no-any-return]


def test_blocks_come_in_order_in_bounded_memory(
    numbered: Callable[[int], Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "AHEAD_BYTES", 1)
    counts = [2000, 1, 300, 1000, 2, 600]
    with pool.Pool(Job(tokenizer_for("chatml")), 2) as workers:
        tasks = [Task([Piece(numbered(count))]) for count in counts]
        assert list(workers.work(task._replace(only_count=True) for task in tasks)) == counts
        found, waiting = [0], 0
        for block in workers.work(tasks):
            found[-1] += block.records
            waiting = max(waiting, sum(len(m) for w in workers._workers if w.portion for m in w.portion.waiting))
            if block.is_last:
                found.append(0)
    assert found == [*counts, 0] and waiting < 4 << 20
    assert all(worker.process.returncode is not None for worker in workers._workers)


def test_what_happens_to_a_worker_is_said(numbered: Callable[[int], Source]) -> None:
    with pool.Pool(Job(tokenizer_for("chatml")), 1) as workers:
        with pytest.raises(RuntimeError, match="(?s)a worker failed.*an accident"):
            list(workers.work([Task([Piece(numbered(4))])]))
        assert [b.records for b in workers.work([Task([Piece(numbered(7))])])] == [7, 0]  # it is still there
        with pytest.raises(MoaiError, match="a worker process was ended by SIGKILL, as happens where memory runs out"):
            list(workers.work([Task([Piece(numbered(5))])]))


def test_sources_of_this_process_are_read_here(tmp_path: Path) -> None:
    record = Record({"text": "mine"}, "mine")
    mine = [Source(f"mine {n}", None, lambda reading, skipped: iter([record])) for n in range(3)]
    report = prepare(mine, tokenizer_for("chatml"), tmp_path / "out", workers=2)
    assert report.read == 3


def test_mistakes(tmp_path: Path) -> None:
    file, tokenizer = write(tmp_path / "a.jsonl", [{"text": "a"}]), tokenizer_for("chatml")
    for options, message in (
        ({"workers": 0}, "at least one process"),
        ({"valid": tmp_path / "out"}, "name two places"),
        ({"valid": tmp_path / "v", "part": "valid"}, "one of the two only"),
        ({"shard_tokens": 0}, "at least one token"),
    ):
        with pytest.raises(MoaiError, match=message):
            prepare([file], tokenizer, tmp_path / "out", **options)  # type: ignore[arg-type]
    chats = write(tmp_path / "c.jsonl", [{"Q": "q", "A": "a"}])
    with pytest.raises(MoaiError, match="no document is left for .*out: 1 were read, and one of every 50 is held out"):
        prepare([chats], tokenizer, tmp_path / "out", kind="chat", valid=tmp_path / "v")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "c.jsonl"]
