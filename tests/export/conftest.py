"""Tiny models of every kind that can leave, written as directories with a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from moai_llm.config import MoaiConfig
from moai_llm.export.vocabulary import vocabulary
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.byte_level import build_bpe
from tests.conftest import tiny_config

PLAIN = {"use_qk_norm": False, "num_hidden_layers": 3}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "position_embedding": "none", "use_qk_norm": False,
          "norm_topk_prob": False, "moe_intermediate_size": 48}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
# name -> (fields, class of transformers, llama.cpp's architecture; None: it has none)
KINDS: dict[str, tuple[dict[str, object], str, str | None]] = {
    "qwen3": ({"tie_word_embeddings": True, "num_key_value_heads": 1}, "Qwen3ForCausalLM", "qwen3"),
    "qwen3, yarn": ({"rope_parameters": YARN}, "Qwen3ForCausalLM", "qwen3"),
    "qwen3, linear": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "head_dim": 12}, "Qwen3ForCausalLM", "qwen3"
    ),
    "qwen3, window": ({"layer_types": ["full_attention", "sliding_attention"]}, "Qwen3ForCausalLM", None),
    "qwen3_moe": ({"mlp_layer_types": ["sparse"]}, "Qwen3MoeForCausalLM", "qwen3moe"),
    "qwen3_moe, dense too": ({"mlp_layer_types": ["dense", "sparse"]}, "Qwen3MoeForCausalLM", "hy_v3"),
    "qwen3_moe, plain weights": (
        {"mlp_layer_types": ["sparse"], "norm_topk_prob": False}, "Qwen3MoeForCausalLM", "hy_v3"
    ),
    "llama": ({**PLAIN, "attention_bias": True}, "LlamaForCausalLM", "llama"),
    "llama, llama3": ({**PLAIN, "rope_parameters": LLAMA3, "num_key_value_heads": 4}, "LlamaForCausalLM", "llama"),
    "mistral": ({**PLAIN, "layer_types": ["sliding_attention"]}, "MistralForCausalLM", None),
    "mixtral": ({**PLAIN, "mlp_layer_types": ["sparse"]}, "MixtralForCausalLM", "llama"),
    "mamba": (
        {"layer_types": ["linear_attention"], "mlp_layer_types": ["none"], "conv_bias": False},
        "MambaForCausalLM", "mamba",
    ),
    "jamba": ({**HYBRID, "mlp_layer_types": ["dense", "sparse"]}, "JambaForCausalLM", "jamba"),
    "jamba, no attention": (
        {"layer_types": ["linear_attention"], "mlp_layer_types": ["dense"], "num_hidden_layers": 3},
        "JambaForCausalLM", "jamba",
    ),
}  # fmt: skip
IN_LLAMA_CPP = [name for name, (_, _, architecture) in KINDS.items() if architecture]


def random_model(config: MoaiConfig, seed: int = 0) -> MoaiForCausalLM:
    """Weights that are large enough for the most likely token to be a clear one."""
    torch.manual_seed(seed)
    model = MoaiForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "D", "dt_bias", "norm.weight")):
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.1)
    return model


def save(config: MoaiConfig, tokenizer: Tokenizer, folder: Path) -> Path:
    """A model directory; its vocabulary is padded, as training pads it."""
    fields = {**config.to_dict(), "vocab_size": tokenizer.padded_vocab_size + 128}
    random_model(MoaiConfig(**fields)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def made(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """A model directory of a name of KINDS, or of fields of its own."""

    def make(kind: str = "qwen3", **changes: object) -> Path:
        return save(tiny_config(**{**KINDS[kind][0], **changes}), tokenizer, tmp_path / "made")

    return make


def split_by(pattern: str, tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    """The same merges under another split."""
    merges = [tuple(merge.split(" ")) for merge in vocabulary(tokenizer).merges]
    backend = build_bpe(tokenizer.backend.get_vocab(with_added_tokens=False), merges, pattern)  # type: ignore[arg-type]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.special_tokens])
    if "normalizer" in changes:
        backend.normalizer = changes["normalizer"]
    return Tokenizer(backend, tokenizer.roles, tokenizer.chat_template)
