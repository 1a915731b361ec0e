"""Memory stays flat: whatever unpacks to hundreds of megabytes is read, or refused, in a few dozen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
MB = 1 << 20
SIZE = 192  # MB of each, unpacked
ALLOWED = 96  # MB more than at rest
PROGRAM = """
import re, sys
from moai_llm.data.sources import Reading, Skipped, read_texts
import moai_llm.data.sources.git, moai_llm.data.sources.hub
if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet

def peak():  # of this program; getrusage would begin with what its parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

before, skipped = peak(), Skipped(allow_bad=True)
if sys.argv[2] == "whole":
    import zstandard
    texts = [zstandard.ZstdDecompressor().stream_reader(open(sys.argv[1], "rb")).readall()]
else:
    texts = read_texts([sys.argv[1]], reading=Reading(max_record=1 << 20), skipped=skipped)
print(sum(1 for _ in texts), skipped.bad_count, peak() - before)
"""


def blocks(begin: bytes, block: bytes, end: bytes = b"") -> Iterator[bytes]:
    yield begin
    block *= max(1, MB // len(block))
    for _ in range(SIZE):
        yield block
    yield end


ITEM = b'{"text": "' + b"word " * 2000 + b'"}'
CASES: dict[str, tuple[Callable[[], Iterator[bytes]], int, int]] = {  # content, texts, bad ones
    "line.jsonl.zst": (lambda: blocks(b'{"text": "', b"a"), 0, 1),
    "line.txt.zst": (lambda: blocks(b"", b"a"), 0, 1),
    "lines.txt.zst": (lambda: blocks(b"", b"some words in a line\n"), SIZE, 0),
    "list.json.zst": (lambda: blocks(b"[", ITEM + b",\n", ITEM + b"]"), SIZE * (MB // 10014) + 1, 0),
    "string.json.zst": (lambda: blocks(b'[{"text": "', b"a"), 0, 1),
    "quote.csv.zst": (lambda: blocks(b'text\n"', b"never closed\n"), 0, 1),
}  # fmt: skip


def run(path: Path, how: str) -> tuple[int, int, int]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, path, how], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    texts, bad, grown = map(int, done.stdout.split())
    return texts, bad, grown


def pack(path: Path, content: Iterator[bytes]) -> None:
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as packed:
        for block in content:
            packed.write(block)


@pytest.mark.parametrize("name", CASES)
def test_memory_is_flat(tmp_path: Path, name: str) -> None:
    content, texts, bad = CASES[name]
    pack(tmp_path / name, content())
    assert (tmp_path / name).stat().st_size < MB
    found, skipped, grown = run(tmp_path / name, "records")
    assert abs(found - texts) <= 1 and skipped == bad
    assert grown < ALLOWED


def test_control_the_whole_file_does_not_fit(tmp_path: Path) -> None:
    pack(tmp_path / "a.txt.zst", blocks(b"", b"some words in a line\n"))
    assert run(tmp_path / "a.txt.zst", "whole")[2] > ALLOWED


def test_a_row_group_is_read_by_the_page(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["some words " * 1000, "others " * 1500] * (SIZE // 2 * MB // 21_500)
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=len(texts), use_dictionary=False)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 1
    found, _, grown = run(tmp_path / "a.parquet", "records")
    assert found == len(texts) and grown < ALLOWED
