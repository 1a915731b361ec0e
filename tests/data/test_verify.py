"""`verify` finds whatever happened to a store and says where; training either gets the rows it would have got, or an
error that says what is damaged.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.digests import Digests
from moai_llm.data.loader import Loader
from moai_llm.data.manifest import sealed
from moai_llm.data.merge import MergeSpec, merge
from moai_llm.data.shards import Store
from moai_llm.data.verify import quantiles, size_of, verify
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.data.stores import some_documents, write_store

CORRUPTIONS = 200
SEQ_LEN = 64


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A folder of a text store, a chat store, and both merged."""
    folder = tmp_path_factory.mktemp("sound")
    write_store(folder / "text", tokenizer, some_documents(tokenizer, 30, 0))
    write_store(folder / "chat", tokenizer, some_documents(tokenizer, 20, 1), "chat")
    merge(MergeSpec((str(folder / "text"), str(folder / "chat"))), folder / "mix")
    return folder


@pytest.fixture
def stores(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "stores"))


def rows(store: Path) -> dict[str, torch.Tensor]:
    """All that training reads of a store."""
    opened = Store(store)
    loader = Loader(opened, SEQ_LEN, seed=0)
    return {**loader.rows(0, len(loader)), "template": torch.tensor([hash(opened.tokenizer().chat_template)])}


def damage(file: Path, rng: np.random.Generator) -> str:
    """Flip, cut, delete or zero, at a random place; never nothing."""
    content = bytearray(file.read_bytes())
    at, how = int(rng.integers(len(content))), str(rng.choice(["flip", "flip", "truncate", "delete", "zero", "extend"]))
    if how == "delete":
        file.unlink()
        return how
    if how == "flip":
        content[at] ^= int(rng.integers(1, 256))
    if how == "truncate":
        del content[at:]
    if how == "extend":
        content += bytes(rng.integers(0, 256, 8).tolist())
    if how == "zero":
        end = at + int(rng.integers(1, 40))
        before = bytes(content[at:end])
        content[at:end] = bytes(len(before))
        if not any(before):  # it was all zeros
            content[at] = 1
    file.write_bytes(content)
    return f"{how} at {at} of {len(content)}"


@pytest.mark.parametrize("name", ["text", "chat", "mix"])
def test_control_a_sound_store_has_no_problem(sound: Path, name: str) -> None:
    found = verify(sound / name)
    assert found.all_problems() == [] and found.notes == [] and not list(Store(sound / name).problems())
    assert verify(sound / name, quick=True).all_problems() == []
    assert found.bytes == size_of(sound / name) > 0


def test_whatever_happens_to_a_store_is_found(sound: Path, stores: Path) -> None:
    """Every second time what is merged of the damaged store is looked at instead of the store."""
    files = sorted(path.relative_to(sound) for path in sound.rglob("*") if path.is_file())
    assert {file.name.partition(".")[2] for file in files} == {"bin", "idx.npy", "mask.bin", "json", "jinja"}
    expected = {name: rows(sound / name) for name in ("text", "chat", "mix")}
    refused = unnoticed = 0
    for seed in range(CORRUPTIONS):
        file = files[seed % len(files)]
        how = damage(stores / file, np.random.default_rng(seed))
        done = f"{seed}, {file}: {how}"
        which = file.parts[0] if seed // len(files) % 2 else "mix"
        problems = verify(stores / which).all_problems()
        assert any(str(stores / file.parts[0]) in problem.file for problem in problems), done
        try:
            read = rows(stores / which)
            same = all(torch.equal(read[key], expected[which][key]) for key in read)
            assert same or (file.suffix == ".bin" and how.startswith(("flip", "zero"))), done
            unnoticed += not same
        except MoaiError:
            refused += 1
        shutil.copyfile(sound / file, stores / file)
    assert refused > 5 * unnoticed > 0  # a token that became another one is seen by its checksum alone


def change_manifest(store: Path, change: Callable[[dict], object], seal: bool = True) -> None:  # type: ignore[type-arg]
    content = json.loads((store / "manifest.json").read_text())
    change(content)
    raw = sealed(content, store) if seal else json.dumps(content).encode()
    (store / "manifest.json").write_bytes(raw)


def rewrite(store: Path, name: str, change: Callable[[np.ndarray], object], dtype: str) -> None:
    """Change the values of a file, and its checksum along with it: damage that only reading shows."""
    file = store / name
    head = 128 if name.endswith(".npy") else 0
    raw = file.read_bytes()
    values = np.frombuffer(raw[head:], dtype=dtype).copy()
    change(values)
    file.write_bytes(raw[:head] + values.tobytes())

    def describe(content: dict) -> None:  # type: ignore[type-arg]
        described = next(shard["files"][name] for shard in content["shards"] if name in shard["files"])
        described["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    change_manifest(store, describe)


def put(place: int, value: int) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[place] = value

    return change


SHARD = "shards/00001"
CONTENT = [
    ("text", f"{SHARD}.bin", put(7, 600), "<u2", "token 7", "is 600, and the vocabulary has 512; 1 such ids in all"),
    ("text", f"{SHARD}.idx.npy", put(2, 1), "<i8", "border 2", "do not rise"),
    ("text", f"{SHARD}.idx.npy", put(0, 1), "<i8", "border 0", "is 1, not 0"),
    ("text", f"{SHARD}.idx.npy", put(-1, 9999), "<i8", "border", "is 9,999, where the shard has"),
    ("text", f"{SHARD}.idx.npy", put(1, -(2**63)), "<i8", "border 1", "do not rise"),
    ("chat", "shards/00000.mask.bin", put(5, 2), "u1", "token 5", "is 2, neither 0 nor 1; 1 such in all"),
]  # fmt: skip


@pytest.mark.parametrize(("store", "name", "change", "dtype", "place", "what"), CONTENT)
def test_contents_that_no_checksum_shows(
    stores: Path, store: str, name: str, change: Callable[[np.ndarray], None], dtype: str, place: str, what: str
) -> None:
    rewrite(stores / store, name, change, dtype)
    (problem,) = verify(stores / store).problems
    assert problem.file == str(stores / store / name) and problem.place.startswith(place) and what in problem.what
    if not name.endswith("mask.bin"):
        with pytest.raises(MoaiError, match=f"{name} is damaged .*{place}"):
            rows(stores / store)


def test_a_border_that_moved_shows_in_the_texts(stores: Path) -> None:
    rewrite(stores / "text", f"{SHARD}.idx.npy", lambda values: values.__setitem__(1, values[1] + 1), "<i8")
    (problem,) = verify(stores / "text").problems
    assert problem.file.endswith(f"{SHARD}.bin") and "ends a text inside of a document; 1 such in all" in problem.what


def test_ends_of_texts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    chunks = write_store(tmp_path / "chunks", tokenizer, [[5, 6], [7, eos], [8, eos]])
    found = verify(chunks.path)
    assert (
        not found.problems
        and "1 documents do not end with the end-of-text token, the first is document 0" in found.notes[0]
    )
    (problem,) = verify(write_store(tmp_path / "open", tokenizer, [[5, eos], [6, 7]]).path).problems
    assert problem.place == "token 3" and "not the end-of-text token" in problem.what


def test_pairs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = some_documents(tokenizer, 5)
    assert not verify(write_store(tmp_path / "even", tokenizer, documents[:4], "preference").path).problems
    (problem,) = verify(write_store(tmp_path / "odd", tokenizer, documents, "preference").path).problems
    assert problem.what == "5 documents are no pairs"


MANIFESTS: list[tuple[Callable[[dict], object], str]] = [  # type: ignore[type-arg]
    (lambda m: m.update(tokens=m["tokens"] + 1), "tokens is .* in its shards"),
    (lambda m: m.update(documents=0), "documents is 0, not a number above 0"),
    (lambda m: m.update(kind="speech"), "kind is 'speech', not one of text, chat, preference"),
    (lambda m: m.update(dtype="int8"), "dtype is 'int8'"),
    (lambda m: m.update(text_bytes="many"), "text_bytes is 'many'"),
    (lambda m: m.update(vocab_size=70_000), "70,000 token ids do not fit into uint16"),
    (lambda m: m["shards"].append(m["shards"][0]), "the shard shards/00000 is there twice"),
    (lambda m: m["shards"][0].update(stem="../x"), "manifest names a file outside the store: ../x"),
    (lambda m: m["shards"][0].update(stem="/etc/x"), "manifest names a file outside the store: /etc/x"),
    (lambda m: m["shards"][0].update(stem="shards/00007"), "shards/00007 has the files"),
    (lambda m: m["shards"][0]["files"].pop("shards/00000.idx.npy"), "shards/00000 has the files"),
    (lambda m: m["shards"][0].update(tokens=3), "bytes are not 3 tokens"),
    (lambda m: m["shards"][0]["files"]["shards/00000.bin"].pop("sha256"), "has no size and checksum"),
    (lambda m: m.update(shards=[]), "a store has either shards or parts"),
    (lambda m: m.update(parts=[1]), "a store has either shards or parts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFESTS)
def test_manifests_that_contradict_themselves(stores: Path, change: Callable[[dict], object], message: str) -> None:  # type: ignore[type-arg]
    change_manifest(stores / "text", change)
    problems = verify(stores / "text").problems
    assert problems and problems[0].file == str(stores / "text" / "manifest.json")
    with pytest.raises(MoaiError, match=f"manifest.json is damaged .*{message}"):
        Store(stores / "text")


def test_a_changed_manifest_shows_by_its_own_checksum(stores: Path) -> None:
    file = stores / "text" / "manifest.json"
    file.write_text(file.read_text().replace('"test"', '"tests"'))
    assert "does not match its own checksum" in verify(stores / "text").problems[0].what
    with pytest.raises(MoaiError, match="does not match its own checksum"):
        Store(stores / "text")


def test_a_store_without_checksums_of_its_manifest(stores: Path) -> None:
    """As they were written before there were any: read, and said so."""
    change_manifest(stores / "text", lambda m: (m.pop("digest"), m.pop("tokenizer_files")), seal=False)
    found = verify(stores / "text")
    assert not found.problems and found.notes == [
        "the manifest has no checksums of itself and of the tokenizer's files"
    ]
    assert len(Store(stores / "text")) == 30


def test_another_tokenizer(stores: Path, tokenizer: Tokenizer) -> None:
    other = Tokenizer(tokenizer.backend, {**tokenizer.roles, "pad_token": "<|nothing|>"})
    other.save(stores / "text" / "tokenizer")
    assert "tokenizer_config.json" in verify(stores / "text").problems[0].file
    change_manifest(stores / "text", lambda m: None)  # new checksums
    (problem,) = verify(stores / "text").problems
    assert "has no pad_token" in problem.what
    tokenizer.save(stores / "text" / "tokenizer")
    change_manifest(stores / "text", lambda m: m.update(tokenizer="0" * 64))
    assert "by its fingerprint" in verify(stores / "text").problems[0].what


def test_every_problem_is_told(stores: Path) -> None:
    (stores / "text" / "shards" / "00000.bin").unlink()
    (stores / "text" / "tokenizer" / "chat_template.jinja").write_text("x")
    rewrite_file = stores / "text" / "shards" / "00001.bin"
    rewrite_file.write_bytes(b"\xff" * rewrite_file.stat().st_size)
    found = verify(stores / "text")
    assert [Path(problem.file).name for problem in found.problems] == [
        "chat_template.jinja", "00000.bin", "00001.bin", "00001.bin",
    ]  # fmt: skip
    assert str(found.problems[-1]).endswith(f"{rewrite_file.stat().st_size // 2:,} such ids in all")
    quick = verify(stores / "text", quick=True).problems
    assert [Path(problem.file).name for problem in quick] == ["chat_template.jinja", "00000.bin"]


def test_what_belongs_to_no_store(stores: Path) -> None:
    (stores / "text" / "shards" / "00009.bin").write_bytes(b"x")
    found = verify(stores / "text")
    assert not found.problems and "1 files that the manifest does not name, such as shards/00009.bin" in found.notes
    assert "not a prepared store" in verify(stores).problems[0].what


def test_statistics(tmp_path: Path, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    documents = [[9] * n + [eos] for n in range(1, 101)] + [[9] * 7 + [eos], [9] * 3 + [eos]]
    found = verify(write_store(tmp_path / "s", tokenizer, documents).path)
    ordered = sorted(map(len, documents))
    assert quantiles(found.lengths) == (ordered[51], ordered[91], ordered[100], ordered[101])
    assert found.unused_ids == tokenizer.vocab_size - 2
    assert found.repeated is not None and found.repeated == (2, 100, 6)
    assert json.loads(json.dumps(found.to_dict()))["lengths"]["max"] == 101
    chat = verify(write_store(tmp_path / "c", tokenizer, documents, "chat").path)
    assert chat.learned == sum(len(d) // 2 for d in documents)


@pytest.mark.parametrize("memory", [1, 7, 1000])
def test_equal_documents_in_parts_of_any_size(memory: int) -> None:
    rng = np.random.default_rng(memory)
    values = rng.integers(0, 60, 100)
    first = next(i for i in range(100) if values[i] in values[:i])
    with Digests(memory) as digests:
        for part in values[:40], values[40:]:
            digests.add(part.astype(np.uint16), np.arange(len(part) + 1))
        assert digests.repeated() == (100 - len(set(values.tolist())), first, values.tolist().index(values[first]))


def test_documents_that_two_parts_hold(stores: Path, tokenizer: Tokenizer) -> None:
    copy = write_store(stores / "more", tokenizer, some_documents(tokenizer, 31, 0))  # one more than `text`
    merged = merge(MergeSpec((str(stores / "text"), str(copy.path))), stores / "both")
    repeated = verify(merged.path).repeated
    assert repeated is not None and (repeated.documents, repeated.first, repeated.of) == (30, 30, 0)
    assert asdict(merged.manifest)["documents"] == 61
