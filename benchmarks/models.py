"""Equal models of several libraries: the same sizes, the same weights, so that the same batch must give the same
loss.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from moai_llm.modeling.convert import from_native
from moai_llm.modeling.model import MoaiForCausalLM

DENSE: dict[str, Any] = dict(
    hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2,
    head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
)  # fmt: skip
#: about 100M parameters with a vocabulary of 32k
DENSE_100M = {**DENSE, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
              "num_attention_heads": 12, "num_key_value_heads": 4}  # fmt: skip
MAMBA: dict[str, Any] = dict(
    hidden_size=384, num_hidden_layers=6, state_size=16, conv_kernel=4, expand=2, tie_word_embeddings=True
)
MAMBA_100M = {**MAMBA, "hidden_size": 768, "num_hidden_layers": 24}


def qwen3(vocab_size: int, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=vocab_size, **{**DENSE, **sizes}))


def qwen3_moe(vocab_size: int, experts: str) -> Any:
    """8 experts, top-2, in every second layer; `experts` is transformers' experts_implementation."""
    torch.manual_seed(0)
    sizes = dict(moe_intermediate_size=512, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=2,
                 norm_topk_prob=True, output_router_logits=False, router_aux_loss_coef=0.0)  # fmt: skip
    config = transformers.Qwen3MoeConfig(vocab_size=vocab_size, **{**DENSE, **sizes})
    model = transformers.Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(experts)
    return model


def mamba(vocab_size: int, **sizes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=vocab_size, **{**MAMBA, **sizes}))


def ours(native: Any) -> MoaiForCausalLM:
    """The same weights in our bricks."""
    model = from_native(native)
    model.config.use_cache = False
    return model


class Litgpt(nn.Module):
    """litgpt's GPT with the weights of a Qwen3, and the loss of its pretraining loop."""

    def __init__(self, native: Any) -> None:
        super().__init__()
        from litgpt import GPT, Config

        c = native.config
        self.gpt = GPT(
            Config(
                name="same", block_size=c.max_position_embeddings, vocab_size=c.vocab_size,
                padded_vocab_size=c.vocab_size, n_layer=c.num_hidden_layers, n_head=c.num_attention_heads,
                n_query_groups=c.num_key_value_heads, n_embd=c.hidden_size, head_size=c.head_dim,
                rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_qk=True,
                norm_eps=c.rms_norm_eps, mlp_class_name="LLaMAMLP", intermediate_size=c.intermediate_size,
            )
        )  # fmt: skip
        self.gpt.lm_head.weight = self.gpt.transformer.wte.weight
        theirs, state = native.state_dict(), self.gpt.state_dict()
        for i in range(c.num_hidden_layers):
            here, there = f"transformer.h.{i}", f"model.layers.{i}"
            state[f"{here}.attn.qkv.weight"] = torch.cat([theirs[f"{there}.self_attn.{p}_proj.weight"] for p in "qkv"])
            for a, b in {
                "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
                "attn.norm_q": "self_attn.q_norm", "attn.norm_k": "self_attn.k_norm", "mlp.fc_1": "mlp.gate_proj",
                "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
            }.items():  # fmt: skip
                state[f"{here}.{a}.weight"] = theirs[f"{there}.{b}.weight"]
        state["transformer.wte.weight"] = state["lm_head.weight"] = theirs["model.embed_tokens.weight"]
        state["transformer.ln_f.weight"] = theirs["model.norm.weight"]
        self.gpt.load_state_dict(state)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        return chunked_cross_entropy(self.gpt(input_ids)[:, :-1], labels[:, 1:], chunk_size=0)
