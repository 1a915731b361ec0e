"""Which products of a run are computed in fp8 (`train.precision=fp8`), by torchao (arXiv 2209.05433 for the formats).

The linear layers of the decoder whose both sizes are multiples of 16, which the units of a GPU demand: their output and
both gradients are products of numbers in 8 bits, each tensor with one scale that is taken from it as it comes. Weights,
gradients and states stay fp32, and everything else runs as with bf16: embeddings and the output layer, whose weights a
loss reads; Mamba's x_proj and dt_proj, which make the step sizes of the recurrence; the router and the stacked
experts, which are no linear layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moai_llm.modeling.linear import Linear
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import MoaiError, require

UNIT = 16  # sizes must be multiples of it
CAPABILITY = (8, 9)  # of CUDA devices: Ada; then Hopper (9.0) and later
KEPT = ("x_proj", "dt_proj")


def require_device(device: torch.device) -> None:
    """Refuse a device that has no products in fp8."""
    advice = "set train.precision=bf16, or auto"
    if device.type != "cuda":
        raise MoaiError(
            f"train.precision=fp8 needs a CUDA device of compute capability 8.9 (Ada, Hopper) or later, and this run "
            f"is on {device}: {advice}"
        )
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        raise MoaiError(
            f"train.precision=fp8 needs compute capability 8.9 (Ada, Hopper) or later, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}: {advice}"
        )


def to_fp8(model: MoaiForCausalLM) -> MoaiForCausalLM:
    """Put torchao's layers where they belong. Parameters and their names stay, so what is saved is the plain model.

    Raises:
        MoaiError: torchao is missing, or no layer has sizes that fit.
    """
    float8 = require("torchao.float8", "fp8")
    chosen = {id(layer) for name, layer in _linear_layers(model) if takes(name, layer)}
    if not chosen:
        raise MoaiError(
            f"train.precision=fp8: no linear layer of this model has sizes that are multiples of {UNIT}: set "
            "train.precision=bf16"
        )
    float8.convert_to_float8_training(
        model.model.layers, config=settings(float8), module_filter_fn=lambda layer, _: id(layer) in chosen
    )
    return model


def takes(name: str, layer: nn.Linear) -> bool:
    """Whether a linear layer of the decoder is computed in fp8."""
    fits = layer.in_features % UNIT == 0 and layer.out_features % UNIT == 0
    return fits and name.rpartition(".")[2] not in KEPT


def describe(model: MoaiForCausalLM) -> str:
    """For people."""
    layers = list(_linear_layers(model))
    converted = sum(type(layer) is not Linear for _, layer in layers)
    left = sorted({name.rpartition(".")[2] for name, layer in layers if type(layer) is Linear})
    rest = f"; {', '.join(left)} and the output layer stay" if left else "; the output layer stays"
    return f"fp8: {converted} of {len(layers)} linear layers of the decoder{rest} as with bf16"


def _linear_layers(model: MoaiForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def settings(float8: Any) -> Any:
    """torchao's defaults, a scale for each tensor, and rows filled up: the gradient of a weight is a product over the
    tokens of a micro-batch, whose number may be no multiple of 16.
    """
    return float8.Float8LinearConfig(pad_inner_dim=True)
