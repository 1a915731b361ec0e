"""Texts to vectors: the same alone and among others, of any length; hard negatives; what the commands say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moai_llm.data.embedding_records import Related
from moai_llm.inference.embed import Embedder, embed, load_embedder
from moai_llm.inference.load import load_model
from moai_llm.inference.mine import mine
from moai_llm.modeling.embedding import MoaiForEmbedding
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from tests.commands.conftest import Moai, fails, moai  # noqa: F401
from tests.conftest import tiny_config, tiny_model

TEXTS = [
    "interest",
    "The bank pays interest on a deposit every year.",
    "",
    "은행 이자가 붙어요. " * 9,
    "a b",
    "銀行の利息",
]


def make_embedder(folder: Path, tokenizer: Tokenizer, mixer: str = "full_attention", **embedding: object) -> Path:
    torch.manual_seed(0)
    config = tiny_config(mixer, vocab_size=512, embedding=embedding, max_position_embeddings=64)
    model = MoaiForEmbedding(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return make_embedder(tmp_path_factory.mktemp("vectors") / "model", tokenizer)


@pytest.fixture
def embedder(path: Path) -> Embedder:
    return load_embedder(path, "cpu", "fp32")


@pytest.mark.parametrize("mixer", ["full_attention", "linear_attention"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_vector_does_not_depend_on_its_neighbours(
    tmp_path: Path, tokenizer: Tokenizer, mixer: str, pooling: str
) -> None:
    embedder = load_embedder(make_embedder(tmp_path, tokenizer, mixer, pooling=pooling, projection=12), "cpu", "fp32")
    done: list[int] = []
    together = embed(embedder, TEXTS, batch_tokens=80, progress=done.append)
    assert together.shape == (6, 12) and together.dtype == np.float32 and sum(done) == 6 and len(done) > 1
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, together):
        assert np.allclose(embed(embedder, [text])[0], vector, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2  # control: texts differ


def test_long_texts_lose_their_end(embedder: Embedder, tokenizer: Tokenizer) -> None:
    long, ids = "deposit " * 100, embedder.encode(["deposit " * 100, "a"], 9)
    assert len(ids[0]) == 9 and ids[0][-1] == ids[1][-1] == tokenizer.eos_id
    assert np.allclose(
        embed(embedder, [long], max_length=9), embed(embedder, [tokenizer.decode(ids[0][:-1])]), atol=1e-6
    )
    assert len(embedder.encode([long * 9])[0]) == 64  # what the model was made for
    assert embed(embedder, []).shape == (0, 32)


def test_language_models(tmp_path: Path, tokenizer: Tokenizer, path: Path) -> None:
    model = tiny_model(vocab_size=512).float()
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    embedder = load_embedder(tmp_path, "cpu", "fp32")
    assert not embedder.trained
    ids = torch.tensor([embedder.encode(["interest"])[0]])
    mean = model.model(ids).last_hidden_state[0].mean(0)
    assert np.allclose(embed(embedder, ["interest"])[0], (mean / mean.norm()).detach().numpy(), atol=1e-6)
    with pytest.raises(MoaiError, match="makes vectors of texts and writes none: use `moai embed`"):
        load_model(path)


def test_hard_negatives(embedder: Embedder) -> None:
    records = [Related(f"question {i} of {i % 3}", (f"answer {i // 2}",)) for i in range(12)]
    records += [Related("question 0 of 0", ("another answer",), ("a wrong one",)), Related("alone")]
    mined = list(mine(embedder, records, count=3, margin=-2.0))
    assert mined == list(mine(embedder, records, count=3, margin=-2.0)) and len(mined) == 13  # deterministic
    texts = sorted({text for r in records for text in (*r.right, *r.wrong)})
    known = dict(zip(texts, embed(embedder, texts)))
    same = {f"answer {i}": {f"answer {i}"} for i in range(6)} | {"another answer": {"answer 0", "another answer"}}
    same["answer 0"] = {"answer 0", "another answer"}  # by the question that both belong to
    for before, after in zip(records, mined):
        anchor, new = embed(embedder, [before.anchor])[0], after.wrong[len(before.wrong) :]
        allowed = [t for t in texts if t not in same[before.right[0]] and t not in before.wrong]
        best = sorted(allowed, key=lambda t: -float(known[t] @ anchor))[:3]
        assert [float(known[t] @ anchor) for t in new] == pytest.approx(
            [float(known[t] @ anchor) for t in best], abs=1e-5
        )
        assert after.right == before.right and not set(new) & same[before.right[0]]
    strict = list(mine(embedder, records, count=12, margin=0.0))
    for before, after in zip(records, strict):
        anchor = embed(embedder, [before.anchor])[0]
        limit = max(float(known[t] @ anchor) for t in before.right)
        assert all(float(known[t] @ anchor) <= limit + 1e-5 for t in after.wrong[len(before.wrong) :])
    assert sum(len(r.wrong) for r in strict) < sum(len(r.wrong) for r in mine(embedder, records, count=12, margin=-2.0))


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Texts of several lengths, for some ten batches of 64 tokens."""
    file = tmp_path / "many.jsonl"
    texts = [f"{i} " + "deposit interest " * (i % 7) for i in range(40)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


class Killed(BaseException):
    pass


def kill_at(batch: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that goes through a model, until one is never computed."""
    seen: list[int] = []
    real = MoaiForEmbedding.forward

    def forward(self: MoaiForEmbedding, ids: torch.Tensor, **options: object) -> object:
        if len(seen) == batch:
            raise Killed
        seen.append(len(ids))
        return real(self, ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(MoaiForEmbedding, "forward", forward)
    return seen


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    suffix: str,
    path: Path,
    many: Path,
    tmp_path: Path,
    moai: Moai,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr("moai_llm.inference.embed.BATCH_TOKENS", 64)
    whole, broken = tmp_path / f"whole.{suffix}", tmp_path / f"broken.{suffix}"
    partial = tmp_path / f"broken.{suffix}.partial"
    common = ("--device", "cpu", "--dtype", "fp32")
    with monkeypatch.context() as patch:
        rows = kill_at(-1, patch)
        moai("embed", path, many, "--out", whole, *common)
    assert len(rows) > 8 and sum(rows) == 40 and not whole.with_name(whole.name + ".partial").exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(5, patch)
        moai("embed", path, many, "--out", broken, *common)
    assert partial.exists() and not broken.exists()
    with partial.open("r+b") as file:  # in the middle of writing the last batch
        file.truncate(partial.stat().st_size - 7)
    with monkeypatch.context() as patch:
        again = kill_at(-1, patch)
        said = moai("embed", path, many, "--out", broken, *common)
    assert f"{sum(rows[:5]) - 1} of 40 texts are done" in said
    assert again == rows[4:]  # the cut batch is computed again, whole
    assert broken.read_bytes() == whole.read_bytes() and not partial.exists()


def test_the_beginning_of_something_else_is_refused(
    path: Path, many: Path, tmp_path: Path, tokenizer: Tokenizer, moai: Moai, fails: Moai,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("moai_llm.inference.embed.BATCH_TOKENS", 64)
    out, common = tmp_path / "v.npy", ("--device", "cpu", "--dtype", "fp32")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(2, patch)
        moai("embed", path, many, "--out", out, *common)
    partial = tmp_path / "v.npy.partial"
    before = partial.read_bytes()
    other = make_embedder(tmp_path / "other", tokenizer, pooling="last")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(many.read_text().splitlines(keepends=True)[:-1]))
    for arguments, what in (
        ((other, many, *common), "another model"),
        ((path, fewer, *common), "other texts"),
        ((path, many, *common, "--max-length", 9), "another --max-length"),
        ((path, many, "--device", "cpu", "--dtype", "bf16"), "another --dtype"),
    ):
        said = fails("embed", *arguments, "--out", out)
        assert f"is the beginning of a run with {what}: repeat that one to go on, or add --overwrite" in said
        assert partial.read_bytes() == before
    partial.write_bytes(b"no header\n")
    assert "is the beginning of a run with another model" in fails("embed", path, many, "--out", out, *common)
    partial.write_bytes(before[:9])  # killed while it was begun
    moai("embed", path, many, "--out", out, *common)
    partial.write_bytes(before)
    moai("embed", other, many, "--out", out, *common, "--overwrite")
    moai("embed", other, many, "--out", tmp_path / "w.npy", *common)
    assert out.read_bytes() == (tmp_path / "w.npy").read_bytes() and not partial.exists()


def test_the_commands(path: Path, tmp_path: Path, moai: Moai, fails: Moai) -> None:  # noqa: F811
    lines = [{"question": f"deposit {i}?", "answer": f"Paid: {i}.", "score": i / 10} for i in range(8)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ("--device", "cpu", "--dtype", "fp32")
    said = moai("embed", path, file, "--map", "text=question", "--out", tmp_path / "v.npy", *common)
    assert "8 vectors of 32 numbers" in said
    vectors = np.load(tmp_path / "v.npy")
    for suffix in ("jsonl", "parquet"):
        moai("embed", path, file, "--map", "text=question", "--out", tmp_path / f"v.{suffix}", *common)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert rows[3]["text"] == "deposit 3?" and rows[3]["source"].endswith("pairs.jsonl:4")
    assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), vectors)
    pq = pytest.importorskip("pyarrow.parquet")
    assert np.array_equal(np.array(pq.read_table(tmp_path / "v.parquet")["vector"].to_pylist(), np.float32), vectors)
    assert "exists already" in fails("embed", path, file, "--map", "text=question", "--out", tmp_path / "v.npy")
    assert "vectors are written as .npy, .jsonl, .parquet" in fails("embed", path, file, "--out", tmp_path / "v.txt")
    said = moai("eval", "retrieval", path, file, "--tfidf", "--json", tmp_path / "r.json", *common)
    assert "8 queries, 8 documents" in said and "TF-IDF" in said and "chance" in said
    assert set(json.loads((tmp_path / "r.json").read_text())) == {str(path), "TF-IDF"}
    assert "8 pairs" in (said := moai("eval", "sts", path, file, "--beside", path, *common)) and "Spearman" in said
    said = moai(
        "data", "mine", file, "--model", path, "--out", tmp_path / "m.jsonl", "--count", 2, "--margin", -2, *common
    )
    assert "8 records, 16 wrong answers added" in said
    assert len(json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])["negative"]) == 2
    moai("data", "prepare", tmp_path / "m.jsonl", "--embedding", "--tokenizer", path, "--out", tmp_path / "store")
    said = moai("data", "show", tmp_path / "store", 3)
    assert "anchor: " in said and "right, grade 0.30" in said and "wrong: " in said
    assert "records cut" in moai("data", "info", tmp_path / "store")
    assert "it makes vectors of texts" in moai("doctor", path, "--device", "cpu")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n')
    for arguments, message in (
        (("eval", "sts", path, tmp_path / "t.jsonl"), "fewer than two pairs have a grade"),
        (("eval", "retrieval", path, tmp_path / "t.jsonl"), "none of the records has a right answer"),
        (("data", "mine", tmp_path / "t.jsonl", "--model", path, "--out", tmp_path / "x.jsonl"), "none of the records"),
        (("embed", path, file, "--out", tmp_path / "w.npy", "--max-length", 1), "a text has two tokens at least"),
        (
            ("data", "prepare", file, "--embedding", "--learn", "last", "--tokenizer", path, "--out", "x"),
            "--learn is for",
        ),
        (("data", "prepare", file, "--score-max", 5, "--tokenizer", path, "--out", "x"), "nothing without --embedding"),
    ):
        assert message in fails(*arguments)
