"""The token store: written atomically, read back exactly, damage found, another tokenizer refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.data.writer import StoreWriter
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import train_tokenizer


def write(out: Path, tokenizer: Tokenizer, documents: list[list[int]], **options) -> Store:  # type: ignore[no-untyped-def]
    with StoreWriter(out, tokenizer, **options) as writer:
        for ids in documents:
            writer.add(ids, len(ids))
        writer.close(["test"])
    return Store(out)


def test_what_is_written_is_read(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [[1, 2, 3], [4], list(range(100)), [], [7, 8]]
    store = write(tmp_path / "s", tokenizer, documents, shard_tokens=50)
    kept = [d for d in documents if d]
    assert len(store.manifest.shards) == 2 and len(store) == 4 and store.manifest.tokens == 106
    assert store.lengths().tolist() == [len(d) for d in kept]
    assert [store.document(i).tolist() for i in range(4)] == kept
    assert store.document(2, 10, 13).tolist() == [10, 11, 12] and store.learn(0) is None
    assert store.document(0).dtype == np.uint16 and not list(store.problems())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]  # nothing temporary is left


def test_prepare_text(tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> None:
    (tmp_path / "more.jsonl").write_text('{"text": "  "}\n{"text": "one <|endoftext|> two"}\n')
    report = prepare([text_file, tmp_path / "more.jsonl"], tokenizer, tmp_path / "s")
    assert (report.read, report.manifest.documents, dict(report.dropped)) == (42, 41, {"empty": 1})
    store = Store(tmp_path / "s")
    last = store.document(40).tolist()
    assert tokenizer.decode(last[:-1]) == "one <|endoftext|> two" and last[-1] == tokenizer.eos_id
    assert last.count(tokenizer.eos_id) == 1  # the one in the text stayed text
    assert store.tokenizer().fingerprint == tokenizer.fingerprint
    before = {p.name: p.read_bytes() for p in (tmp_path / "s" / "shards").iterdir()}
    prepare([text_file, tmp_path / "more.jsonl"], tokenizer, tmp_path / "s", overwrite=True)
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "s" / "shards").iterdir()}


def test_prepare_conversations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text('{"Q": "hi", "A": "hello"}\n{"Q": "quiet", "A": ""}\n')
    report = prepare([file], tokenizer, tmp_path / "s", kind="chat")
    assert dict(report.dropped) == {"no assistant turn": 1}
    store = Store(tmp_path / "s")
    learned = store.document(0)[store.learn(0).astype(bool)]
    assert tokenizer.decode(learned) == "hello<|im_end|>"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ('{"text": " "}\n', "text", "no document had any token"),
        ('{"Q": "a", "A": ""}\n', "chat", "none of the 1 conversations has an assistant turn"),
        (
            '{"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]}\n',
            "chat",
            r"a.jsonl:1: not a conversation: message 0",
        ),
        ('{"text": "x"}\n', "chat", "not a conversation"),
    ],
)
def test_nothing_to_store(tmp_path: Path, tokenizer: Tokenizer, content: str, kind: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(MoaiError, match=message):
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / "s", kind=kind)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_store_is_not_overwritten_by_accident(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "s", tokenizer, [[1]])
    with pytest.raises(MoaiError, match="exists already.*--overwrite"):
        StoreWriter(tmp_path / "s", tokenizer)
    assert len(write(tmp_path / "s", tokenizer, [[1], [2]], overwrite=True)) == 2


def test_an_exception_leaves_the_old_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "s", tokenizer, [[1, 2]])
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s", tokenizer, overwrite=True) as writer:
        writer.add([5], 1)
        raise RuntimeError
    assert Store(tmp_path / "s").document(0).tolist() == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_damage_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write(tmp_path / "s", tokenizer, [[1, 2, 3]])
    shard = tmp_path / "s" / "shards" / "00000.bin"
    sound = shard.read_bytes()
    shard.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    assert any("00000.bin" in problem for problem in store.problems())
    shard.write_bytes(sound[:-1])
    with pytest.raises(MoaiError, match="00000.bin has 5 bytes instead of 6"):
        Store(tmp_path / "s")
    shard.unlink()
    with pytest.raises(MoaiError, match="00000.bin is missing"):
        Store(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {**m, "format": 9}, "store format 9, this version reads 1"),
        (lambda m: {"format": 1}, "is damaged"),
        (lambda m: {**m, "shards": [{**m["shards"][0], "files": {"../x": {"bytes": 1}}}]}, "outside the store"),
    ],
)
def test_wrong_manifests(tmp_path: Path, tokenizer: Tokenizer, change, message: str) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "s", tokenizer, [[1]])
    file = tmp_path / "s" / "manifest.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(MoaiError, match=message):
        Store(tmp_path / "s")
    file.write_text("{")
    with pytest.raises(MoaiError, match="is damaged"):
        Store(tmp_path / "s")
    with pytest.raises(MoaiError, match="not a prepared store"):
        Store(tmp_path)


def test_another_tokenizer_in_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = write(tmp_path / "s", tokenizer, [[1]])
    train_tokenizer(["entirely different words here " * 9], 270).save(tmp_path / "s" / "tokenizer")
    with pytest.raises(MoaiError, match="not the tokenizer that made this store"):
        store.tokenizer()


def test_large_vocabularies_need_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    big = Tokenizer(tokenizer.backend, tokenizer.roles)
    big.vocab_size = 70_000
    assert write(tmp_path / "s", big, [[65_536, 1]]).document(0).tolist() == [65_536, 1]
