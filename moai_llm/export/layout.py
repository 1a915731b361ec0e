"""A model as llama.cpp lays it out: the architecture that computes it, the keys of its header, and where each weight
goes.

    qwen3      attention with QK-norm and RoPE, SwiGLU
    qwen3moe   the same with experts in every layer
    hy_v3      the same with dense and sparse layers: llama.cpp's Qwen3MoE has no dense ones, so this graph is borrowed
    llama      attention without QK-norm, SwiGLU or experts
    mamba      Mamba-1 alone
    jamba      Mamba-1 and attention without positions, each followed by SwiGLU or experts

Names and sizes only, nothing of the file format. What an architecture demands was read in llama.cpp, src/models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moai_llm.config import MoaiConfig
from moai_llm.modeling.families import FAMILIES

State = dict[str, Tensor]
SHARED = 32  # width of the expert of zeros that hy_v3 adds to every token; a block of the quantised types


@dataclass(frozen=True)
class Weight:
    """One tensor of the file.

    Attributes:
        name: in the file.
        keys: of our weights in it, one behind the other; none where it is constant.
        half: of experts' stacked gate and up projections: 0 the gate, 1 the other.
        heads: its rows are reordered head by head, for a rope that turns neighbours and not halves. 0: they are not.
        decay: it holds -exp of our weight.
        constant: what it holds where we have no such weight.
        full: it stays in fp32, whatever the type of the file.
    """

    name: str
    keys: tuple[str, ...] = ()
    half: int | None = None
    heads: int = 0
    decay: bool = False
    constant: Tensor | None = None
    full: bool = False

    def _views(self, state: State) -> list[Tensor]:
        found = [state[key] for key in self.keys]
        return found if self.half is None else [tensor.chunk(2, 1)[self.half] for tensor in found]

    def of(self, state: State) -> Tensor:
        """What the file holds, in fp32."""
        if self.constant is not None:
            return self.constant
        tensor = torch.cat(self._views(state)).float()
        if self.heads:  # (heads, two halves, ...) -> (heads, pairs, ...)
            tensor = tensor.unflatten(0, (self.heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        return (-torch.exp(tensor) if self.decay else tensor).contiguous()

    def put_back(self, state: State, tensor: Tensor) -> None:
        """The inverse of `of`: our weights become what a file holds."""
        if self.constant is not None:
            return
        if self.heads:
            tensor = tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        if self.decay:
            tensor = torch.log(-tensor)
        views = self._views(state)
        for view, part in zip(views, tensor.split([len(view) for view in views])):
            view.copy_(part)


@dataclass(frozen=True)
class Layout:
    """`keys` are those of the header, without the name of the architecture in front."""

    architecture: str
    family: str
    keys: dict[str, Any]
    weights: list[Weight]


def refusals(config: MoaiConfig) -> dict[str, str | None]:
    """architecture -> why it does not compute what this config says; None where it does."""
    found = {name: _reasons(config, name).values() for name in ARCHITECTURES}
    return {name: None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))
            for name, reasons in found.items()}  # fmt: skip


def _reasons(config: MoaiConfig, architecture: str) -> dict[str, str | None]:
    """family of transformers -> why the architecture does not compute it for this config."""
    found = {}
    for family, refuse in ARCHITECTURES[architecture].items():
        reason = FAMILIES[family].reason(config)
        if reason is None:
            prepared = FAMILIES[family].prepare(config)
            reason = _refuse_all(prepared) or refuse(prepared)
        found[family] = reason
    return found


def lay_out(config: MoaiConfig, architecture: str) -> Layout:
    """The layout of a config that `architecture` does not refuse. It is that of the prepared config, see `Family`."""
    family = next(name for name, reason in _reasons(config, architecture).items() if reason is None)
    config = FAMILIES[family].prepare(config)
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    factors = None
    attends = [kind == "full_attention" for kind in config.layer_types or ()]
    keys["feed_forward_length"] = 0 if architecture == "mamba" else config.intermediate_size
    keys["attention.head_count"] = 0 if architecture == "mamba" else config.num_attention_heads
    if not all(attends):
        keys |= {
            "ssm.conv_kernel": config.conv_kernel_size, "ssm.inner_size": config.ssm_expand * config.hidden_size,
            "ssm.state_size": config.ssm_state_size, "ssm.time_step_rank": config.ssm_dt_rank,
        }  # fmt: skip
    if any(attends):
        heads = config.num_key_value_heads
        keys["attention.head_count_kv"] = (
            heads if all(attends) else [heads if attention else 0 for attention in attends]
        )
    if all(attends):
        keys |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
        scaling, factors = _rope(config)
        keys |= scaling
    if "sparse" in (config.mlp_layer_types or ()):
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        if family == "mixtral":
            keys["feed_forward_length"] = config.moe_intermediate_size
        elif architecture != "jamba":
            keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if architecture == "hy_v3":
        softmax = 1
        keys |= {"expert_shared_feed_forward_length": SHARED, "expert_gating_func": softmax,
                 "expert_weights_norm": config.norm_topk_prob, "expert_weights_scale": 1.0}  # fmt: skip
    weights = list(_weights(config, architecture))
    if factors is not None:
        weights.append(Weight("rope_freqs.weight", constant=factors, full=True))
    return Layout(architecture, family, keys, weights)


def _weights(config: MoaiConfig, architecture: str) -> Iterator[Weight]:
    assert config.layer_types is not None and config.mlp_layer_types is not None
    yield Weight("token_embd.weight", ("model.embed_tokens.weight",))
    yield Weight("output_norm.weight", ("model.norm.weight",))
    if not config.tie_word_embeddings:
        yield Weight("output.weight", ("lm_head.weight",))
    for i, (mixer, mlp) in enumerate(zip(config.layer_types, config.mlp_layer_types)):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        yield Weight(f"{theirs}attn_norm.weight", (f"{ours}mixer_norm.weight",))
        yield from (_mamba if mixer == "linear_attention" else _attention)(config, architecture, ours, theirs)
        if mlp != "none":
            yield Weight(f"{theirs}ffn_norm.weight", (f"{ours}mlp_norm.weight",))
            yield from (_experts if mlp == "sparse" else _dense)(config, architecture, ours, theirs)


def _attention(config: MoaiConfig, architecture: str, ours: str, theirs: str) -> Iterator[Weight]:
    turned = {"q": config.num_attention_heads, "k": config.num_key_value_heads} if architecture == "llama" else {}
    for part, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            yield Weight(f"{theirs}{name}.{kind}", (f"{ours}mixer.{part}_proj.{kind}",), heads=turned.get(part) or 0)
    for part in "qk" if config.use_qk_norm else "":
        yield Weight(f"{theirs}attn_{part}_norm.weight", (f"{ours}mixer.{part}_norm.weight",))


def _mamba(config: MoaiConfig, architecture: str, ours: str, theirs: str) -> Iterator[Weight]:
    mixer = f"{ours}mixer."
    yield Weight(f"{theirs}ssm_in.weight", (f"{mixer}in_proj_x.weight", f"{mixer}in_proj_z.weight"))
    yield Weight(f"{theirs}ssm_conv1d.weight", (f"{mixer}conv_weight",), full=True)
    if config.conv_bias:
        yield Weight(f"{theirs}ssm_conv1d.bias", (f"{mixer}conv_bias",), full=True)
    else:
        yield Weight(f"{theirs}ssm_conv1d.bias", constant=torch.zeros(config.ssm_expand * config.hidden_size))
    # small, and what they make passes an exponential: never rounded
    yield Weight(f"{theirs}ssm_x.weight", (f"{mixer}x_proj.weight",), full=True)
    yield Weight(f"{theirs}ssm_dt.weight", (f"{mixer}dt_proj.weight",), full=True)
    yield Weight(f"{theirs}ssm_dt.bias", (f"{mixer}dt_bias",), full=True)
    yield Weight(f"{theirs}ssm_a", (f"{mixer}A_log",), decay=True, full=True)
    yield Weight(f"{theirs}ssm_d", (f"{mixer}D",), full=True)
    yield Weight(f"{theirs}ssm_out.weight", (f"{mixer}out_proj.weight",))
    for part in ("dt", "B", "C") if config.ssm_norm else ():
        yield Weight(f"{theirs}ssm_{part.lower()}_norm.weight", (f"{mixer}{part}_norm.weight",))


def _dense(config: MoaiConfig, architecture: str, ours: str, theirs: str) -> Iterator[Weight]:
    for part in ("gate", "up", "down"):
        yield Weight(f"{theirs}ffn_{part}.weight", (f"{ours}mlp.{part}_proj.weight",))


def _experts(config: MoaiConfig, architecture: str, ours: str, theirs: str) -> Iterator[Weight]:
    yield Weight(f"{theirs}ffn_gate_inp.weight", (f"{ours}mlp.router.weight",), full=True)
    yield Weight(f"{theirs}ffn_gate_exps.weight", (f"{ours}mlp.up_proj",), half=0)
    yield Weight(f"{theirs}ffn_up_exps.weight", (f"{ours}mlp.up_proj",), half=1)
    yield Weight(f"{theirs}ffn_down_exps.weight", (f"{ours}mlp.down_proj",))
    if architecture == "hy_v3":
        shapes = {"gate": (SHARED, config.hidden_size), "up": (SHARED, config.hidden_size),
                  "down": (config.hidden_size, SHARED)}  # fmt: skip
        for part, shape in shapes.items():
            yield Weight(f"{theirs}ffn_{part}_shexp.weight", constant=torch.zeros(shape))


# ---------------------------------------------------------------- RoPE


def _rope(config: MoaiConfig) -> tuple[dict[str, Any], Tensor | None]:
    """Keys of the header, and what each frequency is divided by, where llama.cpp has no rule for it."""
    rope = config.rope_parameters
    assert rope is not None and config.head_dim is not None
    keys: dict[str, Any] = {"rope.dimension_count": config.head_dim, "rope.freq_base": float(rope["rope_theta"])}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    elif rope["rope_type"] == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"]),
                 "rope.scaling.original_context_length": int(original)}  # fmt: skip
    elif rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        return keys, (rope["rope_theta"] ** -exponents / scaled.double()).float()
    return keys, None


def _refuse_rope(config: MoaiConfig, types: tuple[str, ...]) -> str | None:
    rope = config.rope_parameters
    assert rope is not None
    if rope["rope_type"] not in types:
        return f"its rope is {', '.join(types)}, not {rope['rope_type']}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its rope turns whole heads (partial_rotary_factor: 1)"
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
    factor = 1 + 0.1 * math.log(rope["factor"]) if rope["rope_type"] == "yarn" else 1.0
    if not math.isclose(rope.get("attention_factor") or factor, factor, rel_tol=1e-6):
        return "its YaRN scales attention by 1 + 0.1 log(factor)"
    odd = [key for key, value in usual.items() if (rope.get(key) if rope.get(key) is not None else value) != value]
    odd += [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    return f"its YaRN has the usual {', '.join(odd)}" if odd else None


# ---------------------------------------------------------------- what each architecture demands


def _refuse_all(config: MoaiConfig) -> str | None:
    if set(config.mlp_layer_types or ()) != {"none"} and config.hidden_act not in ("silu", "swish"):
        return "its channel mixers use SiLU"
    if "linear_attention" in (config.layer_types or ()) and config.ssm_expand != 2:
        return "its Mamba is twice as wide as the model (ssm_expand: 2)"
    return None


def _refuse_rotating(config: MoaiConfig) -> str | None:
    if "sliding_attention" in (config.layer_types or ()):
        return "its attention is full in every layer"
    return (
        "its projections have no biases"
        if config.attention_bias
        else _refuse_rope(config, ("default", "linear", "yarn"))
    )


def _refuse_qwen3moe(config: MoaiConfig) -> str | None:
    if set(config.mlp_layer_types or ()) != {"sparse"}:
        return "it has experts in every layer"
    if not config.norm_topk_prob:
        return "its routing weights are renormalised (norm_topk_prob: true)"
    return _refuse_rotating(config)


def _refuse_hy_v3(config: MoaiConfig) -> str | None:
    return (
        "it has experts in some layer" if "sparse" not in (config.mlp_layer_types or ()) else _refuse_rotating(config)
    )


def _refuse_llama(config: MoaiConfig) -> str | None:
    if "sliding_attention" in (config.layer_types or ()):
        return "its attention is full in every layer"
    return _refuse_rope(config, ("default", "linear", "yarn", "llama3"))


def _refuse_jamba(config: MoaiConfig) -> str | None:
    assert config.head_dim is not None
    if config.num_attention_heads * config.head_dim != config.hidden_size:
        return "the heads of its attention are together as wide as the model"
    return None


# architecture -> the families of transformers it computes, each with what it demands beyond them; the first that fits
# is taken
ARCHITECTURES: dict[str, dict[str, Callable[[MoaiConfig], str | None]]] = {
    "qwen3": {"qwen3": _refuse_rotating},
    "qwen3moe": {"qwen3_moe": _refuse_qwen3moe},
    "hy_v3": {"qwen3_moe": _refuse_hy_v3},
    "llama": {"llama": _refuse_llama, "mixtral": _refuse_llama},
    "mamba": {"mamba": lambda config: None},
    "jamba": {"jamba": _refuse_jamba},
}
