"""MoaiConfig: an `Architecture` that transformers can save, load and build a model from."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from moai_llm.architecture import Architecture
from moai_llm.runtime import MoaiError, did_you_mean

# keys that transformers and its older versions write into any config.json
FOREIGN_KEYS = ("rope_scaling", "rope_theta", "torch_dtype", "auto_map", "output_attentions", "_name_or_path")
# keys of the older Mamba JSON files -> ours; None: the key steered something that no longer belongs to the architecture
LEGACY_KEYS = {
    "state_size": "ssm_state_size",
    "expand_factor": "ssm_expand",
    "use_fast_scan": None,
    "use_checkpoint": None,
    "quantization_bits": None,
    "use_quantization": None,
}


@strict
class MoaiConfig(Architecture, PreTrainedConfig):
    """The fields of `Architecture` plus token ids and transformers' own. Unknown keyword arguments are kept, as
    transformers does.

    `rope_scaling` and `rope_theta` are read into `rope_parameters`; the older Mamba keys (`state_size`,
    `expand_factor`) are translated, and without `layer_types` they mean that every layer is Mamba.

    Raises:
        ValueError: the choice of bricks contradicts itself.
    """

    model_type = "moai"
    keys_to_ignore_at_inference = ["past_key_values"]
    auto_map: ClassVar[dict[str, str]] = {}  # no code on the Hub; trl reads it of every class outside transformers
    base_model_tp_plan = {
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_cache: bool = True
    embedding: dict[str, Any] | None = None  # of a model that makes vectors, see modeling/embedding.py

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None and LEGACY_KEYS.keys() & kwargs:
            self.layer_types = ["linear_attention"]
        for old, new in LEGACY_KEYS.items():
            if old in kwargs:
                value = kwargs.pop(old)
                if new is not None:
                    setattr(self, new, value)
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        if "rope_theta" in kwargs:
            rope = {"rope_theta": kwargs.pop("rope_theta"), **rope}
        self.rope_parameters = rope
        self.resolve()
        super().__post_init__(**kwargs)
        if not self.rotates:
            self.rope_parameters = None  # transformers fills in a default that no layer would read
        import_module("moai_llm.modeling.embedding")  # who has a config may ask an Auto class for its model

    def validate_layer_type(self) -> None:
        """Replaces transformers' check, which does not know `none`; `Architecture.resolve` has checked both lists."""


def read_config(file: Path) -> MoaiConfig:
    """The config of a JSON file, ours or one of the older projects.

    Raises:
        MoaiError: no such file, not JSON, another kind of model, an unknown key, or bricks that contradict each other.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoaiError(f"{file}: no such file" if isinstance(error, FileNotFoundError) else str(error)) from None
    except ValueError as error:
        raise MoaiError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise MoaiError(f"{file} is not a config: expected an object")
    kind = values.pop("model_type", "moai")
    if kind == "mamba_moai":  # the older Mamba files: every layer Mamba, a SwiGLU after it
        values.setdefault("layer_types", ["linear_attention"])
    elif kind != "moai":
        raise MoaiError(f"{file}: model_type {kind!r} is not ours; bring it here with `moai import`")
    known = [*(f.name for f in fields(MoaiConfig)), *LEGACY_KEYS, *FOREIGN_KEYS]
    for key in values:
        if key not in known and not key.endswith("_token_id"):
            raise MoaiError(f"{file}: unknown key {key!r}{did_you_mean(key, known)}")
    try:
        return MoaiConfig(**values)
    except (ValueError, TypeError) as error:
        raise MoaiError(f"{file}: {error}") from None


AutoConfig.register("moai", MoaiConfig)
