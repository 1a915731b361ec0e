"""What each transformers class can say: a config of ours to one of theirs and back, and the reason where it cannot.

    qwen3      attention with QK-norm + SwiGLU                 Qwen3ForCausalLM
    qwen3_moe  the same, dense and sparse layers               Qwen3MoeForCausalLM
    llama      attention without QK-norm + SwiGLU              LlamaForCausalLM
    mistral    the same with a window in every layer           MistralForCausalLM
    mixtral    attention without QK-norm + experts             MixtralForCausalLM
    qwen2      attention with biases on q, k and v + SwiGLU    Qwen2ForCausalLM, only to ours
    mamba      Mamba-1 alone                                   MambaForCausalLM
    jamba      Mamba-1 and attention without positions, each followed by SwiGLU or experts      JambaForCausalLM

Configs only; the weights are moved by convert.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moai_llm.config import MoaiConfig


@dataclass(frozen=True)
class Family:
    """`names` fill the braces of the tables in convert.py; the functions know what the family can express.

    Attributes:
        prepare: the config whose weights the family holds, where it needs more of them than the model has.
        zeros: endings of names that we have and the family has not; they are zero.
    """

    model_class: str
    config_class: str
    names: dict[str, str]
    top: dict[str, str]
    norms: dict[str, str]
    refuse: Callable[[MoaiConfig], str | None]
    to_config: Callable[[MoaiConfig], dict[str, Any]]
    from_config: Callable[[Any], dict[str, Any]]
    prepare: Callable[[MoaiConfig], MoaiConfig] = lambda config: config
    zeros: tuple[str, ...] = ()

    def reason(self, config: MoaiConfig) -> str | None:
        """Why the family cannot compute what this config says; None where it can."""
        return _refuse_all(config) or self.refuse(self.prepare(config))


SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "initializer_range", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _refuse_all(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if config.norm_type != "rms_norm":
        return "it has RMSNorm only"
    if config.position_embedding == "learned":
        return "it has no learned positions"
    if config.mlp_bias or config.router_bias:
        return "its channel mixers have no biases"
    if not config.mlp_gated and set(config.mlp_layer_types) != {"none"}:
        return "its channel mixers are gated (SwiGLU)"
    return None


# ---------------------------------------------------------------- attention with RoPE


def _refuse_rotating(config: MoaiConfig) -> str | None:
    """What all decoders of attention with RoPE refuse."""
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if "linear_attention" in config.layer_types:
        return "it has no Mamba layers"
    if "none" in config.mlp_layer_types:
        return "every layer has a channel mixer"
    return None if config.position_embedding == "rope" else "it always uses RoPE"


def _refuse_qwen3(config: MoaiConfig) -> str | None:
    assert config.mlp_layer_types is not None
    if (reason := _refuse_rotating(config)) is not None:
        return reason
    if not config.use_qk_norm:
        return "it always normalises queries and keys"
    return "it has no experts" if "sparse" in config.mlp_layer_types else None


def _refuse_qwen3_moe(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None
    if (reason := _refuse_rotating(config)) is not None:
        return reason
    if not config.use_qk_norm:
        return "it always normalises queries and keys"
    return "its attention is full in every layer" if "sliding_attention" in config.layer_types else None


def _refuse_llama(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if (reason := _refuse_rotating(config)) is not None:
        return reason
    if config.use_qk_norm:
        return "it does not normalise queries and keys"
    if "sparse" in config.mlp_layer_types:
        return "it has no experts"
    return "its attention is full in every layer" if "sliding_attention" in config.layer_types else None


def _refuse_mistral(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if (reason := _refuse_rotating(config)) is not None:
        return reason
    if config.use_qk_norm or config.attention_bias:
        return "its attention has no QK-norm and no biases"
    if "sparse" in config.mlp_layer_types:
        return "it has no experts"
    return None if set(config.layer_types) == {"sliding_attention"} else "its attention has a window in every layer"


def _refuse_mixtral(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if (reason := _refuse_rotating(config)) is not None:
        return reason
    if config.use_qk_norm or config.attention_bias:
        return "its attention has no QK-norm and no biases"
    if set(config.mlp_layer_types) != {"sparse"}:
        return "every layer has experts"
    if not config.norm_topk_prob:
        return "its routing weights are renormalised (norm_topk_prob: true)"
    return None if len(set(config.layer_types)) == 1 else "its layers have all a window or none"


def _refuse_qwen2(config: MoaiConfig) -> str | None:
    return "it has biases on queries, keys and values alone, and we have one on the output too (llama can say that)"


_ATTENTION_FIELDS = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings", "rope_parameters", "rms_norm_eps")  # fmt: skip


def _attention_fields(config: MoaiConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _ATTENTION_FIELDS}


def _window(config: MoaiConfig) -> int | None:
    """A config may name a window that no layer has."""
    return config.sliding_window if "sliding_attention" in (config.layer_types or ()) else None


def _qwen3_fields(config: MoaiConfig) -> dict[str, Any]:
    window = _window(config)
    return {**_attention_fields(config), "attention_bias": config.attention_bias, "layer_types": config.layer_types,
            "sliding_window": window, "use_sliding_window": window is not None}  # fmt: skip


def _qwen3_moe_fields(config: MoaiConfig) -> dict[str, Any]:
    assert config.mlp_layer_types is not None
    fields = _qwen3_fields(config)
    fields.pop("layer_types")
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    # transformers counts the share per token, we per selection: its loss is K times ours
    return {**fields, **{name: getattr(config, name) for name in names},
            "router_aux_loss_coef": config.router_aux_loss_coef / config.num_experts_per_tok,
            "mlp_only_layers": [i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"]}  # fmt: skip


def _llama_fields(config: MoaiConfig) -> dict[str, Any]:
    return {**_attention_fields(config), "attention_bias": config.attention_bias}


def _mistral_fields(config: MoaiConfig) -> dict[str, Any]:
    return {**_attention_fields(config), "sliding_window": _window(config)}


def _mixtral_fields(config: MoaiConfig) -> dict[str, Any]:
    return {**_mistral_fields(config), "intermediate_size": config.moe_intermediate_size,
            "num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "router_aux_loss_coef": config.router_aux_loss_coef / config.num_experts_per_tok}  # fmt: skip


def _from_attention(theirs: Any) -> dict[str, Any]:
    names = [name for name in _ATTENTION_FIELDS if name != "head_dim"]
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    return {**{name: getattr(theirs, name) for name in names}, "head_dim": head_dim, "use_qk_norm": False}


def _from_qwen3(theirs: Any) -> dict[str, Any]:
    return {**_from_attention(theirs), "use_qk_norm": True, "attention_bias": theirs.attention_bias,
            "sliding_window": theirs.sliding_window, "layer_types": getattr(theirs, "layer_types", None)}  # fmt: skip


def _from_qwen3_moe(theirs: Any) -> dict[str, Any]:
    def kind(i: int) -> str:
        sparse = i not in theirs.mlp_only_layers and (i + 1) % theirs.decoder_sparse_step == 0
        return "sparse" if sparse else "dense"

    fields = {**_from_qwen3(theirs), **_from_experts(theirs), "layer_types": ["full_attention"]}
    return {**fields, "moe_intermediate_size": theirs.moe_intermediate_size, "norm_topk_prob": theirs.norm_topk_prob,
            "mlp_layer_types": [kind(i) for i in range(theirs.num_hidden_layers)]}  # fmt: skip


def _from_llama(theirs: Any) -> dict[str, Any]:
    if theirs.mlp_bias:
        raise ValueError("LlamaConfig.mlp_bias: biases of its channel mixers have no counterpart here")
    return {**_from_attention(theirs), "attention_bias": theirs.attention_bias}


def _from_qwen2(theirs: Any) -> dict[str, Any]:
    return {**_from_attention(theirs), "attention_bias": True, "sliding_window": theirs.sliding_window,
            "layer_types": theirs.layer_types}  # fmt: skip


def _from_mistral(theirs: Any) -> dict[str, Any]:
    kind = "full_attention" if theirs.sliding_window is None else "sliding_attention"
    return {**_from_attention(theirs), "sliding_window": theirs.sliding_window, "layer_types": [kind]}


def _from_mixtral(theirs: Any) -> dict[str, Any]:
    return {**_from_mistral(theirs), **_from_experts(theirs), "num_experts": theirs.num_local_experts,
            "moe_intermediate_size": theirs.intermediate_size, "mlp_layer_types": ["sparse"],
            "norm_topk_prob": True}  # fmt: skip


def _from_experts(theirs: Any) -> dict[str, Any]:
    # MixtralConfig calls them num_local_experts and knows num_experts as another name for it
    return {"num_experts": theirs.num_experts, "num_experts_per_tok": theirs.num_experts_per_tok,
            "router_aux_loss_coef": theirs.router_aux_loss_coef * theirs.num_experts_per_tok}  # fmt: skip


# ---------------------------------------------------------------- Mamba


def _refuse_mamba(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if set(config.layer_types) != {"linear_attention"} or set(config.mlp_layer_types) != {"none"}:
        return "it is Mamba layers alone, without channel mixers"
    return "it has no norm on dt, B and C" if config.ssm_norm else None


def _mamba_fields(config: MoaiConfig) -> dict[str, Any]:
    return {"state_size": config.ssm_state_size, "conv_kernel": config.conv_kernel_size, "expand": config.ssm_expand,
            "time_step_rank": config.ssm_dt_rank, "use_conv_bias": config.conv_bias,
            "layer_norm_epsilon": config.rms_norm_eps}  # fmt: skip


def _from_mamba(theirs: Any) -> dict[str, Any]:
    if theirs.use_bias:
        raise ValueError("MambaConfig.use_bias: our Mamba has no biases on its projections")
    return {"ssm_state_size": theirs.state_size, "conv_kernel_size": theirs.conv_kernel, "ssm_expand": theirs.expand,
            "ssm_dt_rank": theirs.time_step_rank, "conv_bias": theirs.use_conv_bias, "ssm_norm": False,
            "rms_norm_eps": theirs.layer_norm_epsilon, "layer_types": ["linear_attention"],
            "mlp_layer_types": ["none"]}  # fmt: skip


def _refuse_jamba(config: MoaiConfig) -> str | None:
    """Of a prepared config: where there are Mamba layers, there is also one of attention."""
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if "linear_attention" not in config.layer_types:
        return "it has Mamba layers"
    if "none" in config.mlp_layer_types or "sliding_attention" in config.layer_types:
        return "every layer has a channel mixer, and its attention is full"
    if config.position_embedding != "none" or config.use_qk_norm or config.attention_bias:
        return "its attention has no positions, no QK-norm and no biases"
    if not config.ssm_norm:
        return "its Mamba normalises dt, B and C"
    if "sparse" in config.mlp_layer_types:
        if config.norm_topk_prob:
            return "its routing weights are not renormalised (norm_topk_prob: false)"
        if config.moe_intermediate_size != config.intermediate_size:
            return "its experts are as wide as its dense layers"
    attention = [kind == "full_attention" for kind in config.layer_types]
    sparse = [kind == "sparse" for kind in config.mlp_layer_types]
    if _period(attention) is None or (any(sparse) and _period(sparse) is None):
        return "its attention and sparse layers come at fixed periods"
    return None


def _period(flags: list[bool]) -> tuple[int, int] | None:
    """(period, offset) with flags[i] == (i % period == offset), the smallest there is."""
    for period in range(1, len(flags) + 1):
        for offset in range(period):
            if flags == [i % period == offset for i in range(len(flags))]:
                return period, offset
    return None


def _with_attention(config: MoaiConfig) -> MoaiConfig:
    """Jamba without any attention does not run: transformers' cache and llama.cpp both want one such layer. Mamba
    alone gets one more layer behind its last, of zero weights, which adds nothing to what flows through.
    """
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if set(config.layer_types) != {"linear_attention"}:
        return config
    head_dim = next((size for size in (64, 128, 32, 16) if config.hidden_size % size == 0), config.hidden_size)
    sparse = [kind == "sparse" for kind in config.mlp_layer_types]
    kind = "sparse" if any(sparse) and _period([*sparse, False]) is None else "dense"
    changes = {
        "num_hidden_layers": config.num_hidden_layers + 1,
        "layer_types": [*config.layer_types, "full_attention"],
        "mlp_layer_types": [*config.mlp_layer_types, kind],
        "num_attention_heads": config.hidden_size // head_dim, "num_key_value_heads": 1, "head_dim": head_dim,
        "position_embedding": "none", "use_qk_norm": False, "attention_bias": False,
    }  # fmt: skip
    return MoaiConfig(**{**config.to_dict(), **changes})


def _jamba_fields(config: MoaiConfig) -> dict[str, Any]:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    attention = _period([kind == "full_attention" for kind in config.layer_types])
    sparse = _period([kind == "sparse" for kind in config.mlp_layer_types])
    assert attention is not None
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
             "rms_norm_eps", "num_experts_per_tok")  # fmt: skip
    period, offset = sparse or (1, 0)
    return {**{name: getattr(config, name) for name in names}, "num_experts": config.num_experts if sparse else 1,
            "router_aux_loss_coef": config.router_aux_loss_coef / config.num_experts_per_tok,
            "attn_layer_period": attention[0], "attn_layer_offset": attention[1],
            "expert_layer_period": period, "expert_layer_offset": offset,
            "mamba_d_state": config.ssm_state_size, "mamba_d_conv": config.conv_kernel_size,
            "mamba_expand": config.ssm_expand, "mamba_dt_rank": config.ssm_dt_rank,
            "mamba_conv_bias": config.conv_bias}  # fmt: skip


def _from_jamba(theirs: Any) -> dict[str, Any]:
    if theirs.mamba_proj_bias:
        raise ValueError("JambaConfig.mamba_proj_bias: our Mamba has no biases on its projections")
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
             "rms_norm_eps")  # fmt: skip
    return {**{name: getattr(theirs, name) for name in names}, **_from_experts(theirs),
            "head_dim": getattr(theirs, "head_dim", None), "layer_types": theirs.layer_types,
            "mlp_layer_types": ["sparse" if n > 1 else "dense" for n in theirs.layers_num_experts],
            "ssm_state_size": theirs.mamba_d_state, "conv_kernel_size": theirs.mamba_d_conv,
            "ssm_expand": theirs.mamba_expand, "ssm_dt_rank": theirs.mamba_dt_rank,
            "conv_bias": theirs.mamba_conv_bias, "ssm_norm": True, "norm_topk_prob": False, "use_qk_norm": False,
            "position_embedding": "none"}  # fmt: skip


_MODEL_TOP = {"model.embed_tokens.weight": "model.embed_tokens.weight", "model.norm.weight": "model.norm.weight"}
_NORMS = {"mixer": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
_NAMES = {"base": "model", "mlp": "mlp", "router": "gate"}

# the first that fits is taken
FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", _NAMES, _MODEL_TOP, _NORMS, _refuse_qwen3, _qwen3_fields, _from_qwen3
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _NAMES, _MODEL_TOP, _NORMS,
        _refuse_qwen3_moe, _qwen3_moe_fields, _from_qwen3_moe,
    ),
    "llama": Family(
        "LlamaForCausalLM", "LlamaConfig", _NAMES, _MODEL_TOP, _NORMS, _refuse_llama, _llama_fields, _from_llama
    ),
    "mistral": Family(
        "MistralForCausalLM", "MistralConfig", _NAMES, _MODEL_TOP, _NORMS,
        _refuse_mistral, _mistral_fields, _from_mistral,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", "MixtralConfig", _NAMES, _MODEL_TOP, _NORMS,
        _refuse_mixtral, _mixtral_fields, _from_mixtral,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", "Qwen2Config", _NAMES, _MODEL_TOP, _NORMS, _refuse_qwen2, _llama_fields, _from_qwen2,
        zeros=("mixer.o_proj.bias",),
    ),
    "mamba": Family(
        "MambaForCausalLM", "MambaConfig", {"base": "backbone", "mixer": "mixer"},
        {"model.embed_tokens.weight": "backbone.embeddings.weight", "model.norm.weight": "backbone.norm_f.weight"},
        {"mixer": "norm.weight"}, _refuse_mamba, _mamba_fields, _from_mamba,
    ),
    "jamba": Family(
        "JambaForCausalLM", "JambaConfig",
        {"base": "model", "mixer": "mamba", "mlp": "feed_forward", "router": "router"},
        _MODEL_TOP | {"model.norm.weight": "model.final_layernorm.weight"},
        {"mixer": "input_layernorm.weight", "mlp": "pre_ff_layernorm.weight"},
        _refuse_jamba, _jamba_fields, _from_jamba, _with_attention,
    ),
}  # fmt: skip
