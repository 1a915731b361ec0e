"""Greedy decoding, one sequence: tokens per second after the prompt, against transformers' generate. Same weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import models
from benchmarks.harness import Disagreement, Table, threads
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session
from moai_llm.modeling.model import MoaiForCausalLM

VOCAB, PROMPT = 32000, 32
Decode = Callable[[int], list[int]]


def run(quick: bool = False) -> list[Table]:
    tokens, rounds = (8, 3) if quick else (32, 5)
    with threads(2):
        return [dense(tokens, rounds), state_space(tokens, rounds)]


def ours(model: MoaiForCausalLM) -> Decode:
    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB, stop_ids=[])  # ids in, ids out: no text is needed here
    text_model = TextModel(model.eval(), tokenizer, Path())

    def decode(count: int) -> list[int]:
        return list(Session(text_model).stream(list(range(PROMPT)), Sampling(count, temperature=0)))

    return decode


def theirs(model: Any) -> Decode:
    model.eval()

    def decode(count: int) -> list[int]:
        prompt = torch.arange(PROMPT)[None]
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, PROMPT:].tolist()

    return decode


def measure(
    title: str, candidates: dict[str, Decode], tokens: int, rounds: int
) -> tuple[Table, dict[str, list[float]]]:
    """Seconds per token, from the difference of a long and a short answer: the prompt is not counted."""
    print(title)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, decode in candidates.items():
            clock = time.perf_counter()
            decode(2)
            middle = time.perf_counter()
            decode(2 + tokens)
            if i:
                found[name].append((time.perf_counter() - middle - (middle - clock)) / tokens)
    table = Table(title, ("model", "tokens/s", "ms per token"))
    for name, seconds in found.items():
        middle = statistics.median(seconds)
        table.add(name, 1 / middle, middle * 1e3)
    return table, found


def ratio(found: dict[str, list[float]], mine: str, peer: str) -> float:
    return statistics.median(b / a for a, b in zip(found[mine], found[peer]))


def require_same(mine: Decode, peer: Decode) -> None:
    """fp32 greedy answers of the same weights are the same tokens.

    Raises:
        Disagreement: they are not.
    """
    a, b = mine(12), peer(12)
    if a != b:
        raise Disagreement(f"decoded {a}, transformers {b}")


def dense(tokens: int, rounds: int) -> Table:
    def native(dtype: torch.dtype) -> Any:
        return models.qwen3(VOCAB, **models.DENSE_100M).to(dtype)

    candidates = {
        f"{name}, {short}": make(dtype)
        for short, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items()
        for name, make in {
            "ours": lambda dtype: ours(models.ours(native(dtype)).to(dtype)),
            "transformers Qwen3": lambda dtype: theirs(native(dtype)),
        }.items()
    }
    require_same(candidates["ours, fp32"], candidates["transformers Qwen3, fp32"])
    table, found = measure("Dense, 100M parameters, batch 1, greedy", candidates, tokens, rounds)
    for short, goal in (("fp32", 1.0), ("bf16", 1.3)):
        value = ratio(found, f"ours, {short}", f"transformers Qwen3, {short}")
        table.goal(f"decoding against transformers generate, {short}", value, goal)
    return table


def state_space(tokens: int, rounds: int) -> Table:
    def native(dtype: torch.dtype) -> Any:
        return models.mamba(VOCAB, **models.MAMBA_100M).to(dtype)

    candidates = {
        "ours, fp32": ours(models.ours(native(torch.float32))),
        "transformers Mamba, fp32": theirs(native(torch.float32)),
        "ours, bf16": ours(models.ours(native(torch.bfloat16)).to(torch.bfloat16)),
        "transformers Mamba, bf16": theirs(native(torch.bfloat16)),
    }
    require_same(candidates["ours, fp32"], candidates["transformers Mamba, fp32"])
    table, found = measure("Mamba, 115M parameters, batch 1, greedy", candidates, tokens, rounds)
    for short in ("fp32", "bf16"):
        value = ratio(found, f"ours, {short}", f"transformers Mamba, {short}")
        table.goal(f"Mamba decoding against transformers generate, {short}", value, 3.0)
    return table
