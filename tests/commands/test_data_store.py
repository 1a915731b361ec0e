"""`moai data merge`, `verify`, `info` and `show` as a user runs them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from moai_llm.commands import data_show
from moai_llm.commands.data_show import decoded
from moai_llm.data.pieces import whole_document
from moai_llm.data.shards import Store
from moai_llm.tokenizer import Tokenizer
from tests.data.stores import some_documents, write_store

Moai = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Stores `wiki`, `news` and `chat`."""
    write_store(tmp_path / "wiki", tokenizer, some_documents(tokenizer, 60, 0))
    write_store(tmp_path / "news", tokenizer, some_documents(tokenizer, 6, 1))
    return tmp_path


@pytest.fixture
def chat(folder: Path, tokenizer: Tokenizer, moai: Moai) -> Path:
    lines = [{"Q": f"question {i}", "A": f"answer {i} <|im_end|> 🙂"} for i in range(6)]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tok = tokenizer.save(folder / "tok")
    moai("data", "prepare", folder / "chat.jsonl", "--chat", "--tokenizer", tok, "--out", folder / "chat")
    return folder / "chat"


def rows(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_merge(moai: Moai, fails: Moai, folder: Path) -> None:
    wiki, news, out = folder / "wiki", folder / "news", folder / "out"
    output = moai("data", "merge", wiki, news, "--out", out)
    sizes = [Store(store).manifest.tokens for store in (wiki, news)]
    table = {row[0]: row for row in rows(output) if row}
    for store, size in zip((wiki, news), sizes):
        epochs = f"{0.5 * sum(sizes) / size:.2f}"
        assert table[store.name][1:6] == ["text", str(len(Store(store))), f"{size:,}", "50.0%", epochs]
    assert table["all"][2:4] == ["66", f"{sum(sizes):,}"] and f"data.train={out}" in output
    assert re.search(r"news is read [\d.]+ times in an epoch of all. Beyond 4 times", output)
    output = moai("data", "merge", wiki, news, "--weights", 0.7, 0.3, "--out", out, "--overwrite")
    assert Store(out).manifest.strategy == "weighted" and "70.0%" in output
    moai("data", "merge", wiki, news, "--strategy", "temperature", "--temperature", 3, "--out", out, "--overwrite")
    assert Store(out).manifest.strategy == "temperature 3"
    assert "in an epoch of all" not in moai(
        "data", "merge", wiki, news, "--strategy", "proportional", "--out", folder / "p"
    )
    (folder / "merge.json").write_text(
        json.dumps({"datasets": {"paths": [str(wiki), str(news)], "weights": [0.7, 0.3], "merge_strategy": "weighted"}})
    )
    moai("data", "merge", "--spec", folder / "merge.json", "--out", folder / "spec")
    assert [part.weight for part in Store(folder / "spec").parts()] == [0.7, 0.3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the stores to merge, or a file with --spec"),
        (("wiki", "--spec", "merge.json"), "merge.json names the stores and their weights: give them there or here"),
        (("wiki", "nowhere"), "not a prepared store"),
        (("wiki", "news", "--weights", "1"), "1 weights for 2 stores"),
        (("wiki", "news", "--strategy", "weighted"), "weighted needs weights"),
        (("wiki", "wiki"), "is there twice"),
    ],
)
def test_merge_mistakes(
    fails: Moai, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert message in " ".join(fails("data", "merge", *arguments, "--out", "out").split())
    assert not (folder / "out").exists()


def test_text_and_conversations(moai: Moai, folder: Path, chat: Path) -> None:
    output = moai("data", "merge", folder / "wiki", chat, "--out", folder / "out")
    assert "texts are learned whole, of conversations what their masks say" in output
    info = moai("data", "info", folder / "out", "--seq-len", 64)
    assert re.search(r"merged +2 stores, equal", info) and re.search(r"wiki +text +60", info)
    assert "attention wait" not in info
    first = moai("data", "show", folder / "out", 0, "--seq-len", 64)
    assert re.search(r"^── document \d+ of wiki", first, re.M)
    wiki_rows = int(re.findall(r"rows of 64 +(\d+),", moai("data", "info", folder / "wiki", "--seq-len", 64))[0])
    assert "of chat: " in moai("data", "show", folder / "out", wiki_rows, "--seq-len", 64)
    assert "document 0 of chat: " in moai("data", "show", folder / "out", "--document", 60)


def test_verify(moai: Moai, fails: Moai, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wiki, out = folder / "wiki", folder / "out"
    moai("data", "merge", wiki, folder / "news", "--out", out)
    output = moai("data", "verify", wiki, out)
    assert f"{wiki}: sound" in output and f"{out}: sound" in output and "note" not in output
    lengths = sorted(Store(wiki).lengths().tolist())
    assert f"p50 {lengths[30]:,}, p90 {lengths[54]:,}" in output and "ids never used" in output
    assert "not read" in moai("data", "verify", wiki, "--quick")
    (found,) = json.loads(moai("data", "verify", out, "--json"))
    assert found["sound"] and found["documents"] == 66 and [part["documents"] for part in found["parts"]] == [60, 6]
    file = wiki / "shards" / "00001.bin"
    content = bytearray(file.read_bytes())
    content[4:6] = b"\xff\xff"
    file.write_bytes(content)
    moai("data", "verify", wiki, "--quick")  # sizes are right
    for stores in ((wiki,), (out,), (folder / "news", out)):
        with pytest.raises(SystemExit) as left:
            moai("data", "verify", *stores)
        printed = capsys.readouterr().out
        assert f"{file}: content does not match its checksum" in printed
        assert f"{file}: token 2: is 65,535, and the vocabulary has 512; 1 such ids in all" in printed
        assert str(left.value.code).startswith(f"moai data: 2 problems in {stores[-1]}")
    with pytest.raises(SystemExit):
        moai("data", "verify", out, "--json")
    (found,) = json.loads(capsys.readouterr().out)
    assert not found["sound"] and found["parts"][0]["problems"][1]["place"] == "token 2"
    assert "the vocabulary has 512" in fails("data", "show", wiki, "--document", int(Store(wiki)._first[1]))


def test_info_as_a_page(moai: Moai, fails: Moai, folder: Path) -> None:
    output = moai("data", "info", folder / "wiki", "--seq-len", 64, "--html", folder / "pages" / "wiki.html")
    assert "wiki.html" in output and "what moai" not in output
    assert (folder / "pages" / "wiki.html").read_text().startswith("<!doctype html>")
    assert "is a folder: name a file to write" in fails("data", "info", folder / "wiki", "--html", folder)


def test_show_without_a_terminal(moai: Moai, fails: Moai, chat: Path, tokenizer: Tokenizer) -> None:
    output = moai("data", "show", chat, 0, "--seq-len", 4096)
    assert output.startswith("⟦not learned⟧\n") and output.count("── document ") == 6
    assert re.search(r"── end of row 0: [\d,]+ of 4,096 tokens, the rest is padding", output)
    for i in range(6):
        assert f"assistant\n⟧answer {i} <|im_end|> 🙂<|im_end|>⟦\n⟧" in output
    alone = moai("data", "show", chat, "--document", 3)
    assert re.search(r"── document 3: \d+ tokens, \d+ learned", alone) and "⟧answer 3" in alone
    cut = moai("data", "show", chat, 2, "--seq-len", 16, "--packing", "next-fit", "--overlong", "split")
    assert re.search(r"document \d+, tokens \d+ to \d+ of \d+: ", cut)
    assert "there are 6 documents, counted from 0" in fails("data", "show", chat, "--document", 6)
    assert "rows of 256 tokens, counted from 0" in fails("data", "show", chat, 99)
    assert "choose one of them" in fails("data", "show", chat, 1, "--document", 1)


def test_show_on_a_terminal(chat: Path, tokenizer: Tokenizer) -> None:
    """Grey is what is not learned, reversed are control tokens; a control token's name in a text is text."""
    console = Console(force_terminal=True, color_system="standard", file=io.StringIO(), width=200)
    piece = whole_document(Store(chat), 0)
    text = decoded(piece.ids(), piece.learned(in_row=False), "green", tokenizer, console)
    looks = [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]
    assert looks == [
        ("<|im_start|>", "dim reverse"), ("user\nquestion 0", "dim"), ("<|im_end|>", "dim reverse"), ("\n", "dim"),
        ("<|im_start|>", "dim reverse"), ("assistant\n", "dim"), ("answer 0 <|im_end|> 🙂", "green"),
        ("<|im_end|>", "green reverse"), ("\n", "dim"),
    ]  # fmt: skip
    assert data_show.OPEN not in text.plain
