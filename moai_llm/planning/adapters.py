"""What adapters add to a layer and what a frozen layer no longer keeps: LoRA, and QLoRA with its weights in 4 bits.

The matrices of a layer by the names they have in the model; `tests/planning/test_adapters.py` compares them with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moai_llm.architecture import Architecture
from moai_llm.optimization import NF4_KEPT, LoraConfig

BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}  # of a weight, by whether its scales are bytes, too


class Matrix(NamedTuple):
    name: str
    inputs: int
    outputs: int
    experts: int = 1

    @property
    def size(self) -> int:
        return self.inputs * self.outputs * self.experts


@dataclass(frozen=True)
class Adapters:
    """What is trained in one layer of a frozen model."""

    rank: int
    names: frozenset[str]  # of the matrices that have an adapter
    bits: float  # of a weight that lies in 4 bits; 32 where none does

    def parameters(self, matrices: list[Matrix]) -> int:
        return sum(self.rank * m.experts * (m.inputs + m.outputs) for m in matrices if m.name in self.names)

    def packed(self, matrix: Matrix) -> bool:
        return self.bits < 32 and matrix.name.rpartition(".")[2] not in NF4_KEPT


def of_layer(config: LoraConfig, a: Architecture, layer: int) -> Adapters | None:
    """None where all weights are trained."""
    if not config.rank:
        return None
    assert a.layer_types and a.mlp_layer_types
    names = set()
    for matrix in [*mixer_matrices(a, a.layer_types[layer]), *mlp_matrices(a, a.mlp_layer_types[layer])]:
        full = f"model.layers.{layer}.{matrix.name}"
        linear = config.targets == "all-linear" or any(re.search(pattern, full) for pattern in config.targets)
        if config.experts if matrix.experts > 1 else linear:
            names.add(matrix.name)
    return Adapters(config.rank, frozenset(names), BITS[config.double_quant] if config.quantize else 32.0)


def mixer_matrices(a: Architecture, kind: str) -> list[Matrix]:
    h = a.hidden_size
    if kind == "linear_attention":
        assert a.ssm_dt_rank
        d, r = int(a.ssm_expand * h), a.ssm_dt_rank
        sizes = {
            "in_proj_x": (h, d), "in_proj_z": (h, d), "x_proj": (d, r + 2 * a.ssm_state_size), "dt_proj": (r, d),
            "out_proj": (d, h),
        }  # fmt: skip
    else:
        assert a.head_dim and a.num_key_value_heads
        q, k = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
        sizes = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
    return [Matrix(f"mixer.{name}", *size) for name, size in sizes.items()]


def mlp_matrices(a: Architecture, kind: str) -> list[Matrix]:
    if kind == "none":
        return []
    h = a.hidden_size
    if kind == "sparse":
        f, e = a.moe_intermediate_size or 0, a.num_experts
        return [Matrix("mlp.up_proj", h, f * (2 if a.mlp_gated else 1), e), Matrix("mlp.down_proj", f, h, e)]
    f = a.intermediate_size or 0
    names = ("gate_proj", "up_proj") if a.mlp_gated else ("up_proj",)
    return [*(Matrix(f"mlp.{name}", h, f) for name in names), Matrix("mlp.down_proj", f, h)]


def count(config: LoraConfig, a: Architecture) -> int:
    """Parameters of all adapters, which are what is trained."""
    return sum(adapters.parameters(matrices) for adapters, matrices in _layers(config, a))


def frozen_flops(config: LoraConfig, a: Architecture) -> float:
    """Operations a token that a backward does without: the gradients of frozen matrices, the output layer among them,
    less what adapters add to all of a step.
    """
    saved = 2.0 * a.vocab_size * a.hidden_size
    for adapters, matrices in _layers(config, a):
        for m in matrices:
            used = a.num_experts_per_tok if m.experts > 1 else 1
            whole = m.experts > 1 and m.name in adapters.names  # the gradient of the weight is made, and from it theirs
            saved += 0 if whole else 2.0 * used * m.inputs * m.outputs
            if m.name in adapters.names:
                saved -= 3 * 2.0 * used * adapters.rank * (m.inputs + m.outputs)
    return saved


def _layers(config: LoraConfig, a: Architecture) -> Iterator[tuple[Adapters, list[Matrix]]]:
    assert a.layer_types and a.mlp_layer_types
    for layer, (mixer, mlp) in enumerate(zip(a.layer_types, a.mlp_layer_types)):
        adapters = of_layer(config, a, layer)
        if adapters is not None:
            yield adapters, [*mixer_matrices(a, mixer), *mlp_matrices(a, mlp)]
