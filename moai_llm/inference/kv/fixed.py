"""transformers' `StaticCache`, which says when it is full: tensors of one size for good, as compilation wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import CacheLayerMixin

from moai_llm.runtime import MoaiError


class FixedCache(StaticCache):
    """Room for so many tokens, from the first one on.

    Args:
        length: tokens it has room for.
    """

    def __init__(self, config: Any, length: int) -> None:
        super().__init__(config=config, max_cache_len=length)
        self.length = length
        self._first = next(i for i, layer in enumerate(self.layers) if isinstance(layer, CacheLayerMixin))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if layer_idx == self._first and not torch.compiler.is_compiling():
            needed = int(self.get_seq_length(layer_idx)) + key_states.shape[2]
            if needed > self.length:
                raise MoaiError(
                    f"the static cache has room for {self.length} tokens, {needed} do not fit: ask for fewer new "
                    "tokens, or take --kv-cache dynamic"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
