"""What the layers of our own caches have in common: how many tokens they have seen, and rows that can be picked.

They are layers of a transformers `Cache`. One that has `attend` computes the attention itself, in models of our bricks
(modeling/attention.py asks for it): so it can hold fewer keys than there were tokens, or read them in blocks. `update`
gives a model of another class all keys, where a layer can do that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from moai_llm.ops.streamed_attention import streamed_attention
from moai_llm.runtime import MoaiError


class Layer(CacheLayerMixin):
    """`seen` counts tokens, held or not. `held` names the tensors, which all have the rows of the batch first."""

    held: tuple[str, ...] = ()
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember what kind of tensors these are; `start` makes the first, empty ones."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.start(key_states, value_states)
        self.is_initialized = True

    def start(self, k: Tensor, v: Tensor) -> None:
        """Make the tensors for (B, K, any, d), without a token in them."""

    def ready(self, k: Tensor, v: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(k, v)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        raise MoaiError("this cache does not hold every key, which only models of our bricks understand")

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [getattr(self, name) for name in self.held] if self.is_initialized else []

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized, self.seen = False, 0
        for name in self.held:
            setattr(self, name, None)

    def offload(self) -> None:
        """Everything stays where it is."""

    def prefetch(self) -> None:
        """Everything is where it is."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            for name in self.held:
                tensor = getattr(self, name)
                setattr(self, name, tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            for name in self.held:
                setattr(self, name, getattr(self, name).repeat_interleave(repeats, 0))


class StreamedLayer(Layer):
    """Holds every token in a form of its own, and gives keys and values back in blocks."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Hold more tokens."""
        raise AssertionError("a streamed layer must say how it holds")

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What is held as keys and values (B, K, n, d), in the order of the tokens."""
        raise AssertionError("a streamed layer must say how it reads")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, L, d) new queries over what is held and the new (B, K, L, d), which are held from then on."""
        self.ready(k, v)
        y = streamed_attention(q, self.blocks(), k, v)
        self.append(k, v)
        self.seen += k.shape[2]
        return y

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.ready(key_states, value_states)
        pairs = [*self.blocks(), (key_states, value_states)]
        self.append(key_states, value_states)
        self.seen += key_states.shape[2]
        return torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2)
