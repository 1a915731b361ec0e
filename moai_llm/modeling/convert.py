"""Weights between MoaiForCausalLM and the transformers classes that compute the same function, see families.py.

A family is a table of names there; everything here is shared. Both sides are models in memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers
from torch import Tensor

from moai_llm.config import MoaiConfig
from moai_llm.modeling.families import FAMILIES, SHARED_FIELDS, Family
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.runtime import did_you_mean

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


def refusals(config: MoaiConfig) -> dict[str, str | None]:
    """family -> why it cannot compute what this config says; None where it can."""
    return {name: family.reason(config) for name, family in FAMILIES.items()}


def native_family(config: MoaiConfig, family: str | None = None) -> str:
    """The first family that computes exactly what this config says, or `family`, if it does.

    Raises:
        ValueError: none does; the message gives each family's reason.
    """
    reasons = refusals(config)
    if family is not None:
        if family not in reasons:
            raise ValueError(f"{family!r} is none of the families {', '.join(reasons)}{did_you_mean(family, reasons)}")
        if reasons[family] is not None:
            raise ValueError(f"{family}: {reasons[family]}")
        return family
    fits = next((name for name, reason in reasons.items() if reason is None), None)
    if fits is None:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise ValueError(f"no transformers class computes this model:\n{lines}")
    return fits


@torch.no_grad()
def to_native(model: MoaiForCausalLM, family: str | None = None) -> transformers.PreTrainedModel:
    """A transformers model with the same logits. `family` is chosen by `native_family` when None.

    Raises:
        ValueError: the family, or any, cannot compute this model.
    """
    name = native_family(model.config, family)
    chosen, (config, ours) = FAMILIES[name], prepared(model, name)
    fields = {**{name: getattr(config, name) for name in SHARED_FIELDS}, **chosen.to_config(config)}
    native = getattr(transformers, chosen.model_class)(getattr(transformers, chosen.config_class)(**fields))
    weights = {}
    for theirs, keys in _grouped(_pairs(config, chosen)).items():
        tensors = [ours[key] for key in keys]
        weights[theirs] = tensors[0][:, None] if theirs.endswith("conv1d.weight") else torch.cat(tensors)
    native.load_state_dict(weights, strict=True)
    return native.to(model.dtype).train(model.training)


def prepared(model: MoaiForCausalLM, family: str) -> tuple[MoaiConfig, dict[str, Tensor]]:
    """Config and weights that a family holds: the model's, and those of a layer that adds nothing where it needs one
    more, see `Family.prepare`.
    """
    config, state = FAMILIES[family].prepare(model.config), model.state_dict()
    if config is not model.config:
        with torch.device("meta"):
            wanted = MoaiForCausalLM(config).state_dict()
        for key, shape in wanted.items():
            if key not in state:
                full = torch.ones if key.endswith("norm.weight") else torch.zeros
                state[key] = full(shape.shape, dtype=model.dtype, device=model.device)
    return config, state


@torch.no_grad()
def from_native(native: transformers.PreTrainedModel) -> MoaiForCausalLM:
    """Our model with the same logits as one of a class of `FAMILIES`.

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
        if keys[0].endswith(family.zeros):
            weights[keys[0]] = torch.zeros_like(model.get_parameter(keys[0]))
            continue
        parts = source[name].squeeze(1)[None] if name.endswith("conv1d.weight") else source[name].chunk(len(keys))
        weights.update(zip(keys, parts))
    model.load_state_dict(weights, strict=True)
    return model.to(native.dtype).train(native.training)  # type: ignore[arg-type]


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
