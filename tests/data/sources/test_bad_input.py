"""Broken, hostile and mistaken input: each gets one clear sentence that names the place, or is counted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard

from moai_llm.data.sources import Broken, Reading, Skipped, read_texts
from moai_llm.runtime import MoaiError

LIMIT = 2000  # bytes of a record, in all of these
GOOD = b'{"text": "good"}\n'
CSV = b"id,text\n1,good\n"


class Case(NamedTuple):
    file: str
    content: bytes | Callable[[Path], object]  # what is in it, or what makes it
    message: str  # a pattern; the file's name and a colon stand before it
    good: int | None = 0  # texts that are left where what is bad is skipped; None: it is an error all the same
    source: str = ""  # what the user writes, if not the file


def parquet(path: Path, columns: dict[str, list[object]], size: int | None = None) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    if size:
        path.write_bytes(path.read_bytes()[:size])


def arrow(path: Path, stream: bool, keep: float) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["good" * 100] * 100})
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def a_tar(path: Path, *members: tuple[str, bytes | None]) -> None:
    """None makes a link."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(content or b"")
            archive.addfile(info, io.BytesIO(content or b""))


def a_zip(path: Path, *members: tuple[str, bytes], damage: bytes = b"", encrypted: bool = False) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    data = bytearray(path.read_bytes())
    if encrypted:  # the flag in the local header and in the directory
        data[6] |= 1
        data[data.index(b"PK\x01\x02") + 8] |= 1
    if damage:
        data[40:44] = damage
    path.write_bytes(data)


def saved(folder: Path, state: object) -> None:
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))


def hold(path: Path, *commands: str) -> None:
    """A git repository with one file, and commits of what the commands leave."""
    path.mkdir()
    (path / "a.py").write_text("x = 1\n")
    for command in ("git init -q .", *commands):
        subprocess.run(command, shell=True, cwd=path, check=True, capture_output=True)


COMMIT = "git add -A && git -c user.name=n -c user.email=e commit -qm m"
BROKEN = [
    # JSON lines
    Case("line.jsonl", GOOD + b'{"text": \n' + GOOD, ":2: not JSON: ", 2),
    Case("cut.jsonl", GOOD + b'{"text": "a', ":2: not JSON: ", 1),
    Case("list.jsonl", b"[1, 2]\n" + GOOD, ":1: a list instead of an object", 1),
    Case("string.jsonl", b'"only text"\n' + GOOD, ":1: a string instead of an object", 1),
    Case("pretty.jsonl", b'{\n "text": "a"\n}\n', ":1: not JSON: .* should be named .json"),
    Case(
        "huge.jsonl",
        GOOD + b'{"text": "' + b"a" * 3 * LIMIT + b'"}\n' + GOOD,
        ":2: a line of more than 1.95 KB; --max-record",
        2,
    ),
    Case("endless.jsonl", b"a" * 5 * LIMIT, ":1: a line of more than 1.95 KB"),
    Case("nul.jsonl", GOOD + b"\0\0\0\n" + GOOD, ":2: not JSON", 2),
    Case("deep.jsonl", GOOD + b"[" * 1900 + b"\n", ":2: (not JSON|JSON nested too deeply)", 1),
    Case("deep.json", b'[{"a": ' * 100_000, ": .*JSON nested too deeply"),
    Case("digits.jsonl", b'{"n": ' + b"1" * 1900 + b', "text": 3}\n', ":1: the text is int, not text"),
    Case("bytes.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, r":2: not UTF-8 \(byte 10: 0xff\)", 2),
    Case(
        "korean.jsonl",
        GOOD + '{"text": "안녕하세요 여러분"}\n'.encode("cp949"),
        ":2: not UTF-8.*pass --encoding cp949",
        1,
    ),
    Case(
        "missing.jsonl",
        b'{"title": "t"}\n' + GOOD,
        r":1: no text column \(text, content, document, ...\); it has title. --map",
        1,
    ),
    Case("mixed.jsonl", GOOD + b'{"content": "other"}\n{"a": 1}\n', ":3: no text column .*; it has a", 2),
    Case("null.jsonl", b'{"text": null}\n' + GOOD, ":1: the text is null", 1),
    Case("number.jsonl", b'{"text": 3}\n' + GOOD, ":1: the text is int, not text", 1),
    Case("lists.jsonl", b'{"text": ["a", "b"]}\n' + GOOD, ":1: the text is list, not text", 1),
    Case("nan.jsonl", b'{"text": NaN}\n{"score": NaN, "text": "good"}\n', ":1: the text is float, not text", 1),
    # JSON
    Case("cut.json", b'[{"text": "good"}, {"text"', ": item 2: not JSON", 1),
    Case("comma.json", b'[{"text": "good"},]', ": item 2: not JSON", 1),
    Case(
        "no_comma.json",
        b'[{"text": "good"} {"text": "b"}]',
        ": not JSON: '{' after item 1, where a comma or ] belongs",
        1,
    ),
    Case("more.json", b'[{"text": "good"}] []', ": not JSON: something follows the list of 1 items", 1),
    Case("scalars.json", b'[1, {"text": "good"}]', ": item 1: a number instead of an object", 1),
    Case("string.json", b'"only text"', ": a string instead of a list of objects"),
    Case("null.json", b"null", ": null instead of a list of objects"),
    Case("white.json", b" \n\n ", ": not JSON: the file has nothing but white space"),
    Case(
        "huge.json", b'[{"text": "' + b"a" * (1 << 22) + b'"}]', ": item 1: an object of more than 1.95 KB.*only a list"
    ),
    Case("squad.json", b'{"version": 1, "data": [{"paragraphs": []}]}', ":1: no text column .* lie within 'data'"),
    Case(
        "sjis.json",
        '[{"text": "これは日本語のテキストです"}]'.encode("shift_jis"),
        ": not UTF-8 .*--encoding shift_jis",
    ),
    # text
    Case(
        "sjis.txt",
        "これは日本語のテキストです。".encode("shift_jis"),
        r": not UTF-8 \(byte 0: 0x82\); .*--encoding shift_jis",
    ),
    Case("latin.txt", "café au lait".encode("latin-1"), r": not UTF-8 \(byte 3: 0xe9\)$"),
    Case("nul.txt", b"a\0b", ": NUL bytes: not text, or UTF-16 without"),
    Case("utf16.txt", "no mark".encode("utf-16-le"), ": NUL bytes.*--encoding utf-16-le"),
    Case("half.txt", "abc".encode("utf-16")[:-1], ": not utf-16"),
    Case("gz.txt", gzip.compress(b"hello"), ": holds gzip data, not text: rename it so that it ends in .gz"),
    Case("parquet.jsonl", b"PAR1\x15\x00", ": holds Parquet data, not text: rename"),
    Case("pdf.txt", b"%PDF-1.7 ...", ": holds PDF data, not text: extract its text first"),
    # CSV
    Case(
        "ragged.csv", CSV + b"1,2,3\n2,good\n", ":3: another number of columns than the header: 3, the header has 2", 2
    ),
    Case("short.csv", CSV + b"1\n2,good\n", ":3: another number of columns.*: 1, the header has 2", 2),
    Case(
        "open.csv",
        CSV + b'2,"never closed\n3,lost\n',
        ":3: a quote that is never closed: it swallows the lines up to 4",
        1,
    ),
    Case("open_long.csv", CSV + b'2,"' + b"never closed\n" * LIMIT, ":3: a row of more than 1.95 KB", 1),
    Case("quotes.csv", CSV + b'2,"a"b\n3,good\n', ":3: not CSV: ", 2),
    Case("twice.csv", b"text,text\n1,2\n", ":1: a column twice: the header has 'text' more than once"),
    Case("headless.csv", b"1,hello\n2,world\n", ":2: no text column .*; it has 1, hello"),
    Case("nul.csv", CSV + b"2,a\0b\n3,good\n", ":3: NUL bytes", 2),
    Case("latin.csv", CSV + "2,café\n3,good\n".encode("latin-1"), r":3: not UTF-8 \(byte 5: 0xe9\)", 2),
    # compressed
    Case("cut.jsonl.gz", gzip.compress(GOOD * 9)[:-4], ": cannot be read: Compressed file ended .*jsonl.gz:9", 9),
    Case(
        "cut.txt.zst",
        zstandard.compress(os.urandom(9000).hex().encode())[:-40],
        ": cannot be read: the compressed data is cut off",
    ),
    Case("cut.txt.xz", lzma.compress(b"hello" * 99)[:-9], ": cannot be read: Compressed file ended"),
    Case("cut.txt.bz2", bz2.compress(b"hello" * 99)[:-9], ": cannot be read: Compressed file ended"),
    Case("not.jsonl.gz", GOOD, r": cannot be read: Not a gzipped file"),
    Case("not.jsonl.zst", GOOD, r": cannot be read: not Zstandard data, or damaged"),
    Case("crc.txt.gz", gzip.compress(b"hello")[:-8] + b"\1" * 8, ": cannot be read: CRC check failed"),
    Case("bomb.jsonl.gz", gzip.compress(b"0" * (1 << 24)), ":1: a line of more than 1.95 KB"),
    Case("bomb.txt.zst", zstandard.compress(b"0" * (1 << 25)), ":1: a line of more than 1.95 KB"),
    # archives
    Case(
        "bomb.zip",
        lambda p: a_zip(p, ("b.jsonl", b"0" * (1 << 24)), ("g.jsonl", GOOD)),
        "/b.jsonl:1: a line of more than",
        1,
    ),
    Case(
        "up.zip",
        lambda p: a_zip(p, ("../../up.jsonl", GOOD), ("g.jsonl", GOOD)),
        "/../../up.jsonl: a name that points out of",
        1,
    ),
    Case(
        "root.tar.gz",
        lambda p: a_tar(p, ("/etc/a.txt", b"x"), ("g.jsonl", GOOD)),
        "//etc/a.txt: a name that points out of",
        1,
    ),
    Case("secret.zip", lambda p: a_zip(p, ("a.jsonl", GOOD), encrypted=True), "/a.jsonl: encrypted: unpack it"),
    Case("damaged.zip", lambda p: a_zip(p, ("a.jsonl", GOOD * 99), damage=b"\xff" * 4), "/a.jsonl: damaged: "),
    Case("not.zip", b"no archive", ": cannot be read: File is not a zip file"),
    Case(
        "cut.tar.gz",
        lambda p: (a_tar(p, ("g.jsonl", os.urandom(5000).hex().encode())), p.write_bytes(p.read_bytes()[:900])),
        ": ",
    ),
    Case("not.tar.gz", gzip.compress(b"no archive"), ": cannot be read: "),
    Case("inner.tar.gz", lambda p: a_tar(p, ("g.jsonl", GOOD + b"{\n")), "/g.jsonl:2: not JSON", 1),
    # tables
    Case("not.parquet", b"PAR1 nonsense", ": not readable Parquet: "),
    Case("cut.parquet", lambda p: parquet(p, {"text": ["a"] * 99}, 300), ": not readable Parquet: "),
    Case("no_text.parquet", lambda p: parquet(p, {"id": [1, 2]}), r": row 1: no text column .*; it has id"),
    Case(
        "long.parquet", lambda p: parquet(p, {"text": ["good", "a" * 3000]}), ": row 2: a text of more than 1.95 KB", 1
    ),
    Case("null.parquet", lambda p: parquet(p, {"text": ["good", None]}), r": row 2: the text is null", 1),
    Case("cut_file.arrow", lambda p: arrow(p, False, 0.9), ": not readable Arrow: "),
    Case("cut_stream.arrow", lambda p: arrow(p, True, 0.5), ": row 1: damaged: "),
    Case("text.arrow", b"no table", ": not readable Arrow: "),
    Case(
        "saved",
        lambda p: saved(p, {"_data_files": [{"filename": "../x.arrow"}]}),
        "/state.json: names a file outside its folder",
        None,
    ),
    Case(
        "saved_lost",
        lambda p: saved(p, {"_data_files": [{"filename": "x.arrow"}]}),
        "/x.arrow: missing, though .* names it",
        None,
    ),
    Case("saved_broken", lambda p: saved(p, "{"), "/state.json: not the state of a saved data set", None),
    # the file system
    Case(
        "gone.jsonl",
        lambda p: p.symlink_to(p.parent / "nowhere"),
        r": cannot be read: No such file or directory \(a link to",
    ),
    Case("loop.jsonl", lambda p: p.symlink_to(p), ": cannot be read: Too many levels of symbolic links"),
    Case("picture.png", b"x", ": cannot read .png; known are .txt, ", None),
    Case("notes", b"x", ": cannot read files without a suffix; known are .txt, .* moai ... - < notes", None),
    Case("picture.png.gz", b"x", ": cannot read .png.gz; known are", None),
    Case("folder.jsonl", lambda p: p.mkdir(), ": no file there ends in", None),
    Case(
        "articles.jsonl",
        GOOD,
        r"/artcles.jsonl: no such file or folder \(did you mean 'articles.jsonl'\?\)",
        None,
        "{}/artcles.jsonl",
    ),
    Case("x.jsonl", GOOD, r"/\*.csv: no file matches", None, "{}/*.csv"),
    Case("x.png", GOOD, r"/\*.png: none of the 1 files it matches can be read", None, "{}/*.png"),
    Case("x", b"", "a source is empty", None, " "),
    # elsewhere
    Case("x", b"", "nope://x/a.jsonl: no protocol nope://", None, "nope://x/a.jsonl"),
    Case("x", b"", r"htps://x/a.jsonl: no protocol htps:// \(did you mean 'https'\?\)", None, "htps://x/a.jsonl"),
    Case(
        "x",
        b"",
        "s3://b/a.jsonl: reading s3:// needs another package: pip install 'moai-llm.cloud.'",
        None,
        "s3://b/a.jsonl",
    ),
    Case("x", b"", "memory://none/a.jsonl: nothing there", None, "memory://none/a.jsonl"),
    Case(
        "x", b"", "https://h.invalid/page: cannot read files without a suffix", None, "https://u:p@h.invalid/page?key=1"
    ),
    # git
    Case(
        "plain", lambda p: p.mkdir(), " cannot be read as a git repository: not a git repository", None, "git:{}/plain"
    ),
    Case("r", lambda p: hold(p, COMMIT), ": there is no commit 'nope' in ", None, "git:{}/r@nope"),
    Case("r", lambda p: hold(p, COMMIT), ": there is no commit 'x' in .*shallow", None, "git:{}/r?since=x"),
    Case("r", lambda p: hold(p), ": there is no commit 'HEAD' in .*: it has no commit yet", None, "git:{}/r"),
    Case(
        "r",
        lambda p: hold(p, COMMIT),
        ": no tracked file ends in .go; there are 1 .py. .ext= names others",
        None,
        "git:{}/r?ext=go",
    ),
    Case("r", lambda p: hold(p, COMMIT), r": no option 'exts' \(did you mean 'ext'\?\)", None, "git:{}/r?exts=go"),
    Case(
        "r",
        lambda p: hold(p, COMMIT),
        r": no licence 'mti' \(did you mean 'mit'\?\); known are",
        None,
        "git:{}/r?license=mti",
    ),
    Case("r", lambda p: hold(p, COMMIT), "'big' is not a size", None, "git:{}/r?max=big"),
    Case("x", b"", ": there is no folder /nowhere", None, "git:/nowhere"),
    Case("x", b"", r": clone it first \(git clone https://x/y FOLDER\)", None, "git+https://x/y"),
]
NAMES = [f"{case.file}{'' if not case.source else ' ' + case.source}" for case in BROKEN]


@pytest.mark.parametrize("case", BROKEN, ids=NAMES)
def test_bad_input(tmp_path: Path, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / case.file
    path.write_bytes(case.content) if isinstance(case.content, bytes) else case.content(path)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    source = case.source.format(tmp_path) if case.source else str(path)

    def read(skip_bad: bool, skipped: Skipped) -> list[tuple[str, str]]:
        return list(read_texts([source], reading=Reading(skip_bad=skip_bad, max_record=LIMIT), skipped=skipped))

    with pytest.raises(MoaiError) as strict:
        read(False, Skipped())
    before = "" if case.source else re.escape(str(path))
    assert re.search(before + case.message, str(strict.value)), str(strict.value)

    skipped = Skipped(allow_bad=True)
    if case.good is None:
        with pytest.raises(MoaiError):
            read(True, skipped)
        return
    assert isinstance(strict.value, Broken)
    assert len(read(True, skipped)) == case.good
    assert skipped.bad_count >= 1
    row = skipped.broken()[-1]
    assert row.source.startswith(str(path)) and row.times >= 1
    assert str(strict.value) in [row.example for row in skipped.broken()]


def test_there_are_enough_of_them() -> None:
    assert len(BROKEN) >= 90 and len(set(NAMES)) == len(NAMES)


def test_whole_input_is_not_bad(tmp_path: Path) -> None:
    """The control: what these cases are made of, unbroken."""
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.csv").write_bytes(CSV)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(GOOD))
    a_zip(tmp_path / "a.zip", ("in/a.jsonl", GOOD))
    a_tar(tmp_path / "a.tar.gz", ("in/a.jsonl", GOOD))
    parquet(tmp_path / "a.parquet", {"text": ["good"]})
    arrow(tmp_path / "a.arrow", True, 1.0)
    skipped = Skipped()
    texts = [text for text, _ in read_texts([tmp_path], skipped=skipped)]
    assert texts.count("good") == 7 and len(texts) == 107 and not skipped.bad_count


@pytest.mark.skipif(os.getuid() == 0, reason="nothing is forbidden to root")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)
    file.chmod(0)
    with pytest.raises(MoaiError, match="a.jsonl: cannot be read: Permission denied"):
        list(read_texts([file]))


def test_errors_of_the_system_are_named_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)

    def denied(self: Path, *_: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(MoaiError, match=r"a\.jsonl: cannot be read: Permission denied"):
        list(read_texts([file]))
    skipped = Skipped(allow_bad=True)
    assert not list(read_texts([file], skipped=skipped)) and skipped.bad_count == 1


def test_links_in_archives_are_not_followed(tmp_path: Path) -> None:
    a_tar(tmp_path / "a.tar.gz", ("link.txt", None), ("a.jsonl", GOOD), ("inner.zip", b"x"), ("p.png", b"x"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        link = zipfile.ZipInfo("link.txt")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("__MACOSX/._a.txt", "x")
    skipped = Skipped()
    assert [text for text, _ in read_texts([tmp_path], skipped=skipped)] == ["good"]
    counted = {(Path(source).name, reason): count for source, reason, count in skipped.left_out()}
    assert counted == {
        ("a.tar.gz", "a link"): 1, ("a.tar.gz", "an archive in an archive"): 1, ("a.tar.gz", ".png"): 1,
        ("a.zip", "a link"): 1, ("a.zip", "hidden"): 1, ("a.zip", "nothing in it"): 1,
    }  # fmt: skip


def test_a_tar_header_that_claims_a_gigabyte(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    with gzip.open(tmp_path / "a.tar.gz", "wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1 << 20))
    with pytest.raises(MoaiError, match="a header of 1,073,741,824 bytes"):
        list(read_texts([tmp_path / "a.tar.gz"]))


def test_names_cannot_drive_a_terminal(tmp_path: Path) -> None:
    a_tar(tmp_path / "a.tar.gz", ("\x1b[2Jx.jsonl", b"{"))
    with pytest.raises(MoaiError, match=r"a.tar.gz/\\x1b\[2Jx.jsonl:1: not JSON"):
        list(read_texts([tmp_path / "a.tar.gz"]))


def test_the_account_is_bounded() -> None:
    skipped = Skipped(allow_bad=True)
    for i in range(3000):
        skipped.bad(f"{i}.jsonl", f"{i}.jsonl:1", "not JSON")
        skipped.leave_out(f"folder {i}", ".png")
    assert skipped.bad_count == 3000 == sum(row.times for row in skipped.broken())
    assert len(skipped.broken()) == 1001 and skipped.broken()[0][:3] == ("further files", "not JSON", 2000)
    assert sum(count for *_, count in skipped.left_out()) == 3000 and len(skipped.left_out()) == 1001


def test_an_account_in_parts_is_the_account() -> None:
    """What several `Skipped` count and one absorbs, in their order, is what one alone would have counted."""
    told = [(f"{i % 7}.jsonl", f"{i % 7}.jsonl:{i}", f"reason {i % 3}") for i in range(100)]
    whole, parts = Skipped(allow_bad=True), Skipped(allow_bad=True)
    for start in range(0, 100, 9):
        part = Skipped(allow_bad=True)
        for source, place, reason in told[start : start + 9]:
            for one in (whole, part):
                one.bad(source, place, reason)
                one.leave_out(source, reason)
        parts.absorb(part.account())
        assert part.take().bad and part.bad_count == 0 and part.account() == ([], [])
    assert (parts.broken(), parts.left_out(), parts.bad_count) == (whole.broken(), whole.left_out(), 100)
