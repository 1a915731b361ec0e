"""MoaiConfig: an `Architecture` that transformers can save, load and build a model from."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from moai_llm.architecture import Architecture

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
    `expand_factor`) are translated.

    Raises:
        ValueError: the choice of bricks contradicts itself.
    """

    model_type = "moai"
    keys_to_ignore_at_inference = ["past_key_values"]
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

    def __post_init__(self, **kwargs: Any) -> None:
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

    def validate_layer_type(self) -> None:
        """Replaces transformers' check, which does not know `none`; `Architecture.resolve` has checked both lists."""


AutoConfig.register("moai", MoaiConfig)
