"""Source code in a store: fill in the middle and chunks, only where the language is known, the same each time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moai_llm.data.blocks import BATCH
from moai_llm.data.code import CodeOptions
from moai_llm.data.prepare import Part, Report, prepare, prepare_texts
from moai_llm.data.shards import Store
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.fim import FIM_TOKENS, Fim
from moai_llm.tokenizer.syntax_python import parses
from moai_llm.tokenizer.train import SPECIAL_TOKENS, train_tokenizer

SOURCE = """def add(a, b):
    total = a + b
    return total


class Sum:
    def of(self, a):
        return add(a, 1)
"""


@pytest.fixture(scope="module")
def filling() -> Tokenizer:
    return train_tokenizer([SOURCE * 20], 340, special_tokens=(*SPECIAL_TOKENS, *FIM_TOKENS), fewer=True)


def texts(count: int) -> list[tuple[str, str]]:
    """Code and prose in turn."""
    return [
        (SOURCE + f"\nx = {i}\n", f"lib/{i}.py") if i % 2 else (f"Prose {i}.", f"a.jsonl:{i}") for i in range(count)
    ]


def store(
    tmp_path: Path, tokenizer: Tokenizer, items: list[tuple[str, str]], code: CodeOptions
) -> tuple[Store, Report]:
    report = prepare_texts(items, tokenizer, tmp_path / "store", [], code=code, overwrite=True)
    return Store(tmp_path / "store"), report


def test_only_code_is_rearranged(tmp_path: Path, filling: Tokenizer) -> None:
    items = texts(2 * BATCH + 20)
    made, report = store(tmp_path, filling, items, CodeOptions(Fim(0.5)))
    assert report.read == len(made) == len(items) and report.code == len(items) // 2
    assert 0.4 < report.filled / report.code < 0.6
    prefix, filled = filling.special_ids["<|fim_prefix|>"], 0
    for i, (text, _) in enumerate(items):
        ids = made.document(i).tolist()
        if i % 2 == 0 or ids[0] != prefix:
            assert ids == [*filling.encode(text), filling.eos_id]
        else:
            filled += 1
            assert sorted(filling.decode(ids, skip_special=True)) == sorted(text)
            assert ids[-1] == filling.eos_id and ids.count(filling.eos_id) == 1
    assert filled == report.filled
    again, _ = store(tmp_path, filling, items, CodeOptions(Fim(0.5)))
    assert all((made.document(i) == again.document(i)).all() for i in range(len(made)))
    other, _ = store(tmp_path, filling, items, CodeOptions(Fim(0.5, seed=1)))
    assert any(other.document(i).tolist() != made.document(i).tolist() for i in range(len(made)))


def test_a_named_language_covers_records_without_a_suffix(tmp_path: Path, filling: Tokenizer) -> None:
    items = [(SOURCE, f"code.parquet: row {i}") for i in range(20)]
    assert store(tmp_path, filling, items, CodeOptions(Fim(1.0)))[1].filled == 0
    assert store(tmp_path, filling, items, CodeOptions(Fim(1.0), language="python"))[1].filled == 20


def test_chunks_are_documents_and_only_the_last_ends_the_text(tmp_path: Path, filling: Tokenizer) -> None:
    long = "".join(SOURCE.replace("add", f"add{i}") + "\n\n" for i in range(20))
    made, report = store(tmp_path, filling, [(long, "a.py"), ("prose " * 200, "a.txt")], CodeOptions(chunk=60))
    documents = [made.document(i).tolist() for i in range(len(made))]
    *pieces, prose = documents
    assert report.read == 2 and report.code == len(pieces) > 10 and len(prose) > 60
    assert max(map(len, pieces)) <= 60
    assert [ids[-1] == filling.eos_id for ids in documents] == [False] * (len(pieces) - 1) + [True, True]
    assert filling.decode([i for ids in pieces for i in ids], skip_special=True) == long
    assert all(parses(filling.decode(ids, skip_special=True)) for ids in pieces)


def test_chunks_that_are_rearranged(tmp_path: Path, filling: Tokenizer) -> None:
    long = "".join(SOURCE.replace("add", f"add{i}") + "\n\n" for i in range(20))
    made, report = store(tmp_path, filling, [(long, "a.py")], CodeOptions(Fim(0.5), chunk=60))
    ends = [made.document(i).tolist()[-1] == filling.eos_id for i in range(len(made))]
    starts = [made.document(i).tolist()[0] == filling.special_ids["<|fim_prefix|>"] for i in range(len(made))]
    assert max(made.lengths()) <= 60
    assert sum(starts) == report.filled and 0 < report.filled < len(made)
    assert ends == [*starts[:-1], True]
    assert made.manifest.text_bytes == len(long.encode())


def test_what_is_held_out_is_not_rearranged(tmp_path: Path, filling: Tokenizer) -> None:
    (tmp_path / "lib").mkdir()
    for i in range(60):
        (tmp_path / "lib" / f"{i:02}.py").write_text(SOURCE + f"x = {i}\n")
    parts: list[tuple[Part | None, int, int]] = [("valid", 3, 0), ("train", 57, 57), (None, 60, 60)]
    for part, documents, filled in parts:
        out, options = tmp_path / str(part), CodeOptions(Fim(1.0))
        report = prepare([tmp_path / "lib"], filling, out, part=part, valid_share=0.05, code=options)
        assert (report.code, report.filled) == (documents, filled)


def test_mistakes(tmp_path: Path, tokenizer: Tokenizer, filling: Tokenizer) -> None:
    items = [(SOURCE, "a.py")]
    for used, options, message in (
        (tokenizer, CodeOptions(Fim(0.5)), r"has no <\|fim_prefix\|>"),
        (filling, CodeOptions(chunk=3), "at least 16 tokens, got 3"),
        (filling, CodeOptions(language="pyhton"), r"did you mean 'python'"),
    ):
        with pytest.raises(MoaiError, match=message):
            store(tmp_path, used, items, options)
        assert not list(tmp_path.iterdir())
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"Q": "a", "A": "b"}) + "\n")
    with pytest.raises(MoaiError, match="not for conversations"):
        prepare([file], filling, tmp_path / "x", kind="chat", code=CodeOptions(Fim(0.5)))
