"""Which weights of a frozen model lie in 4 bits below its adapters (QLoRA, arXiv 2305.14314), and what that saves.

The matrices of attention, of Mamba's large projections, of dense channel mixers and of experts. What stays as it is:
embeddings and the output layer, which a loss reads; Mamba's x_proj and dt_proj, which make the step sizes of the
recurrence, and whatever is no matrix product (convolution, A_log, norms, biases); the router, whose choice of experts
must not move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from moai_llm.modeling.attention import Attention
from moai_llm.modeling.mamba import Mamba
from moai_llm.modeling.mlp import MLP
from moai_llm.modeling.moe import EXPERT_WEIGHTS, MoE
from moai_llm.ops.nf4_weight import NF4Weight, stored_bytes
from moai_llm.optimization import NF4_KEPT

PARTS = {"attention": Attention, "Mamba": Mamba, "dense mixers": MLP, "experts and router": MoE}


class Part(NamedTuple):
    """Bytes of a part of the model."""

    name: str
    before: int
    after: int


@torch.no_grad()
def quantize(model: nn.Module, device: torch.device, *, double: bool) -> None:
    """Put the matrices of a model into 4 bits on a device, one after the other: all of it is never there in fp32."""
    for module, name in list(_matrices(model)):
        weight = getattr(module, name).to(device=device, dtype=torch.float32)
        setattr(module, name, nn.Parameter(NF4Weight.of(weight, double=double), requires_grad=False))


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in NF4_KEPT:
            yield module, "weight"
        elif isinstance(module, MoE):
            yield from ((module, weight) for weight in EXPERT_WEIGHTS)


def parts(model: nn.Module) -> list[Part]:
    """What each part of a model took in fp32, and takes; adapters are not counted."""
    found: dict[str, list[int]] = {}
    owner = {
        id(p): name
        for module in model.modules()
        for name, kind in PARTS.items()
        if isinstance(module, kind)
        for p in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            kind = owner.get(id(parameter), "embeddings and head" if parameter.dim() > 1 else "norms")
            sizes = found.setdefault(kind, [0, 0])
            sizes[0] += 4 * parameter.numel()
            sizes[1] += stored_bytes(parameter)
    return [Part(name, *sizes) for name, sizes in sorted(found.items())]


def describe(model: nn.Module) -> list[str]:
    """A table for people."""
    rows = parts(model)
    total = Part("all", sum(row.before for row in rows), sum(row.after for row in rows))
    width = max(len(row.name) for row in rows)
    lines = [f"NF4: {_size(total.before)} of frozen weights take {_size(total.after)}, MiB before and after"]
    return lines + [f"  {row.name:{width}}  {row.before / 2**20:10,.2f}  {row.after / 2**20:10,.2f}" for row in rows]


def _size(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
