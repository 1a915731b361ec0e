"""RoPE frequencies for a config: transformers' own formulas, with one scale for the whole life of a sequence.

Dynamic NTK and LongRoPE choose their frequencies by the length of the sequence. transformers chooses anew at every
forward, so keys cached under one choice meet queries under another. Here the length is declared before the first
token (`length`), and cached generation equals the uncached forward.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moai_llm.config import MoaiConfig
from moai_llm.ops.rotary import rotary_table

BY_LENGTH = ("dynamic", "longrope")


class RotaryEmbedding(nn.Module):
    """Positions -> (cos, sin), shared by all attention layers of a model."""

    def __init__(self, config: MoaiConfig) -> None:
        super().__init__()
        self.config = config
        assert config.rope_parameters is not None
        self.rope_type: str = config.rope_parameters["rope_type"]
        # plain attributes: a buffer would follow model.to(bf16), and frequencies must stay fp32
        with torch.device("cpu"):
            self._fixed = self._frequencies(None)
        self._on_device: dict[torch.device, Tensor] = {}

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        """(inverse frequencies (r/2,) fp32, attention factor) for a sequence of this length."""
        if self.rope_type == "default":
            rope, dim = self.config.rope_parameters, self.config.head_dim
            assert rope is not None and dim is not None
            dim = int(dim * rope.get("partial_rotary_factor", 1.0))
            exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            return 1.0 / (rope["rope_theta"] ** exponents), 1.0
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, torch.device("cpu"), seq_len=length)

    def frequencies(self) -> Tensor:
        """(r/2,) those of a rule that does not depend on the length."""
        assert self.rope_type not in BY_LENGTH
        return self._fixed[0]

    def choice(self, length: int) -> int:
        """What the frequencies depend on: keys rotated for two lengths of one choice go together, others do not."""
        if self.rope_type == "dynamic":
            return max(length, self.config.max_position_embeddings)
        if self.rope_type == "longrope":
            rope = self.config.rope_parameters
            assert rope is not None
            return int(length > rope.get("original_max_position_embeddings", self.config.max_position_embeddings))
        return 0

    def forward(
        self, position_ids: Tensor, length: int | list[int], pieces: list[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, r/2) in fp32 for positions (B, L) of sequences that will reach `length` tokens, one number
        for all or one for each. With `pieces` the sequences lie end to end in one row, so many positions of each.
        """
        device = position_ids.device
        if self.rope_type in BY_LENGTH:
            if isinstance(length, list):
                if len({self.choice(end) for end in length}) > 1:
                    dim, sizes = (0, 1) if pieces is None else (1, pieces)
                    tables = [self(part, end) for part, end in zip(position_ids.split(sizes, dim), length)]
                    return torch.cat([cos for cos, _ in tables], dim), torch.cat([sin for _, sin in tables], dim)
                length = max(length)
            inv_freq, factor = self._frequencies(length)
            return rotary_table(position_ids, inv_freq.to(device), factor)
        inv_freq, factor = self._fixed
        if device not in self._on_device:
            self._on_device[device] = inv_freq.to(device)
        return rotary_table(position_ids, self._on_device[device], factor)
