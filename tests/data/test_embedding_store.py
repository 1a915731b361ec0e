"""Texts that belong together, from records of many shapes to a store and to rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.augment import view
from moai_llm.data.embedding_loader import EmbeddingLoader
from moai_llm.data.embedding_records import Augmenter, EmbeddingOptions, Related, read_one
from moai_llm.data.embedding_store import ANCHOR, RIGHT, WRONG, read_groups
from moai_llm.data.loader import Loader
from moai_llm.data.merge import make_spec, merge
from moai_llm.data.prepare import prepare
from moai_llm.data.shards import Store
from moai_llm.data.verify import verify
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer


def write(folder: Path, lines: list[dict[str, object]], name: str = "related") -> Path:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


def prepare_related(folder: Path, tokenizer: Tokenizer, count: int = 40, name: str = "related") -> Store:
    """Questions with one or two answers, some of which several questions share, and some wrong ones."""
    lines: list[dict[str, object]] = [
        {
            "query": f"interest on deposit {i}?" + " please" * (i % 3),
            "pos": [f"Paid: {i // 2}."] + [f"It is paid, says {i}."] * int(i % 3 == 0),
            "neg": [f"lazy dog {i}." + " and some" * (i % 4)] * int(i % 4 != 0),
        }
        for i in range(count)
    ]
    prepare([write(folder, lines, name)], tokenizer, folder / name, kind="embedding")
    return Store(folder / name)


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    return prepare_related(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"anchor": "a", "positive": "b", "negative": "c"}, Related("a", ("b",), ("c",))),
        ({"anchor": "a", "positive": "b", "negative_1": "c", "negative_2": "d"}, Related("a", ("b",), ("c", "d"))),
        ({"query": "a", "pos": ["b", "c"], "neg": ["d"], "id": 3}, Related("a", ("b", "c"), ("d",))),
        ({"query": "a", "passage": "b"}, Related("a", ("b",))),
        ({"sentence1": "a", "sentence2": "b", "score": 0.5}, Related("a", ("b",), (), 0.5)),
        ({"sentence1": "a", "sentence2": "b", "label": "1"}, Related("a", ("b",), (), 1.0)),
        ({"premise": "a", "hypothesis": "b"}, Related("a", ("b",))),
        ({"premise": "a", "hypothesis": "b", "label": "entailment"}, Related("a", ("b",))),
        ({"question": "a", "answer": "b", "label": 0}, Related("a", ("b",))),
        ({"Q": "12시 땡!", "A": "하루가 또 가네요.", "label": "0"}, Related("12시 땡!", ("하루가 또 가네요.",))),
        ({"question": "a", "answers": '["b", "c"]'}, Related("a", ("b", "c"))),
        ({"set": ["a", "b", "c"]}, Related("a", ("b", "c"))),
        ({"text": "a"}, Related("a")),
    ],
)
def test_columns_of_others(columns: dict[str, object], expected: Related) -> None:
    assert read_one(columns) == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"foo": "a"}, "it has foo. Name the columns, as in --map anchor=question"),
        ({"query": "a", "pos": [3]}, "'pos' is a number, not a text"),
        (
            {"sentence1": "a", "sentence2": "b", "score": 4.2},
            "grades lie from 0 to 1: say the largest",
        ),
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "'score' is text, not a number"),
        ({"premise": "a", "hypothesis": "b", "label": 2}, "premises from which the hypothesis does not follow"),
    ],
)
def test_columns_that_say_nothing(columns: dict[str, object], message: str) -> None:
    with pytest.raises(MoaiError, match=message):
        read_one(columns)


def test_grades_are_divided(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[dict[str, object]] = [
        {"sentence1": f"one {i}", "sentence2": f"two {i}", "score": i / 4} for i in range(21)
    ]
    options = EmbeddingOptions(score_max=5.0)
    prepare([write(tmp_path, lines)], tokenizer, tmp_path / "graded", kind="embedding", embedding=options)
    groups = read_groups(tmp_path / "graded")
    assert np.allclose(groups.score[1::2], np.arange(21) / 20) and (groups.score[::2] == -1).all()
    assert not list(Store(tmp_path / "graded").problems())


def test_a_store_of_records(store: Store, tokenizer: Tokenizer) -> None:
    groups = read_groups(store)
    assert len(groups.first) == 41 and (groups.role[groups.first[:-1]] == ANCHOR).all()
    assert (groups.role == RIGHT).sum() == 40 + 14 and (groups.role == WRONG).sum() == 30
    first = [tokenizer.decode(store.document(i), skip_special=True) for i in range(groups.first[1])]
    assert first == ["interest on deposit 0?", "Paid: 0.", "It is paid, says 0."]
    assert all(store.document(i)[-1] == tokenizer.eos_id for i in range(len(store)))
    assert not verify(store.path).problems


def test_what_is_no_record_is_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[dict[str, object]] = [
        {"query": "a", "pos": ["a"]}, {"query": " ", "pos": ["b"]}, {"query": "good", "pos": ["better"]},
        {"query": "long " * 40, "pos": ["longer"]},
    ]  # fmt: skip
    options = EmbeddingOptions(max_length=9)
    report = prepare([write(tmp_path, lines)], tokenizer, tmp_path / "out", kind="embedding", embedding=options)
    assert report.dropped == {"no right answer that differs from the anchor": 1, "an anchor without text": 1}
    assert report.cut == 1 and Store(tmp_path / "out").lengths().max() == 9
    assert Store(tmp_path / "out").document(2)[-1] == tokenizer.eos_id


def test_a_function_of_the_users(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "def there_and_back(texts):\n    return [text.upper() for text in texts]\n\nbad = lambda texts: texts[1:]\n"
    )
    monkeypatch.chdir(tmp_path)
    options = EmbeddingOptions(augment="mine_for_test:there_and_back")
    lines: list[dict[str, object]] = [{"text": f"deposit {i}"} for i in range(3)] + [{"query": "q", "pos": ["p"]}]
    prepare([write(tmp_path, lines)], tokenizer, tmp_path / "out", kind="embedding", embedding=options)
    store = Store(tmp_path / "out")
    texts = [tokenizer.decode(store.document(i), skip_special=True) for i in range(len(store))]
    assert texts == ["deposit 0", "DEPOSIT 0", "deposit 1", "DEPOSIT 1", "deposit 2", "DEPOSIT 2", "q", "p"]
    with pytest.raises(MoaiError, match="of 2 texts it made 1, which must be as many"):
        Augmenter("mine_for_test:bad")([Related("a"), Related("b")])
    for name, message in (
        ("nothing_there:f", "No module"),
        ("mine_for_test:f", "no function 'f'"),
        ("f", "module:func"),
    ):
        with pytest.raises(MoaiError, match=message):
            EmbeddingOptions(augment=name)


def test_rows_are_a_pure_function_of_their_number(store: Store) -> None:
    together = EmbeddingLoader(store, 96, seed=3).rows(5, 12)
    apart = [EmbeddingLoader(store, 96, seed=3).rows(5 + i, 1) for i in range(12)]
    assert all(torch.equal(together[key], torch.cat([row[key] for row in apart])) for key in together)
    assert not torch.equal(together["record"], EmbeddingLoader(store, 96, seed=4).rows(5, 12)["record"])  # control
    steps = EmbeddingLoader(store, 96, seed=3, step_rows=4)
    whole, ranks = steps.step(2), [steps.step(2, rank, 2) for rank in range(2)]
    assert torch.equal(whole["input_ids"][::2], ranks[0]["input_ids"])
    assert torch.equal(whole["text"][1::2], ranks[1]["text"])


@pytest.mark.parametrize("packing", ["best-fit", "next-fit", "none", "balanced"])
def test_an_epoch_holds_every_record_once_and_whole(store: Store, packing: str) -> None:
    loader, groups, seen = EmbeddingLoader(store, 96, packing=packing, step_rows=2), read_groups(store), list[int]()
    known: dict[int, tuple[int, ...]] = {}
    for i in range(len(loader)):
        row = {key: tensor.numpy() for key, tensor in loader.row(i).items()}
        for k in np.flatnonzero(row["role"]).tolist():
            here = row["seq_idx"] == k
            record = int(row["record"][k])
            seen += [record] * int(row["role"][k] == ANCHOR)
            document = groups.first[record] + k - int(np.flatnonzero(row["record"] == record)[0])
            ids = store.document(document)
            assert np.array_equal(row["input_ids"][here], ids) and row["role"][k] == groups.role[document]
            assert np.array_equal(row["position_ids"][here], np.arange(len(ids)))
            assert known.setdefault(int(row["text"][k]), tuple(ids)) == tuple(ids)  # equal where texts are
        padding = row["seq_idx"] == loader.most
        assert (row["input_ids"][padding] == loader.pad_id).all()
        assert (row["record"][row["role"] == 0] == -1).all()
    assert sorted(seen) == list(range(40)) and len(known) == len({tuple(store.document(i)) for i in range(len(store))})


def test_records_longer_than_a_row(store: Store, tokenizer: Tokenizer) -> None:
    lengths = np.add.reduceat(store.lengths(), read_groups(store).first[:-1])
    size = int(np.quantile(lengths, 0.6))
    loader = EmbeddingLoader(store, size)
    assert f"{(lengths > size).sum()} of 40 records are cut" in loader.packing.summary()
    for i in range(len(loader)):
        row = loader.row(i)
        for k in torch.nonzero(row["role"])[:, 0].tolist():
            assert row["input_ids"][row["seq_idx"] == k][-1] == tokenizer.eos_id  # the end stays what it is
    dropped = EmbeddingLoader(store, size, overlong="drop")
    assert dropped.packing.dropped_documents == (lengths > size).sum()
    with pytest.raises(MoaiError, match="no record fits into a row of 3 tokens: raise data.seq_len"):
        EmbeddingLoader(store, 3)


@pytest.mark.parametrize("augment", ["twins", "crop", "delete"])
def test_texts_that_stand_alone(tmp_path: Path, tokenizer: Tokenizer, augment: str) -> None:
    lines: list[dict[str, object]] = [{"text": f"The deposit {i} earns interest every year."} for i in range(12)]
    prepare([write(tmp_path, lines)], tokenizer, tmp_path / "alone", kind="embedding")
    store = Store(tmp_path / "alone")
    with pytest.raises(MoaiError, match="12 of 12 records hold no right answer: .*embedding.augment=crop"):
        EmbeddingLoader(store, 64)
    loader = EmbeddingLoader(store, 64, augment=augment)  # type: ignore[arg-type]
    batch, later = loader.rows(0, len(loader)), loader.rows(len(loader), len(loader))
    assert (batch["role"] == ANCHOR).sum() == (batch["role"] == RIGHT).sum() == 12
    assert torch.equal(batch["input_ids"], loader.rows(0, len(loader))["input_ids"])

    def texts(of: dict[str, torch.Tensor]) -> dict[int, list[list[int]]]:
        found: dict[int, list[list[int]]] = {}
        for row, k in torch.nonzero(of["role"]).tolist():
            ids = of["input_ids"][row][of["seq_idx"][row] == k].tolist()
            found.setdefault(int(of["record"][row, k]), []).append(ids)
        return found

    first, second = texts(batch), texts(later)
    for record, (one, other) in first.items():
        whole = store.document(record).tolist()
        assert (one == other == whole) == (augment == "twins")
        assert one[-1] == other[-1] == tokenizer.eos_id and set(one) <= set(whole)
        assert augment != "crop" or " ".join(map(str, one[:-1])) in " ".join(map(str, whole))
    assert (first == second) == (augment == "twins")  # each pass makes others


def test_shares_of_views() -> None:
    ids = np.arange(1000)
    sizes = [len(view(ids, "crop", 0.3, np.random.default_rng(i))) for i in range(200)]
    assert min(sizes) >= 300 and max(sizes) <= 1000 and np.mean(sizes) == pytest.approx(650, rel=0.1)
    kept = [len(view(ids, "delete", 0.2, np.random.default_rng(i))) for i in range(50)]
    assert np.mean(kept) == pytest.approx(800, rel=0.03)
    assert len(view(np.arange(1), "delete", 0.99, np.random.default_rng(0))) == 1
    assert len(view(np.arange(0), "crop", None, np.random.default_rng(0))) == 0


def test_stores_that_do_not_fit(store: Store, tmp_path: Path, tokenizer: Tokenizer, text_file: Path) -> None:
    prepare([text_file], tokenizer, tmp_path / "text")
    with pytest.raises(MoaiError, match="holds text, not texts that belong together"):
        EmbeddingLoader(Store(tmp_path / "text"), 64)
    with pytest.raises(MoaiError, match="train on it with loss.type=info_nce"):
        Loader(store, 64)
    with pytest.raises(MoaiError, match="would cut texts that belong together apart"):
        EmbeddingLoader(store, 64, packing="concat")
    with pytest.raises(MoaiError, match="can only be merged with each other"):
        merge(make_spec([str(tmp_path / "text"), str(store.path)], None, None, None), tmp_path / "merged")
