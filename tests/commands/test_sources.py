"""Sources as every command takes them: the options, what is skipped and shown, standard input, progress."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from moai_llm.commands import sources as shared
from moai_llm.commands.sources import ReadProgress, show_skipped
from moai_llm.data.shards import Store
from moai_llm.data.sources import Skipped, Source
from moai_llm.tokenizer import Tokenizer

Moai = Callable[..., str]


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: Tokenizer) -> tuple[object, ...]:
    return (
        "data",
        "prepare",
        "--tokenizer",
        tokenizer.save(tmp_path / "tok"),
        "--out",
        tmp_path / "out",
        "--overwrite",
    )


def stored(path: Path) -> list[str]:
    store = Store(path)
    tokenizer = store.tokenizer()
    return [tokenizer.decode(store.document(i).tolist()[:-1]) for i in range(len(store))]


def test_what_is_bad_is_an_error_or_shown(moai: Moai, fails: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": \n{"text": ""}\n{"body": 1}\n{"body": 2}\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n' * 9)[:-9])
    (folder / "c.png").write_bytes(b"x")
    (folder / "dead.txt").symlink_to("nowhere")
    assert f"{folder}/dead.txt: cannot be read: No such file or directory (a link to nowhere)" in fails(
        *prepare, folder
    )
    (folder / "dead.txt").unlink()
    assert f"{folder}/a.jsonl:2: not JSON: " in fails(*prepare, folder)
    output = " ".join(moai(*prepare, folder, "--skip-bad").split())
    assert "read kept dropped skipped" in output and "11 10 1 empty 4" in output
    assert (
        f"skipped 2: {folder}/a.jsonl:4: the text is int, not text" in output
        and "(1 more like it in this file)" in output
    )
    assert f"skipped 1: {folder}/a.jsonl:2: not JSON" in output
    assert (
        f"skipped 1: {folder}/b.jsonl.gz: cannot be read: Compressed file ended" in output and "jsonl.gz:9)" in output
    )
    assert f"left out of {folder}: 1 .png" in output
    assert stored(tmp_path / "out") == ["one", *["two"] * 9]
    (folder / "b.jsonl.gz").unlink()
    (folder / "a.jsonl").write_text("{\n[]\n")
    message = fails(*prepare, folder, "--skip-bad")
    assert f"nothing could be read: 2 skipped; the first: {folder}/a.jsonl:1: not JSON" in message


def test_bad_conversations(moai: Moai, fails: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [
        {"frage": "q", "antwort": "a"}, {"frage": "q"}, {"frage": "q", "antwort": "b"},
        {"messages": [{"role": "nobody", "content": "q"}, {"role": "assistant", "content": "a"}]}, {"messages": "text"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    german = ("--map", "question=frage", "--map", "answer=antwort")
    message = fails(*prepare, file, "--chat")
    assert "chats.jsonl:1: not a conversation: no column 'messages', which this source has" in message
    assert "chats.jsonl:2: no column 'antwort'; it has frage" in fails(*prepare, file, "--chat", *german)
    output = " ".join(moai(*prepare, file, "--chat", *german, "--skip-bad").split())
    assert "2 2 0 3 " in output and "skipped 2: " in output and "(1 more like it" in output
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[3:]))
    assert "chats.jsonl:1: not a conversation: message 0 has an unknown role 'nobody'" in fails(
        *prepare, file, "--chat"
    )
    message = fails(*prepare, file, "--chat", "--skip-bad")
    assert "nothing could be read: 2 skipped; the first: " in message and "chats.jsonl:1: not a conversation" in message
    message = fails(*prepare, file, "--chat", "--map", "txt=frage")
    assert "no column 'txt' is known here" in message and "question, answer" in message


def test_both_parts_skip_the_same(moai: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"text": "document {i}"}}\n' + "{\n" * (i % 3) for i in range(20)))
    output = moai(*prepare, file, "--skip-bad", "--valid", tmp_path / "valid", "--valid-share", 0.25)
    assert output.count("skipped 19: ") == 1 and output.count(" 19 ") == 2  # both parts are of the same sources
    train, valid = stored(tmp_path / "out"), stored(tmp_path / "valid")
    assert len(valid) == 5 and sorted(train + valid) == sorted(f"document {i}" for i in range(20))


def test_standard_input(
    moai: Moai, fails: Moai, prepare: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def feed(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]

    feed(b'{"text": "from a pipe"}\n')
    moai(*prepare, "-")
    assert stored(tmp_path / "out") == ["from a pipe"] and Store(tmp_path / "out").manifest.sources == ["-"]
    feed(b"".join(b'{"text": "text %d"}\n{\n' % i for i in range(9)))
    moai(*prepare, "-", "--skip-bad", "--valid", tmp_path / "v", "--valid-share", 0.25)
    assert stored(tmp_path / "v") == ["text 0", "text 4", "text 8"] and len(stored(tmp_path / "out")) == 6
    feed(b'{"text": "one text of which the end is held out"}\n')
    moai(*prepare, "-", "--valid", tmp_path / "v", "--valid-share", 0.25)
    assert stored(tmp_path / "out") + stored(tmp_path / "v") == ["one text of which the end is", " held out"]
    feed(b'{"text": "short"}\n')
    assert "the end of each is held out, and these are too short" in fails(*prepare, "-", "--valid", tmp_path / "v")
    assert "quickstart reads its text three times" in fails("quickstart", "--text", "-", "--out", tmp_path / "q")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoding", "utf-99"), "--encoding utf-99: no such encoding; e.g. cp949"),
        (("--encoding", "hex"), "--encoding hex: no such encoding"),
        (("--max-record", "much"), "'much' is not a size; write e.g. 500KB, 64MB or 2GB"),
        (("--map", "body"), "--map body: write OURS=THEIRS"),
        (("--map", "text=nope"), "a.jsonl:1: no column 'nope'"),
        (("--max-record", "20"), "a.jsonl:1: a line of more than 20 bytes; --max-record allows longer ones"),
    ],
)
def test_options(
    fails: Moai, prepare: tuple[object, ...], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one document"}\n')
    assert message in fails(*prepare, tmp_path / "a.jsonl", *options)


def test_many_kinds_at_once(moai: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    """A pattern, another encoding, a repository; the store knows where it comes from."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("id,body\n1,안녕\n", encoding="cp949")
    repository = tmp_path / "r"
    repository.mkdir()
    (repository / "a.py").write_text("x = 1\n")
    for command in ("init -q", "add -A", "-c user.name=n -c user.email=e commit -qm m"):
        subprocess.run(["git", "-C", repository, *command.split()], check=True)
    moai(*prepare, f"{tmp_path}/in/**/*.csv", "--map", "text=body", "--encoding", "cp949")
    assert stored(tmp_path / "out") == ["안녕"]
    moai(*prepare, f"git:{repository}?ext=py", tmp_path / "in" / "a.csv", "--skip-bad")
    (source, *_) = Store(tmp_path / "out").manifest.sources
    assert source.startswith(f"git:{repository}@") and len(source) == len(f"git:{repository}@") + 12


def test_the_tokenizer_commands_take_the_same(moai: Moai, fails: Moai, tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "interest is paid on the deposit, again and again"}\n' * 50 + "{\n")
    train = ("tokenizer", "train", file, "--vocab-size", 280, "--out", tmp_path / "t", "--map", "text=body")
    assert "a.jsonl:51: not JSON" in fails(*train)
    assert "a.jsonl:51: not JSON" in moai(*train, "--skip-bad")
    report = ("tokenizer", "report", tmp_path / "t", "--no-speed", "--text", f"en={file}", "--map", "text=body")
    assert "a.jsonl:51: not JSON" in fails(*report)
    assert "a.jsonl:51: not JSON" in moai(*report, "--skip-bad")
    assert "nowhere.txt: no such file" in fails(*train[:3], "nowhere.txt", *train[3:], "--overwrite")


def shown(skipped: Skipped) -> str:
    console = Console(file=io.StringIO(), width=200)
    show_skipped(console, skipped)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_account_is_short() -> None:
    skipped = Skipped(allow_bad=True)
    assert shown(skipped) == ""
    for i in range(30):
        skipped.bad(f"{i}.jsonl", f"{i}.jsonl:1", "not JSON", ": [red]x")
        skipped.leave_out(f"folder {i}", ".png", 1000)
    output = shown(skipped)
    assert (
        "... and 20 more, for 20 other reasons or in other files" in output
        and "and something in 20 more sources" in output
    )
    assert "[red]x" in output and "left out of folder 3: 1,000 .png" in output and len(output.splitlines()) == 22


def test_progress_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "EVERY", -1)

    def lines(*sizes: int | None) -> str:
        console = Console(file=io.StringIO(), width=200)
        sources = [Source("a", size, lambda *_: iter(())) for size in sizes]
        with ReadProgress(console, sources) as progress:
            progress.read(50)
            progress.update("3 documents")
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "50% read: 3 documents" in lines(60, 40)
    assert "read:" not in lines(60, None) and "3 documents" in lines(60, None)


def test_progress_says_how_fast_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "EVERY", -1)
    now = [0.0]
    monkeypatch.setattr(shared, "time", SimpleNamespace(monotonic=lambda: now[0]))
    console = Console(file=io.StringIO(), width=200)
    with ReadProgress(console, [Source("a", 1_000_000_000, lambda *_: iter(()))]) as progress:
        progress.read(400_000_000)  # by an earlier run: it does not count as fast
        progress.update("begun")
        now[0] = 10
        progress.read(100_000_000)
        progress.update("3 documents")
        now[0] = 20
        progress.update("4 documents")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[1:] == ["50% read: 3 documents, 10 MB/s, 0:50 left", "50% read: 4 documents, 5 MB/s, 1:40 left"]


def test_a_pipe_is_read_once(moai: Moai, prepare: tuple[object, ...], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    lines = b"".join(b'{"text": "text %d"}\n' % i for i in range(9))
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_bytes, args=(lines,))
    writer.start()
    moai(*prepare, tmp_path / "pipe.jsonl", "--valid", tmp_path / "v", "--valid-share", 0.25)
    writer.join()
    assert len(stored(tmp_path / "v")) == 3 and len(stored(tmp_path / "out")) == 6
