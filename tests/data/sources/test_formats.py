"""Files of every kind, plain and compressed, in folders and archives: the same records from each."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from moai_llm.data.sources import Reading, read_records, read_texts
from moai_llm.data.sources.formats import PIECE, read_text
from moai_llm.data.sources.json_values import Window
from moai_llm.data.sources.records import Skipped, read_size, show_size
from moai_llm.data.sources.streams import Chunks, as_utf8, buffered
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

TEXTS = ["first 첫째", 'second, "quoted"\nline', "셋째"]


def table() -> Any:
    return pytest.importorskip("pyarrow").table({"id": [0, 1, 2], "text": TEXTS})


def parquet() -> bytes:
    out = io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(table(), out, row_group_size=2)
    return out.getvalue()


def arrow(kind: str) -> bytes:
    out, ipc = io.BytesIO(), pytest.importorskip("pyarrow.ipc")
    with getattr(ipc, kind)(out, table().schema) as writer:
        writer.write_table(table())
    return out.getvalue()


def rows(delimiter: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
    return out.getvalue().encode("utf-8-sig")


OBJECTS = [{"text": text, "n": i} for i, text in enumerate(TEXTS)]
JSON_LINES = "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in OBJECTS).encode()
FILES: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: JSON_LINES.replace(b"\n", b"\r\n\n"),
    "a.ndjson": lambda: JSON_LINES.rstrip(),
    "list.json": lambda: json.dumps(OBJECTS, ensure_ascii=False, indent=1).encode(),
    "one_line.json": lambda: json.dumps(OBJECTS).encode(),
    "lines.json": lambda: b"\n" + JSON_LINES,
    "objects.json": lambda: "".join(json.dumps(o, indent=2) for o in OBJECTS).encode(),
    "a.csv": lambda: rows(","),
    "semicolon.csv": lambda: rows(";"),
    "a.tsv": lambda: rows("\t"),
    "a.parquet": parquet,
    "stream.arrow": lambda: arrow("new_stream"),
    "file.arrow": lambda: arrow("new_file"),
    "a.feather": lambda: arrow("new_file"),
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
}  # fmt: skip


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", FILES)
def test_the_same_records(tmp_path: Path, name: str, compression: str) -> None:
    file = tmp_path / (name.upper() if name == "a.csv" else name)  # a suffix in capitals is one
    file = file.with_name(file.name + compression)
    file.write_bytes(COMPRESS[compression](FILES[name]()))
    found = list(read_texts([file]))
    assert [text.replace("\r\n", "\n") for text, _ in found] == TEXTS
    assert all(place.startswith(str(file)) for _, place in found) and len({place for _, place in found}) == 3


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rs", "a.txt.gz", "A.TXT"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    data = "one\ntwo\n둘\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(read_texts([tmp_path / name])) == [(data.decode(), str(tmp_path / name))]


def test_places(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines"\n\n2,b\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}, {"text": "b"}]')
    (tmp_path / "c.jsonl").write_text('\n{"text": "a"}\n')
    places = [Path(place).name for _, place in read_texts([tmp_path])]
    assert places == ["a.csv:2", "a.csv:5", "b.json: item 1", "b.json: item 2", "c.jsonl:2"]
    assert {record.source for record in read_records([tmp_path / "a.csv"])} == {str(tmp_path / "a.csv")}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.zst", "tar.xz"])
def test_archives(tmp_path: Path, kind: str) -> None:
    """Members of any kind, those that are read from their end among them."""
    members = {
        f"in/{name}{c}": (name, c) for name in ("a.jsonl", "a.parquet", "file.arrow") for c in ("", ".gz", ".zst")
    }
    members |= {"./list.json": ("list.json", "")}
    path, out = tmp_path / f"all.{kind}", io.BytesIO()
    contents = {member: COMPRESS[c](FILES[name]()) for member, (name, c) in members.items()}
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, data in contents.items():
                archive.writestr(member, data)
    else:
        with tarfile.open(fileobj=out, mode="w") as packed:
            for member, data in contents.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                packed.addfile(info, io.BytesIO(data))
        last = kind.rpartition(".")[2].replace("tgz", "gz")
        path.write_bytes(COMPRESS["" if last == "tar" else f".{last}"](out.getvalue()))
    found = list(read_texts([path]))
    assert [text for text, _ in found] == TEXTS * 10
    assert found[0][1] == f"{path}/in/a.jsonl:1"


def test_byte_order_marks(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        (tmp_path / f"{encoding}.txt").write_text("hello 안녕", encoding=encoding)
        (tmp_path / f"{encoding}.jsonl").write_text('{"text": "hello 안녕"}\n', encoding=encoding)
        (tmp_path / f"{encoding}.json").write_text('{"text": "hello 안녕"}', encoding=encoding)
        (tmp_path / f"{encoding}.csv").write_text("text\nhello 안녕\n", encoding=encoding)
    assert [text for text, _ in read_texts([tmp_path])] == ["hello 안녕"] * 12


def test_other_encodings(tmp_path: Path) -> None:
    for suffix, text in (
        (".txt", "안녕"),
        (".csv", "text\n안녕\n"),
        (".jsonl", '{"text": "안녕"}\n'),
        (".json", '[{"text": "안녕"}]'),
    ):
        (tmp_path / f"a{suffix}").write_text(text, encoding="cp949")
    assert [text for text, _ in read_texts([tmp_path], reading=Reading(encoding="cp949"))] == ["안녕"] * 4
    (tmp_path / "b.txt").write_text("안녕", encoding="utf-16-le")
    assert [text for text, _ in read_texts([tmp_path / "b.txt"], reading=Reading(encoding="utf-16-le"))] == ["안녕"]


def test_what_dumps_contain_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n{"text": "nan", "score": NaN}\n{"text": "nul\\u0000"}\n')
    assert [text for text, _ in read_texts([tmp_path])] == ["x\ud800y", "nan", "nul\0"]


def test_columns_of_csv_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,,\nhello,1,2\n")
    assert [text for text, _ in read_texts([tmp_path])] == ["hello"]


@pytest.mark.parametrize("size", [PIECE - 1, PIECE, 3 * PIECE + 5])
@pytest.mark.parametrize("end", ["\n\n", "\n"])
def test_long_texts_are_cut_between_paragraphs(size: int, end: str) -> None:
    """Nothing is lost, and each piece says on which line it begins."""
    line = "0123456789 가나다" * 20
    text = "".join(f"{i} {line}{end}" for i in range(size // 500 + 1))[:size]
    data = text.encode()[:size].decode("utf-8", "ignore").encode()
    records = list(read_text(io.BytesIO(data), "a.txt", Reading(), Skipped()))  # type: ignore[arg-type]
    pieces = [record.columns["text"] for record in records]
    assert "".join(pieces).encode() == data
    assert len(pieces) == (1 if len(data) < PIECE else -(-len(data) // (PIECE - 1000)))
    assert all(piece.endswith(end) for piece in pieces[:-1])
    place = 1
    for record, piece in zip(records, pieces):
        assert record.place == ("a.txt" if place == 1 else f"a.txt:{place}")
        place += piece.count("\n")


def test_pieces_are_no_longer_than_a_record() -> None:
    data = b"0123456789 words\n" * 100
    records = list(read_text(io.BytesIO(data), "a.txt", Reading(max_record=100), Skipped()))  # type: ignore[arg-type]
    assert b"".join(record.columns["text"].encode() for record in records) == data
    assert {len(record.columns["text"]) for record in records} == {85}


def test_a_line_longer_than_a_piece_stays_whole() -> None:
    data = b"a" * (PIECE + 10) + b"\n" + b"b" * 10
    records = list(read_text(io.BytesIO(data), "a.txt", Reading(), Skipped()))  # type: ignore[arg-type]
    assert [len(record.columns["text"]) for record in records] == [PIECE + 11, 10]


WINDOW = 4096


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai_llm.data.sources.json_values.BLOCK", WINDOW)


def json_list(tmp_path: Path, before: int) -> tuple[Path, list[dict[str, Any]]]:
    """A list whose items cross the end of the first window at another byte each time."""
    item = {"text": 'x\\"é가\ud83d', "list": [1, -2.5e3, True, None, {"a": "]}"}], "n": 12345}
    items = [{"pad": "p" * (WINDOW - before)}, *[item] * 3, {"pad": "q" * (5 * WINDOW)}, item]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(items))
    return path, items


@pytest.mark.usefixtures("small_windows")
def test_items_across_windows(tmp_path: Path) -> None:
    for before in range(250):
        path, items = json_list(tmp_path, before)
        assert [record.columns for record in read_records([path])] == items == json.loads(path.read_text())


@pytest.mark.usefixtures("small_windows")
def test_a_list_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest, more = [0], Window.more
    monkeypatch.setattr(Window, "more", lambda self: (more(self), longest.append(len(self.text)))[0])
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * 1000}] * 500))
    assert len(list(read_records([tmp_path / "a.json"]))) == 500 and max(longest) < 3 * WINDOW


@pytest.mark.usefixtures("small_windows")
def test_control_without_looking_near_the_end_items_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai_llm.data.sources.json_values.NEAR", -1)
    with pytest.raises(MoaiError, match="not JSON"):
        for before in range(250):
            list(read_records([json_list(tmp_path, before)[0]]))


def test_streams_in_small_pieces() -> None:
    """Whatever the sizes in which bytes arrive, the text is the same."""
    text = "가나다 abc\n" * 50
    for encoding in ("utf-8", "utf-16-le", "cp949"):
        data = text.encode(encoding)
        for step in (1, 3, 7):
            chunks = Chunks(data[i : i + step] for i in range(0, len(data), step))
            stream = as_utf8(buffered(chunks), "a", Reading(encoding=encoding))  # type: ignore[arg-type]
            assert stream.read().decode() == text


def test_sizes() -> None:
    assert [read_size(text) for text in ("500", "64MB", "1.5 GiB", "2k", "1b")] == [500, 1 << 26, 3 << 29, 2048, 1]
    assert [show_size(size) for size in (500, 1 << 26, 3 << 29, 5 << 40)] == ["500 bytes", "64 MB", "1.5 GB", "5 TB"]
    for text in ("", "MB", "-1", "1e999", "nan", "0"):
        with pytest.raises(MoaiError, match="is not a size"):
            read_size(text)


# ---------------------------------------------------------------- real sets, counted by another reader


def count_json(path: Path) -> int:
    content = json.loads(path.read_text(encoding="utf-8"))
    return len(content) if isinstance(content, list) else 1


def count_csv(path: Path) -> int:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


COUNT: dict[str, Callable[[Path], int]] = {
    ".jsonl": lambda path: sum(1 for line in path.read_bytes().split(b"\n") if line.strip()),
    ".json": count_json, ".csv": count_csv, ".txt": lambda _: 1,
}  # fmt: skip
REAL = [
    "en/alpaca_seed_tasks.jsonl", "en/hf_course.jsonl", "en/rust_book.jsonl", "en/tinyshakespeare.txt",
    "en/wikitext2_test.txt", "en/wikitext2_valid.txt", "eval/HumanEval.jsonl", "eval/TruthfulQA.csv",
    "eval/arc_challenge.jsonl", "eval/gsm8k_test.jsonl", "eval/hellaswag_val_2000.txt", "eval/lambada_openai.jsonl",
    "eval/mmlu.jsonl", "finance/tatqa_dev.json", "ja/hf_course.jsonl", "ja/jsquad_valid.json", "ja/rust_book.jsonl",
    "ko/ChatbotData.csv", "ko/hf_course.jsonl", "ko/react_docs.jsonl", "ko/rust_book.jsonl",
    "sft/alpaca_en_demo.json", "sft/alpaca_zh_demo.json", "sft/c4_demo.jsonl", "sft/dpo_en_demo.json",
    "sft/glaive_toolcall_en_demo.json", "sft/identity.json", "zh/cmrc2018_trial.json", "zh/hf_course.jsonl",
    "zh/rust_book.jsonl",
]  # fmt: skip
NO_TEXT = {  # what is no text of one column says so, with what to do
    "ja/jsquad_valid.json": "If the documents lie within 'data', write them as JSON lines first",
    "zh/cmrc2018_trial.json": "no text column .*; it has version, data. .* lie within 'data'",
    "ko/ChatbotData.csv": "no text column .*; it has Q, A, label. --map text=NAME names it",
}


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name: str) -> None:
    path = shared_data(name)
    assert len(list(read_records([path]))) == COUNT[path.suffix](path)
    if name in NO_TEXT:
        with pytest.raises(MoaiError, match=NO_TEXT[name]):
            next(read_texts([path]))
    elif name.split("/")[0] in ("en", "ja", "ko", "zh") and "alpaca" not in name:
        assert all(text.strip() for text, _ in read_texts([path]))


def test_no_real_set_is_forgotten() -> None:
    root = shared_data("SOURCES.md").parent
    here = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in COUNT}
    assert here == set(REAL)
