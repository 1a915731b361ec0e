"""One decoder layer, and the two dicts that are the whole registry of bricks.

A brick from outside the package enters with `register_token_mixer` or `register_channel_mixer`; a config may then name
it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moai_llm import architecture
from moai_llm.config import MoaiConfig
from moai_llm.modeling.attention import Attention
from moai_llm.modeling.mamba import Mamba
from moai_llm.modeling.mlp import MLP
from moai_llm.modeling.moe import MoE, RouterSums
from moai_llm.modeling.normalization import make_norm
from moai_llm.modeling.slots import SlotCache

# brick(config, layer_idx); forward(x_BLD, *, rope, mask, seq_idx, cache) -> y_BLD
TOKEN_MIXERS: dict[str, type[nn.Module]] = {
    "full_attention": Attention,
    "sliding_attention": Attention,
    "linear_attention": Mamba,
}
# brick(config, layer_idx); forward(x_BLD, *, token_mask, noise_key) -> (y_BLD, RouterSums | None)
CHANNEL_MIXERS: dict[str, type[nn.Module]] = {"dense": MLP, "sparse": MoE}


def register_token_mixer(name: str, brick: type[nn.Module]) -> None:
    """Let `layer_types` name this brick. A name that is there is replaced."""
    TOKEN_MIXERS[name] = brick
    if name not in architecture.TOKEN_MIXER_TYPES:
        architecture.TOKEN_MIXER_TYPES.append(name)


def register_channel_mixer(name: str, brick: type[nn.Module]) -> None:
    """Let `mlp_layer_types` name this brick. A name that is there is replaced."""
    CHANNEL_MIXERS[name] = brick
    if name not in architecture.CHANNEL_MIXER_TYPES:
        architecture.CHANNEL_MIXER_TYPES.append(name)


class DecoderLayer(GradientCheckpointingLayer):
    """norm -> token mixer -> add; norm -> channel mixer -> add (left out where mlp_layer_types says none)."""

    def __init__(self, config: MoaiConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None and config.mlp_layer_types is not None
        self.mixer_norm = make_norm(config)
        self.mixer = TOKEN_MIXERS[config.layer_types[layer_idx]](config, layer_idx)
        kind = config.mlp_layer_types[layer_idx]
        self.mlp_norm = None if kind == "none" else make_norm(config)
        self.mlp = None if kind == "none" else CHANNEL_MIXERS[kind](config, layer_idx)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        rope: Any,
        mask: Any,
        seq_idx: Tensor | None,
        past_key_values: Any,
        token_mask: Tensor | None,
        noise_key: Tensor | None,
    ) -> tuple[Tensor, RouterSums | None]:
        x_BLD = x_BLD + self.mixer(self.mixer_norm(x_BLD), rope=rope, mask=mask, seq_idx=seq_idx, cache=past_key_values)
        if self.mlp is None or self.mlp_norm is None:
            return x_BLD, None
        if isinstance(past_key_values, SlotCache) and isinstance(self.mlp, MoE):
            return x_BLD + self.mlp.step(self.mlp_norm(x_BLD)), None
        y, sums = self.mlp(self.mlp_norm(x_BLD), token_mask=token_mask, noise_key=noise_key)
        return x_BLD + y, sums
