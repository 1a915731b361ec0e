"""Files behind URLs: in memory, on a web server of this machine, and what a network that fails looks like."""

from __future__ import annotations

import gzip
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from moai_llm.data.sources import Reading, Skipped, expand, read_texts
from moai_llm.data.sources.remote import public
from moai_llm.runtime import MoaiError

LINES = b'{"text": "good", "id": 1}\n' * 3


def parquet() -> bytes:
    pyarrow, out = pytest.importorskip("pyarrow"), io.BytesIO()
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"text": ["good"] * 3}), out)
    return out.getvalue()


FILES = {
    "a.jsonl.gz": gzip.compress(LINES),
    "deep/b.jsonl": LINES,
    "deep/c.parquet": parquet(),
    "p.png": b"x",
    ".h/x.txt": b"",
}


@pytest.fixture
def memory() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    for name, content in FILES.items():
        files.pipe(f"/sources/{name}", content)
    yield "memory://sources"
    files.rm("/sources", recursive=True)


@pytest.mark.parametrize(
    ("rest", "names"),
    [
        ("", ["a.jsonl.gz", "deep/b.jsonl", "deep/c.parquet"]),
        ("/deep", ["deep/b.jsonl", "deep/c.parquet"]),
        ("/*.jsonl.gz", ["a.jsonl.gz"]),
        ("/**/*.parquet", ["deep/c.parquet"]),
        ("/a.jsonl.gz", ["a.jsonl.gz"]),
    ],
)
def test_files_folders_and_patterns(memory: str, rest: str, names: list[str]) -> None:
    skipped = Skipped()
    sources = expand([memory + rest], skipped=skipped)
    assert [source.name for source in sources] == [f"memory:///sources/{name}" for name in names]
    assert [source.size for source in sources] == [len(FILES[name]) for name in names]
    assert [text for text, _ in read_texts(sources)] == ["good"] * 3 * len(names)
    assert skipped.left_out() == ([("memory://sources", ".png", 1)] if not rest else [])


@pytest.mark.parametrize(
    ("rest", "message"),
    [("/none.jsonl", "nothing there"), ("/*.csv", "nothing there"), ("/p.png", "no file there is of a kind")],
)
def test_what_is_not_there(memory: str, rest: str, message: str) -> None:
    with pytest.raises(MoaiError, match=f"^memory://sources{rest.replace('*', '.')}: {message}"):
        expand([memory + rest])


def test_progress(memory: str) -> None:
    done: list[int] = []
    (source,) = expand([memory + "/a.jsonl.gz"])
    list(read_texts([source], reading=Reading(progress=done.append)))
    assert sum(done) == source.size


class Server(BaseHTTPRequestHandler):
    """Serves FILES with ranges, as a web server does; /broken promises more than it gives."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        broken = path.startswith("broken")
        content = FILES.get("deep/b.jsonl" if broken else path)
        if content is None:
            self.send_error(404)
            return
        first, last = 0, len(content) - 1
        if (wanted := self.headers.get("Range")) and not broken:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1 + broken * 1000))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "deep/b.jsonl", "deep/c.parquet"])
def test_a_web_server(web: str, name: str) -> None:
    (source,) = expand([f"{web}/{name}?token=secret"])
    assert (source.name, source.size, source.origin) == (f"{web}/{name}", len(FILES[name]), f"{web}/{name}")
    found = list(read_texts([source]))
    assert [text for text, _ in found] == ["good"] * 3 and found[0][1].startswith(f"{web}/{name}:")


@pytest.mark.parametrize("skip_bad", [True, False])
def test_a_network_that_fails_is_never_skipped(web: str, skip_bad: bool) -> None:
    for path, message in (("none.jsonl", "nothing there"), ("broken.jsonl", "reading it failed: ")):
        with pytest.raises(MoaiError, match=f"{web}/{path}: {message}") as raised:
            list(read_texts([f"{web}/{path}?token=secret"], reading=Reading(skip_bad=skip_bad)))
        assert "secret" not in str(raised.value)


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(MoaiError, match=r"http://127.0.0.1:1/a.jsonl: .*\w"):
        list(read_texts(["http://user:secret@127.0.0.1:1/a.jsonl"]))


def test_secrets_are_not_shown() -> None:
    assert public("s3://key:secret@bucket/a.jsonl") == "s3://bucket/a.jsonl"
    assert public("https://h/a.jsonl?sig=secret#x") == "https://h/a.jsonl"


def test_damage_of_a_remote_file_can_be_skipped(memory: str) -> None:
    fsspec.filesystem("memory").pipe("/sources/bad.jsonl", b"{\n" + LINES)
    skipped = Skipped(allow_bad=True)
    assert len(list(read_texts([memory + "/bad.jsonl"], skipped=skipped))) == 3 and skipped.bad_count == 1


def test_a_local_path_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert expand([f"file://{tmp_path}/a.txt"])[0].name == str(tmp_path / "a.txt")
