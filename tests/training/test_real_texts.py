"""Vectors learned from real questions and answers find held-out answers: the commands of docs/embedding.md."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.commands.conftest import Moai, moai  # noqa: F401
from tests.conftest import shared_data

SIZE = ("model.num_hidden_layers=1", "model.hidden_size=256", "model.intermediate_size=512", "data.seq_len=128",
        "embedding.dropout=0.3", "train.batch_tokens=4096")  # fmt: skip


@pytest.mark.slow
def test_training_finds_more_than_new_weights_do(tmp_path: Path, moai: Moai) -> None:  # noqa: F811
    with shared_data("ko/ChatbotData.csv").open(encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    for name, kept in (("held", rows[::20]), ("rest", [row for i, row in enumerate(rows) if i % 20])):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *kept])
    moai("tokenizer", "train", tmp_path / "rest.csv", "--map", "text=Q", "--vocab-size", 4000, "--out", tmp_path / "t")
    moai(
        "data", "prepare", tmp_path / "rest.csv", "--embedding", "--tokenizer", tmp_path / "t", "--out", tmp_path / "s"
    )
    for out, length in (("untrained", ("train.steps=1", "optim.lr=0")), ("vectors", ("train.epochs=7",))):
        moai("train", "moai-embed-0.1b-tiny", f"data.train={tmp_path / 's'}", *SIZE, *length,
             f"train.out={tmp_path / out}", "train.device=cpu")  # fmt: skip
    moai("eval", "retrieval", tmp_path / "vectors", tmp_path / "held.csv", "--beside", tmp_path / "untrained",
         "--tfidf", "--json", tmp_path / "found.json", "--device", "cpu")  # fmt: skip
    trained, untrained, spelling = json.loads((tmp_path / "found.json").read_text()).values()
    assert trained["mrr"] > 3 * untrained["mrr"] and trained["recall"]["10"] > 3 * untrained["recall"]["10"]
    assert trained["recall"]["10"] > spelling["recall"]["10"]  # TF-IDF
    assert trained["recall"]["10"] > 10 * trained["chance"]["10"]
