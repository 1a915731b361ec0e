"""Architecture: the choice of bricks, as plain data. It imports no torch, so that listing and counting models needs
none.

Field names are those of transformers' configurations wherever one exists. `MoaiConfig` (config.py) is this plus what
transformers wants; the `model:` section of a recipe (recipe.py) is exactly this.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from moai_llm.runtime import did_you_mean

# what a config may name; `register_token_mixer` and `register_channel_mixer` (modeling/decoder.py) add to these
TOKEN_MIXER_TYPES = ["full_attention", "sliding_attention", "linear_attention"]
CHANNEL_MIXER_TYPES = ["dense", "sparse", "none"]
# of transformers' activations those that need no parameters of their own; a test compares them
ACTIVATIONS = (
    "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_python_tanh", "gelu_pytorch_tanh",
    "hardswish", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu",
    "sqrtsoftplus", "swish", "tanh",
)  # fmt: skip
# rope_type -> (keys it needs, keys it may have beside rope_theta and partial_rotary_factor)
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "ntk": (("factor",), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
         "truncate"),
    ),
    "longrope": (("short_factor", "long_factor"), ("factor", "original_max_position_embeddings", "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "proportional": ((), ("factor",)),
}  # fmt: skip
LAYER_TYPE_ALIASES = {"mamba": "linear_attention", "attention": "full_attention"}


@dataclass(kw_only=True)
class Architecture:
    """One decoder: per layer norm -> token mixer -> add, norm -> channel mixer -> add."""

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    #: token mixer of each layer; a shorter list is tiled over the depth. `mamba` is read as `linear_attention`
    layer_types: list[str] | None = None
    #: channel mixer of each layer: dense | sparse (mixture of experts) | none; tiled likewise
    mlp_layer_types: list[str] | None = None
    max_position_embeddings: int = 2048

    # attention
    num_attention_heads: int = 8
    #: equal to the heads: multi-head; fewer: grouped-query; 1: multi-query
    num_key_value_heads: int | None = None
    #: independent of hidden_size / heads, as in Qwen3
    head_dim: int | None = None
    attention_bias: bool = False
    use_qk_norm: bool = True
    #: how many keys a query of a sliding_attention layer sees, itself included
    sliding_window: int | None = None
    position_embedding: Literal["rope", "learned", "none"] = "rope"
    #: transformers' rope dictionary: rope_type, rope_theta, factor, ... ; `rope_type: ntk` is ours
    rope_parameters: dict[str, Any] | None = None

    # Mamba-1
    ssm_state_size: int = 16
    conv_kernel_size: int = 4
    ssm_expand: int = 2
    #: rank of the step size projection; None: hidden_size / 16, rounded up
    ssm_dt_rank: int | None = None
    conv_bias: bool = True
    #: RMSNorm on dt, B and C. None: where a channel mixer follows, so that the model can leave as Jamba
    ssm_norm: bool | None = None

    # dense channel mixer
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    #: act(gate(x)) * up(x) (SwiGLU for silu), else act(up(x))
    mlp_gated: bool = True
    mlp_bias: bool = False

    # mixture of experts
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    router_bias: bool = False
    #: learned noise on the router's choice while training (arXiv 1701.06538, section 2.1)
    router_noise: bool = False
    #: Switch load-balancing loss, summed over the sparse layers
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.0

    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def resolve(self) -> None:
        """Fill in what follows from the rest, then validate.

        Raises:
            ValueError: the choice of bricks contradicts itself; the message says which fields and what to do.
        """
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        self.ssm_dt_rank = self.ssm_dt_rank or math.ceil(self.hidden_size / 16)
        aliased = [LAYER_TYPE_ALIASES.get(kind, kind) for kind in self.layer_types or ["full_attention"]]
        self.layer_types = tile(aliased, self.num_hidden_layers)
        self.mlp_layer_types = tile(self.mlp_layer_types or ["dense"], self.num_hidden_layers)
        if self.ssm_norm is None:
            pairs = zip(self.layer_types, self.mlp_layer_types)
            self.ssm_norm = any(mixer == "linear_attention" and mlp != "none" for mixer, mlp in pairs)
        self.rope_parameters = self._resolve_rope()
        self._validate()

    def _resolve_rope(self) -> dict[str, Any] | None:
        if not self.rotates:
            return None
        rope = {key: value for key, value in (self.rope_parameters or {}).items() if value is not None}
        if "type" in rope:
            rope.setdefault("rope_type", rope.pop("type"))
        rope.setdefault("rope_type", "default")
        rope["rope_theta"] = float(rope.get("rope_theta") or 10000.0)
        if rope["rope_type"] == "yarn":
            # the paper's names (arXiv 2309.00071, section 3.2) for the two borders of the ramp
            for theirs, ours in (("alpha", "beta_slow"), ("beta", "beta_fast")):
                if theirs in rope:
                    rope.setdefault(ours, rope.pop(theirs))
        _check_rope(rope)
        if rope["rope_type"] == "ntk":
            # NTK-aware scaling is a larger base and nothing else, so it leaves here as the default rope that any
            # reader knows
            factor, dim = float(rope["factor"]), self.head_dim or 0
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"] * factor ** (dim / (dim - 2))}
        return rope

    def _validate(self) -> None:
        assert self.layer_types and self.mlp_layer_types and self.head_dim and self.num_key_value_heads
        _known("layer_types", self.layer_types, TOKEN_MIXER_TYPES)
        _known("mlp_layer_types", self.mlp_layer_types, CHANNEL_MIXER_TYPES)
        _known("hidden_act", [self.hidden_act], ACTIVATIONS)
        attends = set(self.layer_types) != {"linear_attention"}
        if attends and self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.rotates and self.head_dim % 2:
            raise ValueError(
                f"RoPE rotates pairs, so head_dim must be even, got {self.head_dim}: set head_dim, e.g. to 128"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise ValueError("layer_types holds sliding_attention: set sliding_window to the number of keys it may see")
        if "sparse" in self.mlp_layer_types:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(
                    f"num_experts_per_tok ({self.num_experts_per_tok}) must lie between 1 and num_experts "
                    f"({self.num_experts})"
                )
            if self.num_experts_per_tok == 1 and self.norm_topk_prob and self.num_experts > 1:
                raise ValueError(
                    "with num_experts_per_tok = 1 a normalised weight is always 1 and the router never learns: "
                    "set norm_topk_prob: false"
                )

    @property
    def rotates(self) -> bool:
        """Whether some layer applies RoPE."""
        return self.position_embedding == "rope" and set(self.layer_types or ()) != {"linear_attention"}

    def parameters(self) -> dict[str, int]:
        """Exact parameter counts of the resolved architecture, by part, with `total`, `active` and `non_embedding`.

        `active` is what one token passes through: of the experts only num_experts_per_tok.
        """
        assert self.layer_types and self.mlp_layer_types, "call resolve() first"
        h, of = self.hidden_size, self.brick_parameters()
        self._require_known("parameters", of, of)
        positions = self.max_position_embeddings * h if self.position_embedding == "learned" else 0
        norms = self.num_hidden_layers + sum(kind != "none" for kind in self.mlp_layer_types) + 1
        parts = {
            "embedding": self.vocab_size * h + positions,
            "token_mixers": sum(of[kind] for kind in self.layer_types),
            "channel_mixers": sum(of[kind] for kind in self.mlp_layer_types),
            "norms": norms * of["norm"],
            "head": 0 if self.tie_word_embeddings else self.vocab_size * h,
        }
        total = sum(parts.values())
        idle = self.mlp_layer_types.count("sparse") * (self.num_experts - self.num_experts_per_tok) * of["expert"]
        return {
            **parts,
            "total": total,
            "active": total - idle,
            "non_embedding": total - parts["embedding"] - parts["head"],
        }

    def brick_parameters(self) -> dict[str, int]:
        """Parameters of one brick of each kind, of one expert, and of one norm of the residual stream."""
        expert = self._mlp_parameters(self.moe_intermediate_size or 0)
        scores = self.hidden_size * self.num_experts
        router = scores * (2 if self.router_noise else 1) + (self.num_experts if self.router_bias else 0)
        return {
            "full_attention": self._attention_parameters(),
            "sliding_attention": self._attention_parameters(),
            "linear_attention": self._mamba_parameters(),
            "dense": self._mlp_parameters(self.intermediate_size or 0),
            "sparse": expert * self.num_experts + router,
            "none": 0,
            "expert": expert,
            "norm": self.hidden_size * (2 if self.norm_type == "layer_norm" else 1),
        }

    def flops(self, seq_len: int, document_tokens: float | None = None) -> dict[str, float]:
        """Floating-point operations of a forward pass per token of rows of `seq_len`, by part, with `layers` (all but
        the head) and `total`. A multiplication and an addition are two.

        Counted are matrix products, attention over the keys a query may see, and the scan with its convolution; norms,
        activations and the like are not, as is usual. A backward pass is twice as much.

        Args:
            document_tokens: mean length of the documents that share a row, beyond whose borders nothing is looked at;
                one document fills the row when None.
        """
        assert self.layer_types and self.mlp_layer_types, "call resolve() first"
        length = min(float(seq_len), document_tokens or seq_len)
        mixers = {
            "full_attention": (self._attention_flops(), self._score_flops(length, None), 0.0),
            "sliding_attention": (self._attention_flops(), self._score_flops(length, self.sliding_window), 0.0),
            "linear_attention": (self._mamba_flops(), 0.0, self._scan_flops()),
        }
        router = 2 * self.hidden_size * self.num_experts * (2 if self.router_noise else 1)
        mlps = {
            "dense": self._mlp_flops(self.intermediate_size or 0),
            "sparse": router + self.num_experts_per_tok * self._mlp_flops(self.moe_intermediate_size or 0),
            "none": 0,
        }
        self._require_known("operations", mixers, mlps)
        parts = {
            "token_mixers": float(sum(mixers[kind][0] for kind in self.layer_types)),
            "attention": sum(mixers[kind][1] for kind in self.layer_types),
            "scan": sum(mixers[kind][2] for kind in self.layer_types),
            "channel_mixers": float(sum(mlps[kind] for kind in self.mlp_layer_types)),
        }
        layers, head = sum(parts.values()), 2.0 * self.vocab_size * self.hidden_size
        return {**parts, "head": head, "layers": layers, "total": layers + head}

    def _require_known(self, what: str, mixers: Iterable[str], mlps: Iterable[str]) -> None:
        known = (*mixers, *mlps)
        for kind in (*(self.layer_types or ()), *(self.mlp_layer_types or ())):
            if kind not in known:
                raise ValueError(f"the {what} of {kind!r} are not known here: build the model and count them")

    # each brick: its parameters, and its operations for one token

    def _attention_parameters(self) -> int:
        assert self.head_dim and self.num_key_value_heads
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        bias = queries + 2 * keys + self.hidden_size if self.attention_bias else 0
        return self.hidden_size * (2 * queries + 2 * keys) + bias + (2 * self.head_dim if self.use_qk_norm else 0)

    def _attention_flops(self) -> int:
        assert self.head_dim and self.num_key_value_heads
        return 4 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def _score_flops(self, length: float, window: int | None) -> float:
        """Scores and weighted values over the keys that the queries of a document see on average."""
        assert self.head_dim
        seen = min(length, window or length)
        keys = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
        return 4 * self.num_attention_heads * self.head_dim * keys

    def _mamba_parameters(self) -> int:
        assert self.ssm_dt_rank
        h, d, n, r = self.hidden_size, self.ssm_expand * self.hidden_size, self.ssm_state_size, self.ssm_dt_rank
        conv = d * self.conv_kernel_size + (d if self.conv_bias else 0)
        ssm = d * (r + 2 * n) + r * d + d + d * n + d  # x_proj, dt_proj, dt_bias, A_log, D
        return 3 * h * d + conv + ssm + (r + 2 * n if self.ssm_norm else 0)

    def _mamba_flops(self) -> int:
        assert self.ssm_dt_rank
        h, d, n, r = self.hidden_size, self.ssm_expand * self.hidden_size, self.ssm_state_size, self.ssm_dt_rank
        return 2 * (3 * h * d + d * (r + 2 * n) + r * d)

    def _scan_flops(self) -> float:
        """The recurrence as written (an exponential counts as one): exp(delta A) h + (delta x) B, then C h + D x."""
        d, n = self.ssm_expand * self.hidden_size, self.ssm_state_size
        return float(d * (7 * n + 3) + 2 * d * self.conv_kernel_size)

    def _mlp_parameters(self, width: int) -> int:
        matrices = 3 if self.mlp_gated else 2
        bias = (matrices - 1) * width + self.hidden_size if self.mlp_bias else 0
        return matrices * self.hidden_size * width + bias

    def _mlp_flops(self, width: int) -> int:
        return 2 * (3 if self.mlp_gated else 2) * self.hidden_size * width


def tile(pattern: list[str], length: int) -> list[str]:
    """Repeat a short pattern over the depth: tile(["dense", "sparse"], 5) ends with "dense"."""
    return [pattern[i % len(pattern)] for i in range(length)]


def _known(field: str, values: Iterable[str], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for value in values:
        if value not in allowed:
            hint = did_you_mean(str(value), allowed)
            raise ValueError(f"{field}: {value!r} is not one of {', '.join(allowed)}{hint}")


def _check_rope(rope: dict[str, Any]) -> None:
    _known("rope_parameters.rope_type", [rope["rope_type"]], ROPE_TYPES)
    needed, optional = ROPE_TYPES[rope["rope_type"]]
    _known("rope_parameters", rope, ["rope_type", "rope_theta", "partial_rotary_factor", *needed, *optional])
    missing = [key for key in needed if key not in rope]
    if missing:
        raise ValueError(f"rope_parameters: rope_type {rope['rope_type']!r} needs {', '.join(missing)}")
