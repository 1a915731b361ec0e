"""Tiny models of ids without text, and what they say without any cache."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moai_llm.inference import Sampling, TextModel
from tests.conftest import tiny_model

SIZE = 61
KINDS: dict[str, dict[str, Any]] = {
    "attention": {},
    "sliding": {"mixer": "sliding_attention"},
    "mamba": {"mixer": "linear_attention"},
    "mamba alone": {"mixer": "linear_attention", "mlp": "none", "ssm_norm": True},
    "sparse": {"mlp": "sparse"},
    "hybrid": {"num_hidden_layers": 3, "mlp": "sparse",
               "layer_types": ["linear_attention", "full_attention", "sliding_attention"]},
    "learned": {"position_embedding": "learned", "norm_type": "layer_norm", "mlp_gated": False, "hidden_act": "gelu"},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
                "max_position_embeddings": 20},
}  # fmt: skip


def ids_model(kind: str = "attention", seed: int = 0, stops: list[int] | None = None) -> TextModel:
    """A model in fp64 whose "text" of token i is a letter."""
    tokenizer: Any = SimpleNamespace(
        vocab_size=SIZE, stop_ids=stops or [], token_bytes=lambda i: bytes([65 + i % 26]), fingerprint="same"
    )
    return TextModel(tiny_model(seed=seed, **KINDS[kind]), tokenizer, Path("here"))


def alone(text_model: TextModel, prompt: list[int], count: int) -> list[int]:
    """Greedy, the whole sequence computed again for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            inputs = torch.tensor([ids])
            logits = text_model.model(inputs, use_cache=False, rope_length=len(prompt) + count).logits
        ids.append(int(logits[0, -1, :SIZE].argmax()))
    return ids[len(prompt) :]


def greedy(count: int) -> Sampling:
    return Sampling(count, temperature=0)
