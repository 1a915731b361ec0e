"""From what the user writes to single sources: folders, patterns, standard input; and columns."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moai_llm.data.sources import Reading, Record, Skipped, expand, read_records, read_source, read_texts
from moai_llm.data.sources.columns import parse_mapping
from moai_llm.runtime import MoaiError

GOOD = '{"text": "good"}\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.txt", "a/z.md", "a/.hidden.txt", ".git/c.txt", "picture.png", "a/more.png", "a/deep/x.jsonl", "empty.txt",
        "notes", "x.tar.gz.png",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text({"x.jsonl": GOOD, "empty.txt": ""}.get(Path(name).name, name))
    return tmp_path


def names(sources: list[object], root: Path, skipped: Skipped | None = None) -> list[str]:
    return [os.path.relpath(source.name, root) for source in expand(sources, skipped=skipped)]  # type: ignore[arg-type]


def test_folders_are_sorted_and_the_rest_is_counted(tree: Path) -> None:
    skipped = Skipped()
    assert names([tree], tree, skipped) == ["a/deep/x.jsonl", "a/z.md", "b.txt"]
    counted = {(reason, count) for source, reason, count in skipped.left_out() if source == str(tree)}
    assert counted == {(".png", 3), ("an empty file", 1), ("files without a suffix", 1)}


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.md", ["a/z.md"]),
        ("**", ["a/deep/x.jsonl", "a/z.md", "b.txt"]),
        ("[ab]*", ["a/deep/x.jsonl", "a/z.md", "b.txt"]),  # a folder that matches is searched, as a shell would have it
        ("a/deep/?.jsonl", ["a/deep/x.jsonl"]),
    ],
)
def test_patterns(tree: Path, pattern: str, found: list[str]) -> None:
    assert sorted(names([f"{tree}/{pattern}"], tree)) == found


def test_a_file_whose_name_is_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_text(GOOD)
    assert names([tmp_path / "a[1].jsonl"], tmp_path) == ["a[1].jsonl"]


def test_other_ways_to_write_a_path(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "with space.txt").write_text("x")
    assert names([f"file://{tree}/with%20space.txt"], tree) == ["with space.txt"]
    monkeypatch.setenv("HOME", str(tree))
    assert names(["~/b.txt"], tree) == ["b.txt"]


def test_sizes_are_known(tree: Path) -> None:
    (tree / "c.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    sources = expand([tree])
    assert [source.size for source in sources] == [Path(source.name).stat().st_size for source in sources]


def test_progress_counts_stored_bytes(tree: Path) -> None:
    (tree / "c.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 999))
    done: list[int] = []
    sources = expand([tree])
    assert len(list(read_texts(sources, reading=Reading(progress=done.append)))) == 1002
    assert sum(done) == sum(source.size or 0 for source in sources)


def test_each_source_can_be_read_alone(tree: Path) -> None:
    sources, skipped = expand([tree, tree / "b.txt"]), Skipped()
    assert [len(list(read_source(source, Reading(), skipped))) for source in sources] == [1, 1, 1, 1]
    assert list(read_texts(sources[:1])) == [("good", f"{tree}/a/deep/x.jsonl:1")]
    assert {source.origin for source in sources} == {str(tree), str(tree / "b.txt")}


def test_links(tmp_path: Path) -> None:
    """Followed, but no folder is read twice, whichever way round it is linked."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(GOOD)
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    (tmp_path / "also").symlink_to(tmp_path / "in")
    (tmp_path / "one.jsonl").symlink_to(tmp_path / "in" / "a.jsonl")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe.txt")
    skipped = Skipped()
    assert names([tmp_path], tmp_path, skipped) == ["also/a.jsonl", "one.jsonl"]
    reasons = {reason: count for _, reason, count in skipped.left_out()}
    assert reasons["a link to a folder that is read already"] == 2 and reasons["a device, pipe or socket"] == 1


def test_a_broken_link_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(GOOD)
    (tmp_path / "b.jsonl").symlink_to("nowhere")
    with pytest.raises(MoaiError, match="b.jsonl: cannot be read: No such file or directory .a link to nowhere"):
        expand([tmp_path])
    skipped = Skipped(allow_bad=True)
    assert names([tmp_path], tmp_path, skipped) == ["a.jsonl"] and skipped.bad_count == 1


def test_what_gives_nothing_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.csv").write_text("id,text\n")
    skipped = Skipped()
    assert not list(read_texts([tmp_path], skipped=skipped))
    assert [reason for _, reason, _ in skipped.left_out()] == ["nothing in it"] * 2


@pytest.mark.parametrize(
    "name", ["empty.jsonl", "empty.txt", "empty.json", "empty.csv", "empty.parquet", "empty.txt.gz"]
)
def test_an_empty_file_is_counted(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    skipped = Skipped()
    assert not list(read_texts([tmp_path / name], skipped=skipped))
    assert skipped.left_out() == [(str(tmp_path / name), "an empty file", 1)]


# ---------------------------------------------------------------- standard input


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"]),
        (b'\xef\xbb\xbf{"text": "a"}', ["a"]),
        (b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        (b'{\n "text": "a"\n}', ["a"]),
        (b"plain\ntext\n", ["plain\ntext\n"]),
        (b"{x} is a set\n", ["{x} is a set\n"]),
        (b"1\n2\n", ["1\n2\n"]),
        (gzip.compress(b'{"text": "a"}\n'), ["a"]),
        ("안녕".encode("utf-16"), ["안녕"]),
        (b"", [""]),
    ],
    ids=["lines", "mark", "list", "object", "text", "braces", "numbers", "gzip", "utf-16", "nothing"],
)
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes, texts: list[str]) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]
    (source,) = expand(["-"])
    assert [text for text, _ in read_texts([source])] == texts
    with pytest.raises(MoaiError, match="standard input was read already: write it to a file"):
        list(read_texts(["-"]))


@pytest.mark.parametrize("stdin", [None, SimpleNamespace(buffer=None)])
def test_no_standard_input(monkeypatch: pytest.MonkeyPatch, stdin: object) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(MoaiError, match="no standard input to read: it is closed"):
        list(read_texts(["-"]))


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "mapping", "text"),
    [
        ({"title": "t", "body": "b"}, {}, "b"),
        ({"Title": "t", "TEXT": "b"}, {}, "b"),
        ({"content": "c", "text": "t"}, {}, "t"),
        ({"본문": "b"}, {}, "b"),
        ({"title": "t", "body": "b"}, {"text": "title"}, "t"),
        ({"article": {"ko": {"body": "b"}}}, {"text": "article.ko.body"}, "b"),
        ({"a.b": "dotted", "a": {"b": "nested"}}, {"text": "a.b"}, "dotted"),
    ],
)
def test_the_text_column(tmp_path: Path, columns: dict[str, object], mapping: dict[str, str], text: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(columns) + "\n")
    assert [text for text, _ in read_texts([file], reading=Reading(mapping=mapping))] == [text]
    if mapping:
        assert [text for text, _ in read_texts([file], mapping["text"])] == [text]


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "bodies": "b"}\n')
    with pytest.raises(
        MoaiError, match=r"a.jsonl:1: no column 'body' \(did you mean 'bodies'\?\); it has text, bodies"
    ):
        list(read_texts([file], "body"))


def test_several_columns_are_renamed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"frage": "q", "antwort": {"text": "a"}, "id": 1}\n{"frage": "q"}\n')
    mapping = {"question": "frage", "answer": "antwort.text"}
    skipped = Skipped(allow_bad=True)
    (record,) = read_records([file], Reading(mapping=mapping), skipped=skipped)
    assert isinstance(record, Record)
    assert record.columns == {"id": 1, "question": "q", "answer": "a", "antwort": {"text": "a"}}
    assert skipped.broken()[0].example == f"{file}:2: no column 'antwort.text'; it has frage"


def test_of_tables_only_the_text_is_read(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1], "vector": [[0.5] * 9], "Body": ["b"], "meta": [{"lang": "ko"}]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    seen: list[list[str]] = []

    class Watched(Reading):
        def select(self, names: object) -> list[str]:
            seen.append(super().select(names))  # type: ignore[arg-type]
            return seen[-1]

    for mapping in ({}, {"text": "meta.lang"}):
        assert len(list(read_texts([tmp_path], reading=Watched(mapping=mapping)))) == 2
    assert seen == [["Body"]] * 2 + [["meta"]] * 2
    assert {tuple(record.columns) for record in read_records([tmp_path])} == {("id", "vector", "Body", "meta")}
    with pytest.raises(MoaiError, match="no column 'nope'; it has id, vector, Body, meta"):
        list(read_texts([tmp_path], "nope"))


def test_mapping() -> None:
    assert parse_mapping(["text=a=b", " Q = frage "], ("text", "Q")) == {"text": "a=b", "Q": "frage"}
    for given, message in (
        (["text"], "--map text: write OURS=THEIRS, as in --map text=body"),
        (["=a"], "write OURS=THEIRS"),
        (["txt=a"], r"no column 'txt' is known here \(did you mean 'text'\?\); there is only text"),
        (["text=a", "text=b"], "--map names 'text' twice: a and b"),
    ):
        with pytest.raises(MoaiError, match=message):
            parse_mapping(given, ("text",))
