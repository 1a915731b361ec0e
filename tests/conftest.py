"""Shared pieces of the suite: small models of every pair of bricks, a tokenizer, and memory that shows when it is
read too early.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.train import train_tokenizer

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)  # the suite runs in parallel processes

TOKEN_MIXERS = ("full_attention", "sliding_attention", "linear_attention")
CHANNEL_MIXERS = ("dense", "sparse", "none")
PAIRS = list(itertools.product(TOKEN_MIXERS, CHANNEL_MIXERS))


def shared_data(name: str) -> Path:
    """A file of the shared data sets; the test is skipped where they are not there."""
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"needs the data set {name}, which is not part of the repository")
    return path


def tiny_config(mixer: str = "full_attention", mlp: str = "dense", **changes: object) -> MoaiConfig:
    """Two layers of one pair of bricks."""
    fields: dict[str, object] = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "layer_types": [mixer], "mlp_layer_types": [mlp], "sliding_window": 5,
        "num_experts": 4, "moe_intermediate_size": 24, "max_position_embeddings": 128, "ssm_state_size": 5,
    }  # fmt: skip
    return MoaiConfig(**{**fields, **changes})


def tiny_model(mixer: str = "full_attention", mlp: str = "dense", seed: int = 0, **changes: object) -> MoaiForCausalLM:
    """A model in fp64, whose weights are large enough that a leak shows."""
    torch.manual_seed(seed)
    model = MoaiForCausalLM(tiny_config(mixer, mlp, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """512 tokens learned from a few sentences in four languages and some code."""
    texts = [
        "The quick brown fox jumps over the lazy dog. Interest is paid on the deposit. " * 8,
        "복리는 이자에 이자가 붙는 방식이에요. 예금과 적금은 은행에서 가입할 수 있어요. " * 8,
        "日本の首都は東京です。銀行の利子は毎年少しずつ変わります。" * 8,
        "中国的首都是北京。银行存款的利息每年都会变化。" * 8,
        "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n" * 8,
    ]
    return train_tokenizer(texts, 512, fewer=True)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Forty short documents as JSON lines."""
    file = tmp_path / "text.jsonl"
    lines = [
        {"text": f"Document {i} says that interest on deposit {i} is paid. 이자는 {i}번 붙어요. " * (1 + i % 5)}
        for i in range(40)
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def poisoned_memory():  # type: ignore[no-untyped-def]
    """Fresh tensors are filled with NaN where torch is asked to be deterministic, so that reading them too early
    shows.
    """
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
