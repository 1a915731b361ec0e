"""trl's trainers take our model and tokenizer as they are: what they train is what any transformers model would be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.tokenizer import Tokenizer
from tests.conftest import tiny_config

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]  # of trl and accelerate themselves

COMMON: dict[str, Any] = {
    "max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
    "gradient_checkpointing": False, "max_length": 96,
}  # fmt: skip


@pytest.fixture
def trl() -> Any:
    pytest.importorskip("datasets")
    return pytest.importorskip("trl", reason="needs trl: pip install 'moai-llm[bench]'")


def dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


@pytest.fixture
def saved(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A model directory as training leaves one: attention, Mamba and experts."""
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.eos_id}
    fields = tiny_config(vocab_size=512).to_dict()
    changed = {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"], **ids}
    model = MoaiForCausalLM(MoaiConfig(**{**fields, **changed}))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("packing", [False, True])
def test_sft(trl: Any, saved: Path, tmp_path: Path, packing: bool) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"deposit {i % 3}?"}, {"role": "assistant", "content": "Paid."}]}
        for i in range(48)
    ]
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(saved),
        processing_class=AutoTokenizer.from_pretrained(saved),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), packing=packing, **COMMON),
        train_dataset=dataset(rows),
    )
    found = losses(trainer)
    assert isinstance(trainer.model, MoaiForCausalLM)
    assert abs(found[0] - math.log(512)) < 1.0 and found[-1] < found[0] - 1


def test_dpo(trl: Any, saved: Path, tmp_path: Path) -> None:
    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    rows = [
        {"prompt": said("user", f"deposit {i % 3}?"), "chosen": said("assistant", "Paid."),
         "rejected": said("assistant", "lazy dog")}
        for i in range(48)
    ]  # fmt: skip
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(saved),
        processing_class=AutoTokenizer.from_pretrained(saved),
        args=trl.DPOConfig(output_dir=str(tmp_path / "out"), **COMMON),
        train_dataset=dataset(rows),
    )
    found = losses(trainer)
    assert abs(found[0] - math.log(2)) < 0.02 and found[-1] < 0.3
