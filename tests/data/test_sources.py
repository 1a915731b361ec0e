"""Reading files of every kind, and the complaint each broken one gets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.data.sources import read_records, read_texts
from moai_llm.runtime import MoaiError
from tests.conftest import shared_data

TEXTS = ["first 첫째", 'second, "quoted"\nline', "셋째"]


def write(folder: Path, name: str) -> Path:
    file = folder / name
    if name.endswith(".jsonl"):
        file.write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in TEXTS) + "\n\n")
    elif name.endswith(".json"):
        file.write_text(json.dumps([{"content": t} for t in TEXTS], ensure_ascii=False))
    elif name.endswith((".csv", ".tsv")):
        import csv

        with file.open("w", newline="", encoding="utf-8-sig") as out:
            writer = csv.writer(out, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerows([["id", "text"], *([i, t] for i, t in enumerate(TEXTS))])
    elif name.endswith(".parquet"):
        parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(arrow.table({"text": TEXTS}), file)
    else:
        file.write_text(TEXTS[0], encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_records(tmp_path: Path, suffix: str) -> None:
    file = write(tmp_path, f"a{suffix}")
    found = list(read_texts([file]))
    assert [text for text, _ in found] == TEXTS
    assert all(place.startswith(str(file)) for _, place in found) and len({place for _, place in found}) == 3


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    assert [text for text, _ in read_texts([write(tmp_path, f"a{suffix}")])] == TEXTS[:1]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}\n')
    (tmp_path / "c.json").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert [text for text, _ in read_texts([tmp_path])] == ["hello"] * 3


def test_folders_are_sorted_and_hidden_files_left_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/.hidden.txt", ".git/c.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [file.relative_to(tmp_path).as_posix() for file in list_files([tmp_path])] == ["a/z.txt", "b.txt"]


def test_lone_surrogates_in_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\ud800y"}\n')
    assert [text for text, _ in read_texts([tmp_path])] == ["x\ud800y"]


def test_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"title": "t", "body": "b"}\n')
    assert [text for text, _ in read_texts([file])] == ["b"]
    assert [text for text, _ in read_texts([file], column="title")] == ["t"]


BROKEN = {
    "missing.txt": (None, "no such file"),
    "picture.png": (b"x", r"cannot read .png; known are \.txt"),
    "latin.txt": ("café".encode("latin-1"), r"not UTF-8 \(byte 3: 0xe9\); convert it"),
    "latin.csv": ("text\ncaf\xe9\n".encode("latin-1"), "not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken.jsonl:2 is not JSON"),
    "list.jsonl": (b"[1, 2]\n", r"list.jsonl:1 is list, expected an object"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', r"bytes.jsonl:1 is not JSON"),
    "broken.json": (b'[{"text": "a"},', "broken.json is not JSON"),
    "scalars.json": (b"[1]", r"scalars.json: item 1 is int"),
    "ragged.csv": (b"a,text\n1,2\n1,2,3\n", r"ragged.csv:3: this row has not 2 columns"),
    "short.csv": (b"a,text\n1\n", r"short.csv:2: this row has not 2 columns"),
    "quotes.csv": (b'text\n"a"b\n', r"quotes.csv:2"),
    "no_column.jsonl": (
        b'{"title": "t"}\n',
        r"no_column.jsonl:1: no text column .text, content, document, ....; it has title. Name the column",
    ),
    "number.jsonl": (b'{"text": 3}\n', r"number.jsonl:1: text is int, not text"),
    "not.parquet": (b"PAR1 nonsense", "not readable Parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(MoaiError, match=message):
        list(read_texts([tmp_path / name]))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match="no file there ends in"):
        list(read_records([tmp_path]))


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MoaiError, match="no column 'body'; it has text, n"):
        list(read_texts([write(tmp_path, "a.jsonl")], column="body"))


@pytest.mark.parametrize(
    ("name", "count"), [("ko/rust_book.jsonl", 104), ("ja/hf_course.jsonl", 35), ("en/tinyshakespeare.txt", 1)]
)
def test_real_files(name: str, count: int) -> None:
    assert len(list(read_texts([shared_data(name)]))) == count


def test_a_text_column_in_capitals(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("Title,Text\nt,the text\n")
    assert [text for text, _ in read_texts([file])] == ["the text"]
