"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen model: put in place, summed up with it, written for peft.

The adapters are peft's layers inside our model. What a run saves is still an ordinary model, weights and adapters
summed, so whatever reads models needs to know nothing of this; the adapters alone lie beside it. To go on with them
takes the model they were begun on: from a sum the parts do not come back to the bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.modeling.moe import EXPERT_WEIGHTS, MoE
from moai_llm.ops.nf4_weight import NF4Weight
from moai_llm.optimization import LoraConfig
from moai_llm.recipe import Recipe
from moai_llm.runtime import MoaiError, did_you_mean, require
from moai_llm.training.reference import fingerprint_of

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
NAME, PEFT = ".default.", "base_model.model."  # the adapter's name inside the model; how names begin in peft's files


def add_adapters(model: MoaiForCausalLM, config: LoraConfig, base: str | None = None) -> None:
    """Freeze the model and put adapters into it, which change nothing until they are trained.

    Args:
        base: where the model lies, which peft is told in the adapter's config.

    Raises:
        MoaiError: peft is missing, a pattern finds no linear layer, or there are no experts.
    """
    peft = require("peft", "lora")
    modules, experts = _linear_layers(model, config), _expert_weights(model) if config.experts else []
    if config.experts and not experts:
        raise MoaiError("lora.experts=true, and this model has no experts: leave it out")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=modules, target_parameters=experts or None,
    )  # fmt: skip
    model.requires_grad_(False)
    settings.base_model_name_or_path = base
    peft.inject_adapter_in_model(settings, model)
    for module in model.modules():
        if hasattr(module, "lora_A"):  # autocast casts once for all readers
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]


def has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def describe(model: nn.Module) -> str:
    """For people."""
    from peft.tuners.lora.layer import LoraLayer

    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trained / sum(p.numel() for p in model.parameters())
    return f"LoRA: {trained:,} parameters in {layers} adapters are trained, {share:.2%} of all"


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapters by the names of peft's files."""
    named = model.named_parameters()
    return {PEFT + name.replace(NAME, "."): p.detach() for name, p in named if ".lora_" in name}


@torch.no_grad()
def summed_weights(model: MoaiForCausalLM) -> dict[str, Tensor]:
    """The weights of the plain model that computes what the model with its adapters does. Below weights in 4 bits that
    is what they stand for, not what they were made from; all of it is then in the host's memory.
    """
    from peft.tuners.lora.layer import Linear, ParamWrapper

    quantized = any(isinstance(parameter, NF4Weight) for parameter in model.parameters())
    weights: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            plain = tensor.unpacked() if isinstance(tensor, NF4Weight) else tensor.detach()
            weights[name.replace(".base_layer", "")] = plain.cpu() if quantized else plain
    for name, module in model.named_modules():
        if isinstance(module, (Linear, ParamWrapper)):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            key = f"{name.replace('.base_layer', '')}.{parameter}"
            weights[key] = weights[key] + module.get_delta_weight("default").to(weights[key].device)
    return weights


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model below the adapters, for as long as this lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def plain_twin(model: MoaiForCausalLM) -> MoaiForCausalLM:
    """The model without adapters and without memory, to be saved with `summed_weights`."""
    with torch.device("meta"):
        twin = type(model)(model.config)
    twin.generation_config = model.generation_config
    return twin


def write_adapter(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A folder as peft reads it."""
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def adapter_config(model: Any) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def load_adapter(directory: Path, model: nn.Module) -> None:
    """Adapters that a checkpoint of this run holds.

    Raises:
        MoaiError: they are not those of this model.
    """
    file = directory / WEIGHTS
    found = load_file(file) if file.is_file() else {}
    wanted = {PEFT + name.replace(NAME, "."): p for name, p in model.named_parameters() if ".lora_" in name}
    if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in wanted.items()}:
        raise MoaiError(f"{directory} does not hold the adapters of this recipe and model")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])


def base_identity(recipe: Recipe) -> dict[str, str]:
    """The digest of the model below the adapters, which a resumed run must find again; nothing without adapters."""
    return {"base": fingerprint_of(Path(recipe.train.init_from or ""))} if recipe.lora.rank else {}


def _linear_layers(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers to adapt. The output layer stays: the loss reads its weights."""
    names = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n != "lm_head"]
    if config.targets == "all-linear":
        return names
    for pattern in config.targets:
        if not any(re.search(pattern, name) for name in names):
            kinds = list(dict.fromkeys(re.sub(r"\d+", "N", name) for name in names))
            words = {part for name in names for part in name.split(".") if not part.isdigit()}
            hint = next((near for word in re.findall(r"\w+", pattern) if (near := did_you_mean(word, words))), "")
            raise MoaiError(
                f"lora.targets: {pattern!r} finds no linear layer{hint}; there are {', '.join(kinds)}, where N is a "
                "number"
            )
    return [name for name in names if any(re.search(pattern, name) for pattern in config.targets)]


def _expert_weights(model: nn.Module) -> list[str]:
    layers = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    return [f"{layer}.{weight}" for layer in layers for weight in EXPERT_WEIGHTS]
