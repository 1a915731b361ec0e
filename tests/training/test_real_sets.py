"""Fine-tuning and preference training on real sets, by the commands: the loss on held-out rows falls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moai_llm.cli import main
from moai_llm.data.sources import read_records
from moai_llm.tokenizer.train import train_tokenizer
from moai_llm.training.events import read_metrics
from tests.conftest import shared_data

SMALL = [
    "model.hidden_size=128", "model.intermediate_size=320", "model.head_dim=16", "model.max_position_embeddings=2048",
    "train.batch_tokens=4096", "train.micro_batch_size=4", "train.device=cpu", "eval.every=10", "log.every=1",
]  # fmt: skip


def evaluations(out: Path, key: str = "eval_loss") -> list[float]:
    return [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]


@pytest.mark.slow
def test_answers_and_then_preferences_are_learned(tmp_path: Path) -> None:
    alpaca, korean = shared_data("sft/alpaca_en_demo.json"), shared_data("ko/ChatbotData.csv")
    preferences = shared_data("sft/dpo_en_demo.json")
    rows = [record.columns for record in read_records([alpaca, korean])]
    texts = [f"{row.get('instruction', row.get('Q'))}\n{row.get('output', row.get('A'))}" for row in rows]
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(texts, 2048).save(tokenizer)
    chats, pairs = ([str(tmp_path / f"{kind}{part}") for part in ("", "-valid")] for kind in ("chats", "pairs"))
    main(["data", "prepare", str(alpaca), str(korean), "--chat", "--tokenizer", str(tokenizer), "--out", chats[0],
          "--valid", chats[1]])  # fmt: skip
    main(["data", "prepare", str(preferences), "--preference", "--tokenizer", str(tokenizer), "--out", pairs[0],
          "--valid", pairs[1], "--valid-share", "0.25", "--max-length", "1000"])  # fmt: skip

    main(["train", "quickstart", f"data.train={chats[0]}", f"data.valid={chats[1]}", "data.seq_len=256",
          "train.steps=60", f"train.out={tmp_path / 'sft'}", *SMALL])  # fmt: skip
    answers = evaluations(tmp_path / "sft")
    assert answers[-1] < answers[0] - 0.5 and answers[-1] < math.log(2048) - 2

    main(["train", "quickstart", f"data.train={pairs[0]}", f"data.valid={pairs[1]}", f"train.out={tmp_path / 'dpo'}",
          f"train.init_from={tmp_path / 'sft'}", "loss.type=dpo", "loss.params.beta=0.03", "data.seq_len=2000",
          "train.steps=30", "optim.lr=2e-4", "eval.rows=null", *SMALL[4:]])  # fmt: skip
    steps = [row for row in read_metrics(tmp_path / "dpo" / "metrics.jsonl") if "loss" in row]
    losses, accuracy = (evaluations(tmp_path / "dpo", key) for key in ("eval_loss", "eval_reward_accuracy"))
    print(json.dumps({"answers": answers, "pairs": losses, "accuracy": accuracy}))
    assert math.isclose(steps[0]["loss"], math.log(2), abs_tol=1e-4)
    assert losses[-1] < math.log(2) - 0.05 and accuracy[-1] > 0.6
