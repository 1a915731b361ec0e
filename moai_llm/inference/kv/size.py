"""How many bytes a cache holds: counted in its tensors, and predicted from a config by a formula for each kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import Cache

from moai_llm.inference.kv.keep import Keep
from moai_llm.inference.kv.layer import Layer
from moai_llm.inference.kv.mapped import MappedLayer, room
from moai_llm.inference.kv.quantized import value_group


def held_bytes(cache: Cache) -> int:
    """Bytes of the memory behind the tensors of a cache; a view counts with all that it keeps alive. The files of
    `mmap` count as well: `in_files` says which.
    """
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache) if t.numel()}
    return sum(memory.values())


def in_files(cache: Cache) -> bool:
    return any(isinstance(layer, MappedLayer) for layer in cache.layers)


def _tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        if isinstance(layer, Layer):
            yield from layer.tensors()
            continue
        for name in ("keys", "values"):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                yield tensor
        for name in ("conv_states", "recurrent_states"):
            yield from (t for t in getattr(layer, name, {}).values() if t is not None)


def predicted_bytes(
    config: Any, kind: str, tokens: int, size: int, keep: Keep | None = None, **options: int | None
) -> int:
    """Bytes of one sequence of `tokens`, each number `size` bytes as it comes from the model.

    Args:
        options: `length`, `window`, `group`, `residual` as in `KVOptions`.
    """
    heads, width = config.num_key_value_heads, config.head_dim
    vector = 2 * heads * width * size  # key and value of a token
    group, residual = options.get("group") or 32, options.get("residual")
    residual = 128 if residual is None else residual
    small = size if size == 2 else 4  # of a stored minimum or step

    def quantized(bits: int) -> int:
        packed = max(0, tokens - residual) // group * group
        limits = packed // group * width + packed * (width // value_group(group, width))
        return heads * (2 * packed * width * bits // 8 + 2 * small * limits) + vector * (tokens - packed)

    def kept() -> int:
        assert keep is not None
        if keep.heavy:  # and the mass of each, in fp32 or wider
            return min(tokens, keep.count) * (vector + heads * max(4, size))
        return (min(tokens, keep.sinks) + min(max(0, tokens - keep.sinks), keep.window - 1)) * vector

    length = options.get("length") or config.max_position_embeddings
    window = config.sliding_window or 0
    full = {
        "dynamic": lambda: kept() if keep else tokens * vector,
        "static": lambda: length * vector,
        "sliding": lambda: (options.get("window") or 0) * vector,
        "int8": lambda: quantized(8),
        "int4": lambda: quantized(4),
        "fp8": lambda: tokens * 2 * heads * (width + 4),
        "offload": lambda: room(tokens) * vector,
        "mmap": lambda: room(tokens) * vector,
    }
    sliding = {"static": min(window, length), "sliding": window}.get(kind, min(tokens, window))
    inner = config.ssm_expand * config.hidden_size if hasattr(config, "ssm_expand") else 0
    of = {
        "full_attention": full[kind],
        "sliding_attention": lambda: sliding * vector,
        # the recurrence is in fp32 at least
        "linear_attention": lambda: inner * (max(4, size) * config.ssm_state_size + size * config.conv_kernel_size),
    }
    kinds = config.layer_types or ["full_attention"] * config.num_hidden_layers
    return sum(of[kind]() for kind in kinds)
