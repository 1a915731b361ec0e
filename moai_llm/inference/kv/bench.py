"""What a cache costs and what it saves, on one model and one text: bytes, perplexity, speed.

Perplexity is that of tokens that went through the cache in small chunks, each predicted from what the cache then held.
Speeds of the kinds are taken in turns, so that a machine that becomes busy is unfair to all of them alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from moai_llm.config import MoaiConfig
from moai_llm.inference.kv import KV_CACHES, make_cache
from moai_llm.inference.kv.keep import Keep, parse_keep
from moai_llm.inference.kv.options import KVOptions
from moai_llm.inference.kv.size import held_bytes, in_files, predicted_bytes
from moai_llm.runtime import MoaiError, did_you_mean

CHUNK = 512  # tokens of the prompt at once, where speed is measured
BASE = "dynamic"


@dataclass
class Row:
    """One kind or policy.

    Attributes:
        bytes_per_token: held at the end, over the tokens seen; `predicted` is the same by the formula of `size`.
        on_disk: these bytes are in a file.
        ratio: of the new tokens a second, to that of a dynamic cache.
        change: of the perplexity against a dynamic cache, as a fraction.
    """

    name: str
    bytes_per_token: float
    predicted: float
    on_disk: bool
    perplexity: float
    change: float
    tokens_per_second: float
    ratio: float


def parse_kind(name: str) -> tuple[str, Keep | None]:
    """A kind of `KV_CACHES`, or a policy as `--kv-keep` takes it.

    Raises:
        MoaiError: it is neither.
    """
    if name in KV_CACHES:
        return name, None
    if "window:" in name:
        return BASE, parse_keep(name)
    raise MoaiError(f"--kinds: {name!r} is neither one of {', '.join(KV_CACHES)} nor a policy of --kv-keep"
                    f"{did_you_mean(name, KV_CACHES)}")  # fmt: skip


def bench(
    model: Any,
    ids: list[int],
    kinds: list[str],
    options: KVOptions,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    chunk: int = 32,
    rounds: int = 3,
    tell: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """A row for each kind, the dynamic cache first.

    Args:
        ids: a text of at least two tokens. Perplexity is over all of it; its beginning, repeated where it is too
            short, is the prompt of the speed.
        chunk: tokens that go through the cache at once while perplexity is measured.
        tell: is told what is being done.

    Raises:
        MoaiError: a model of another class, whose sizes and chunks are not known here, or a kind it cannot have.
    """
    if not isinstance(model.config, MoaiConfig):
        raise MoaiError(
            f"a model of type {model.config.model_type} is not one of ours: bring it here with `moai import`"
        )
    kinds = [BASE, *dict.fromkeys(kind for kind in kinds if kind != BASE)]
    length = max(len(ids), prompt_tokens + new_tokens)
    options = replace(options, length=length, device=str(model.device))
    makers: dict[str, Callable[[], Cache]] = {}
    for name in kinds:
        kind, keep = parse_kind(name)
        makers[name] = partial(make_cache, model.config, kind, keep, options)
        makers[name]()  # what this model cannot have is told before anything is measured
    perplexities, held = {}, {}
    for name, make in makers.items():
        tell(f"perplexity of {name}")
        perplexities[name] = perplexity(model, ids, make(), chunk)
    prompt = (ids * math.ceil(prompt_tokens / len(ids)))[:prompt_tokens]
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        tell(f"speed, round {number + 1} of {rounds}")
        for name, make in makers.items():
            cache = make()
            seconds[name].append(_decode(model, prompt, new_tokens, cache, length))
            held[name] = held_bytes(cache), in_files(cache)
    rows, seen = [], prompt_tokens + new_tokens
    size = torch.finfo(model.dtype).bits // 8
    speeds = {name: new_tokens / statistics.median(times) for name, times in seconds.items()}
    for name in kinds:
        kind, keep = parse_kind(name)
        predicted = predicted_bytes(model.config, kind, seen, size, keep, length=length, window=options.window,
                                    group=options.group, residual=options.residual)  # fmt: skip
        change = perplexities[name] / perplexities[BASE] - 1
        rows.append(Row(name, held[name][0] / seen, predicted / seen, held[name][1], perplexities[name], change,
                        speeds[name], speeds[name] / speeds[BASE]))  # fmt: skip
    return rows


@torch.inference_mode()
def perplexity(model: Any, ids: list[int], cache: Cache, chunk: int) -> float:
    """Of every token but the first, each predicted from what the cache held of those before its chunk, and from its
    chunk.
    """
    nats, tokens = 0.0, torch.tensor(ids, device=model.device)
    for start in range(0, len(ids) - 1, chunk):
        part = tokens[start : start + chunk]
        logits = _feed(model, part, cache, len(ids), keep=0)
        targets = tokens[start + 1 : start + 1 + len(part)]
        wide = logits[: len(targets)].to(torch.promote_types(logits.dtype, torch.float32))
        nats += float(torch.nn.functional.cross_entropy(wide, targets, reduction="sum"))
    return math.exp(min(nats / (len(ids) - 1), 700))


@torch.inference_mode()
def _decode(model: Any, prompt: list[int], count: int, cache: Cache, length: int) -> float:
    """Seconds of `count` greedy tokens after the prompt, one at a time through the model."""
    tokens = torch.tensor(prompt, device=model.device)
    for start in range(0, len(prompt), CHUNK):
        logits = _feed(model, tokens[start : start + CHUNK], cache, length, keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    start_time = time.perf_counter()
    for _ in range(count):
        logits = _feed(model, logits[-1].argmax()[None], cache, length, keep=1)
    float(logits[0, 0])  # waits for the device
    return time.perf_counter() - start_time


def _feed(model: Any, tokens: Tensor, cache: Cache, length: int, keep: int) -> Tensor:
    """(L or keep, V)"""
    output = model(
        input_ids=tokens[None], past_key_values=cache, use_cache=True, logits_to_keep=keep, rope_length=length
    )
    return output.logits[0]
