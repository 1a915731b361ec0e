"""Caches of keys and values that hold less, hold it elsewhere, or hold fewer: one file an idea.

`make_cache` says which cache a model gets; `Session(text_model, cache=...)` uses it. All are caches of transformers. A
kind is about the layers of full attention. States of Mamba are no keys and stay as they are, and a sliding layer holds
its window and no more in every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from moai_llm.config import MoaiConfig
from moai_llm.inference.kv.fixed import FixedCache
from moai_llm.inference.kv.fp8 import Fp8Layer
from moai_llm.inference.kv.heavy import HeavyLayer
from moai_llm.inference.kv.keep import Keep, parse_keep
from moai_llm.inference.kv.mapped import MappedLayer
from moai_llm.inference.kv.offload import OffloadedLayer, chain
from moai_llm.inference.kv.options import KVOptions
from moai_llm.inference.kv.quantized import QuantizedLayer
from moai_llm.inference.kv.ring import RingLayer
from moai_llm.inference.kv.window import Turn, WindowLayer
from moai_llm.modeling.model import new_cache
from moai_llm.modeling.rope import BY_LENGTH, RotaryEmbedding
from moai_llm.ops.rotary import rotary_table, rotate
from moai_llm.runtime import MoaiError, did_you_mean

__all__ = ["KV_CACHES", "Keep", "KVOptions", "kv_cache", "make_cache", "parse_keep"]


def _dynamic(config: Any, options: KVOptions) -> Cache:
    """transformers' own, which grows; of sliding layers it holds the window."""
    return new_cache(config) if isinstance(config, MoaiConfig) else DynamicCache(config=config)


def _static(config: Any, options: KVOptions) -> Cache:
    _require_keys(config, "static")
    return FixedCache(config, options.length or config.max_position_embeddings)


def _sliding(config: Any, options: KVOptions) -> Cache:
    _require_ours(config, "--kv-cache sliding")
    cache = _dynamic(config, options)
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if full and options.window is None:
        raise MoaiError(
            "--kv-cache sliding: this model has layers of full attention, which must be told how many keys they see: "
            "add --kv-window N"
        )
    _require_keys(config, "sliding")
    for i, layer in enumerate(cache.layers):
        if i in full:
            assert options.window is not None
            cache.layers[i] = RingLayer(options.window)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = RingLayer(layer.sliding_window)
    return _endless(cache, config)


def _of_layers(config: Any, options: KVOptions, name: str, make: Callable[[KVOptions], CacheLayerMixin]) -> Cache:
    """A dynamic cache whose layers of full attention are replaced."""
    cache = _dynamic(config, options)
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        _require_keys(config, name)
        raise MoaiError(
            f"--kv-cache {name} is for layers of full attention, and this model has none: its sliding layers hold a "
            "window and no more. Take --kv-cache dynamic, static or sliding"
        )
    for i in full:
        cache.layers[i] = make(options)
    return cache


def _quantized(bits: int, config: Any, options: KVOptions) -> Cache:
    return _of_layers(config, options, f"int{bits}", lambda o: QuantizedLayer(bits, o.group, o.residual))


def _fp8(config: Any, options: KVOptions) -> Cache:
    return _of_layers(config, options, "fp8", lambda _: Fp8Layer())


def _mmap(config: Any, options: KVOptions) -> Cache:
    return _of_layers(config, options, "mmap", lambda o: MappedLayer(o.directory))


def _offload(config: Any, options: KVOptions) -> Cache:
    if torch.device(options.device).type == "cpu":
        raise MoaiError(
            "--kv-cache offload brings keys and values into the memory of the CPU, and this model is there already: "
            "take --kv-cache mmap for a context longer than memory, or int8"
        )
    cache = _of_layers(config, options, "offload", lambda _: OffloadedLayer())
    chain([layer for layer in cache.layers if isinstance(layer, OffloadedLayer)])
    return cache


# name -> (config, options) -> an empty cache
KV_CACHES: dict[str, Callable[[Any, KVOptions], Cache]] = {
    "dynamic": _dynamic,
    "static": _static,
    "sliding": _sliding,
    "int8": partial(_quantized, 8),
    "int4": partial(_quantized, 4),
    "fp8": _fp8,
    "offload": _offload,
    "mmap": _mmap,
}


def make_cache(
    config: Any, kind: str = "dynamic", keep: str | Keep | None = None, options: KVOptions | None = None
) -> Cache:
    """An empty cache for a model of this config.

    Args:
        kind: one of `KV_CACHES`.
        keep: which keys layers of full attention hold, see `parse_keep`; all when None. With `dynamic` only.

    Raises:
        MoaiError: an unknown kind, or one that this model cannot have.
    """
    if kind not in KV_CACHES:
        raise MoaiError(f"--kv-cache {kind!r} is not one of {', '.join(KV_CACHES)}{did_you_mean(kind, KV_CACHES)}")
    options = options or KVOptions()
    if keep is None:
        return KV_CACHES[kind](config, options)
    if kind != "dynamic":
        raise MoaiError(f"--kv-keep holds fewer keys of --kv-cache dynamic; it does not go with {kind}: choose one")
    keep = parse_keep(keep) if isinstance(keep, str) else keep
    _require_ours(config, "--kv-keep")
    cache = _dynamic(config, options)
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        raise MoaiError(
            "--kv-keep forgets keys of full attention, and this model has no such layer: what its layers hold does not "
            "grow. Leave it out"
        )
    turn = _turning(config) if keep.sinks else None
    for i in full:
        cache.layers[i] = HeavyLayer(keep.heavy, keep.window) if keep.heavy else WindowLayer(
            keep.window, keep.sinks, turn
        )  # fmt: skip
    return cache if keep.heavy else _endless(cache, config)


def _endless(cache: Cache, config: Any) -> Cache:
    """Tell a `Session` that the text may become longer than the model's context, if the positions allow it: no key is
    farther from a query than the window and the sinks are long.
    """
    cache.endless = config.position_embedding != "learned"  # type: ignore[attr-defined]
    return cache


def kv_cache(
    text_model: Any, kind: str = "dynamic", keep: str | Keep | None = None, **options: Any
) -> Callable[[], Cache]:
    """`Session(model, cache=kv_cache(model, "int4"))`. What is wrong is told now, not at the first token."""
    config = text_model.model.config
    chosen = KVOptions(**{"device": str(text_model.model.device), **options})
    make_cache(config, kind, keep, chosen)
    return lambda: make_cache(config, kind, keep, chosen)


def _require_keys(config: Any, name: str) -> None:
    kinds = getattr(config, "layer_types", None)
    if kinds and all(kind == "linear_attention" for kind in kinds):
        raise MoaiError(
            f"--kv-cache {name}: this model keeps no keys and values. Its Mamba layers hold a state that does not grow "
            "with the text, so there is nothing to make smaller: leave the option out"
        )


def _require_ours(config: Any, what: str) -> None:
    if not isinstance(config, MoaiConfig):
        raise MoaiError(
            f"{what} needs attention that can look at fewer keys than there were tokens, and a model of type "
            f"{config.model_type} computes its own: bring it here with `moai import`"
        )


def _turning(config: Any) -> Turn | None:
    """How a query is turned back by so many positions; None where nothing rotates."""
    if not config.rotates:
        return None
    rope = RotaryEmbedding(config)
    if rope.rope_type in BY_LENGTH:
        raise MoaiError(
            f"sinks are kept near by their rotation, and that of {rope.rope_type} RoPE depends on the length of the "
            "text: take window:N or heavy:K+window:N"
        )
    frequencies = rope.frequencies()

    def turn(q: Tensor, positions: Tensor) -> Tensor:
        cos, sin = rotary_table(positions[None], frequencies.to(q.device))
        return rotate(q, cos[:, None], -sin[:, None])

    return turn
