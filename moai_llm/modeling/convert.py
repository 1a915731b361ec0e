"""Weights between MoaiForCausalLM and the transformers classes that compute the same function.

    qwen3      attention with QK-norm + SwiGLU                 Qwen3ForCausalLM
    qwen3_moe  the same, dense and sparse layers               Qwen3MoeForCausalLM
    mamba      Mamba-1 alone                                   MambaForCausalLM
    jamba      Mamba-1 and attention without positions, each followed by SwiGLU or experts      JambaForCausalLM

A family is a table of names and a reason to refuse; everything else is shared. Both sides are models in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from moai_llm.config import MoaiConfig
from moai_llm.modeling.model import MoaiForCausalLM

ATTENTION = {f"mixer.{p}_proj.{part}": f"self_attn.{p}_proj.{part}" for p in "qkvo" for part in ("weight", "bias")}
QK_NORM = {f"mixer.{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"}
MAMBA = {
    "mixer.in_proj_x.weight": "{mixer}.in_proj.weight",  # the first half of it; z is the second
    "mixer.in_proj_z.weight": "{mixer}.in_proj.weight",
    "mixer.conv_weight": "{mixer}.conv1d.weight",
    "mixer.conv_bias": "{mixer}.conv1d.bias",
    "mixer.x_proj.weight": "{mixer}.x_proj.weight",
    "mixer.dt_proj.weight": "{mixer}.dt_proj.weight",
    "mixer.dt_bias": "{mixer}.dt_proj.bias",
    "mixer.A_log": "{mixer}.A_log",
    "mixer.D": "{mixer}.D",
    "mixer.out_proj.weight": "{mixer}.out_proj.weight",
}
SSM_NORM = {f"mixer.{ours}_norm.weight": f"mamba.{theirs}_layernorm.weight" for ours, theirs in
            (("dt", "dt"), ("B", "b"), ("C", "c"))}  # fmt: skip
DENSE = {f"mlp.{p}_proj.weight": f"{{mlp}}.{p}_proj.weight" for p in ("gate", "up", "down")}
SPARSE = {
    "mlp.router.weight": "{mlp}.{router}.weight",
    "mlp.up_proj": "{mlp}.experts.gate_up_proj",
    "mlp.down_proj": "{mlp}.experts.down_proj",
}


@dataclass(frozen=True)
class Family:
    """`names` fill the braces of the tables; the three functions know what the family can express."""

    model_class: str
    config_class: str
    names: dict[str, str]
    top: dict[str, str]
    norms: dict[str, str]
    refuse: Callable[[MoaiConfig], str | None]
    to_config: Callable[[MoaiConfig], dict[str, Any]]
    from_config: Callable[[Any], dict[str, Any]]


def native_family(config: MoaiConfig) -> str:
    """The first family that computes exactly what this config says.

    Raises:
        ValueError: none does; the message gives each family's reason.
    """
    reasons = {}
    for name, family in FAMILIES.items():
        reason = _refuse_all(config) or family.refuse(config)
        if reason is None:
            return name
        reasons[name] = reason
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"no transformers class computes this model:\n{lines}")


def to_native(model: MoaiForCausalLM, family: str | None = None) -> transformers.PreTrainedModel:
    """A transformers model with the same logits. `family` is chosen by `native_family` when None."""
    config = model.config
    name = family or native_family(config)
    reason = _refuse_all(config) or FAMILIES[name].refuse(config)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    chosen = FAMILIES[name]
    fields = {**_common_fields(config), **chosen.to_config(config)}
    native = getattr(transformers, chosen.model_class)(getattr(transformers, chosen.config_class)(**fields))
    ours, weights = model.state_dict(), {}
    for theirs, keys in _grouped(_pairs(config, chosen)).items():
        tensors = [ours[key] for key in keys]
        weights[theirs] = tensors[0][:, None] if theirs.endswith("conv1d.weight") else torch.cat(tensors)
    native.load_state_dict(weights, strict=True)
    return native.to(model.dtype).train(model.training)


def from_native(native: transformers.PreTrainedModel) -> MoaiForCausalLM:
    """Our model with the same logits as a Qwen3, Qwen3MoE, Mamba or Jamba model.

    Raises:
        ValueError: another class, or a setting our bricks do not have.
    """
    family = next((f for f in FAMILIES.values() if f.model_class == type(native).__name__), None)
    if family is None:
        known = ", ".join(f.model_class for f in FAMILIES.values())
        raise ValueError(f"{type(native).__name__} cannot be imported; there are {known}")
    theirs = native.config
    fields = {name: getattr(theirs, name) for name in SHARED_FIELDS if hasattr(theirs, name)}
    config = MoaiConfig(**{**fields, **family.from_config(theirs)})
    model = MoaiForCausalLM(config)
    source = native.state_dict()
    weights: dict[str, Tensor] = {}
    for name, keys in _grouped(_pairs(config, family)).items():
        parts = source[name].squeeze(1)[None] if name.endswith("conv1d.weight") else source[name].chunk(len(keys))
        weights.update(zip(keys, parts))
    model.load_state_dict(weights, strict=True)
    return model.to(native.dtype).train(native.training)  # type: ignore[arg-type]


SHARED_FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "hidden_act", "initializer_range", "tie_word_embeddings",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def _common_fields(config: MoaiConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED_FIELDS}


def _pairs(config: MoaiConfig, family: Family) -> Iterator[tuple[str, str]]:
    """(our key, their key) of every weight; several of ours may share one of theirs, in order."""
    assert config.layer_types is not None and config.mlp_layer_types is not None
    yield from family.top.items()
    yield "lm_head.weight", "lm_head.weight"
    base = family.names["base"]
    for i, (mixer, mlp) in enumerate(zip(config.layer_types, config.mlp_layer_types)):
        table = {"mixer_norm.weight": family.norms["mixer"]}
        if mixer == "linear_attention":
            table |= MAMBA | (SSM_NORM if config.ssm_norm else {})
            table = table if config.conv_bias else {k: v for k, v in table.items() if k != "mixer.conv_bias"}
        else:
            table |= {k: v for k, v in ATTENTION.items() if config.attention_bias or not k.endswith("bias")}
            table |= QK_NORM if config.use_qk_norm else {}
        if mlp != "none":
            table |= {"mlp_norm.weight": family.norms["mlp"]} | (DENSE if mlp == "dense" else SPARSE)
        for ours, theirs in table.items():
            yield f"model.layers.{i}.{ours}", f"{base}.layers.{i}.{theirs.format(**family.names)}"


def _grouped(pairs: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for ours, theirs in pairs:
        groups.setdefault(theirs, []).append(ours)
    return groups


# ---------------------------------------------------------------- what each family can say


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


def _refuse_qwen3(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if "linear_attention" in config.layer_types:
        return "it has no Mamba layers"
    if "none" in config.mlp_layer_types:
        return "every layer has a channel mixer"
    if not config.use_qk_norm:
        return "it always normalises queries and keys"
    if config.position_embedding != "rope":
        return "it always uses RoPE"
    return "it has no experts" if "sparse" in config.mlp_layer_types else None


def _qwen3_fields(config: MoaiConfig) -> dict[str, Any]:
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
             "rope_parameters", "rms_norm_eps", "attention_bias")  # fmt: skip
    fields = {name: getattr(config, name) for name in names}
    return {**fields, "layer_types": config.layer_types, "sliding_window": config.sliding_window,
            "use_sliding_window": config.sliding_window is not None}  # fmt: skip


def _from_qwen3(theirs: Any) -> dict[str, Any]:
    names = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
             "rope_parameters", "rms_norm_eps", "attention_bias", "sliding_window")  # fmt: skip
    fields = {name: getattr(theirs, name) for name in names}
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    return {**fields, "head_dim": head_dim, "use_qk_norm": True, "layer_types": getattr(theirs, "layer_types", None)}


def _refuse_qwen3_moe(config: MoaiConfig) -> str | None:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    dense = MoaiConfig(**{**config.to_dict(), "mlp_layer_types": ["dense"]})
    if (reason := _refuse_qwen3(dense)) is not None or "none" in config.mlp_layer_types:
        return reason or "every layer has a channel mixer"
    if "sliding_attention" in config.layer_types:
        return "its attention is full in every layer"
    return None


def _qwen3_moe_fields(config: MoaiConfig) -> dict[str, Any]:
    assert config.mlp_layer_types is not None
    fields = _qwen3_fields(config)
    fields.pop("layer_types")
    names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    # transformers counts the share per token, we per selection: its loss is K times ours
    return {**fields, **{name: getattr(config, name) for name in names},
            "router_aux_loss_coef": config.router_aux_loss_coef / config.num_experts_per_tok,
            "mlp_only_layers": [i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"]}  # fmt: skip


def _from_qwen3_moe(theirs: Any) -> dict[str, Any]:
    def kind(i: int) -> str:
        sparse = i not in theirs.mlp_only_layers and (i + 1) % theirs.decoder_sparse_step == 0
        return "sparse" if sparse else "dense"

    fields = {**_from_qwen3(theirs), **_from_experts(theirs), "layer_types": ["full_attention"]}
    return {**fields, "moe_intermediate_size": theirs.moe_intermediate_size, "norm_topk_prob": theirs.norm_topk_prob,
            "mlp_layer_types": [kind(i) for i in range(theirs.num_hidden_layers)]}  # fmt: skip


def _from_experts(theirs: Any) -> dict[str, Any]:
    return {"num_experts": theirs.num_experts, "num_experts_per_tok": theirs.num_experts_per_tok,
            "router_aux_loss_coef": theirs.router_aux_loss_coef * theirs.num_experts_per_tok}  # fmt: skip


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
    assert config.layer_types is not None and config.mlp_layer_types is not None
    if "linear_attention" not in config.layer_types or "full_attention" not in config.layer_types:
        return "it has both Mamba and attention layers"
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


_MODEL_TOP = {"model.embed_tokens.weight": "model.embed_tokens.weight"}
_QWEN3_NORMS = {"mixer": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
_QWEN3_NAMES = {"base": "model", "mlp": "mlp", "router": "gate"}

FAMILIES: dict[str, Family] = {
    "qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", _QWEN3_NAMES, _MODEL_TOP | {"model.norm.weight": "model.norm.weight"},
        _QWEN3_NORMS, _refuse_qwen3, _qwen3_fields, _from_qwen3,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _QWEN3_NAMES, _MODEL_TOP | {"model.norm.weight": "model.norm.weight"},
        _QWEN3_NORMS, _refuse_qwen3_moe, _qwen3_moe_fields, _from_qwen3_moe,
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
        _refuse_jamba, _jamba_fields, _from_jamba,
    ),
}  # fmt: skip
