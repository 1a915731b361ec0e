"""Decoding: tokens per second after the prompt, one text and eight, against transformers' generate on the same weights;
sixteen clients at once against one after the other; guessing ahead.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import models
from benchmarks.harness import Disagreement, Table, interleave, threads
from moai_llm.inference import Engine, Sampling, TextModel
from moai_llm.inference.speculate import PromptLookup
from moai_llm.modeling.model import MoaiForCausalLM

VOCAB, PROMPT, BATCH = 32000, 32, 8
Decode = Callable[[int], list[list[int]]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES: dict[str, Callable[[], Any]] = {
    "dense, 100M": lambda: models.qwen3(VOCAB, **models.DENSE_100M),
    "Mamba, 115M": lambda: models.mamba(VOCAB, **models.MAMBA_100M),
    "MoE, 8 experts, 36M": lambda: models.qwen3_moe(VOCAB, "grouped_mm"),
    "dense, 23M": lambda: models.qwen3(VOCAB),
}


def run(quick: bool = False) -> list[Table]:
    tokens, rounds = (4, 1) if quick else (16, 5)
    shapes = list(SHAPES)[-1:] if quick else list(SHAPES)
    with threads(2):
        tables = [against_transformers(shape, tokens, rounds) for shape in shapes]
        return [*tables, clients(4 if quick else 16, rounds), guessing(16 if quick else 48, rounds)]


def text_model(model: MoaiForCausalLM) -> TextModel:
    tokenizer: Any = SimpleNamespace(vocab_size=VOCAB, stop_ids=[], token_bytes=lambda _: b"a")  # ids only
    return TextModel(model.eval(), tokenizer, Path())


def prompts(batch: int) -> list[list[int]]:
    return [[(7 * i + j) % VOCAB for i in range(PROMPT)] for j in range(batch)]


def ours(model: MoaiForCausalLM, batch: int) -> Decode:
    made = text_model(model)

    def decode(count: int) -> list[list[int]]:
        engine = Engine(made, max_batch=batch, prefix_cache=False)
        requests = [engine.submit(prompt, Sampling(count, temperature=0)) for prompt in prompts(batch)]
        while engine.busy:
            engine.step()
        return [request.tokens for request in requests]

    return decode


def theirs(model: Any, batch: int) -> Decode:
    model.eval()

    def decode(count: int) -> list[list[int]]:
        ids = torch.tensor(prompts(batch))
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, PROMPT:].tolist()

    return decode


def per_step(decode: Decode, tokens: int) -> tuple[float, float]:
    """Wall and CPU seconds of one step, from the difference of a long and a short answer: the prompt is not counted."""
    found = []
    for count in (2, 2 + tokens):
        wall, cpu = time.perf_counter(), time.process_time()
        decode(count)
        found.append((time.perf_counter() - wall, time.process_time() - cpu))
    (short_wall, short_cpu), (long_wall, long_cpu) = found
    return (long_wall - short_wall) / tokens, (long_cpu - short_cpu) / tokens


def against_transformers(shape: str, tokens: int, rounds: int) -> Table:
    title = f"{shape}, greedy"
    print(title)
    table = Table(title, ("model", "tokens/s", "ms per step", "CPU-ms per step"))
    for short, dtype in DTYPES.items():
        if short == "bf16" and shape not in ("dense, 100M", "Mamba, 115M"):
            continue
        native = SHAPES[shape]().to(dtype)
        mine = models.ours(SHAPES[shape]()).to(dtype)
        for batch in (1, BATCH):
            candidates = {"ours": ours(mine, batch), "transformers": theirs(native, batch)}
            if dtype is torch.float32:
                require_same(candidates["ours"], candidates["transformers"])
            taken: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
            for i in range(rounds + 1):
                for name, decode in candidates.items():
                    spent = per_step(decode, tokens)
                    if i:
                        taken[name].append(spent)
            for name, runs in taken.items():
                wall, cpu = (statistics.median(column) for column in zip(*runs))
                table.add(f"{name}, {short}, batch {batch}", batch / wall, wall * 1e3, cpu * 1e3)
            for what, place in (("time", 0), ("CPU time", 1)):
                value = statistics.median(b[place] / a[place] for a, b in zip(taken["ours"], taken["transformers"]))
                table.goal(f"{short}, batch {batch}: transformers' {what} over ours", value, 2.0)
    return table


def require_same(mine: Decode, peer: Decode) -> None:
    """fp32 greedy answers of the same weights are the same tokens.

    Raises:
        Disagreement: they are not.
    """
    a, b = mine(8), peer(8)
    if a != b:
        raise Disagreement(f"decoded {a}, transformers {b}")


def clients(tokens: int, rounds: int) -> Table:
    """Sixteen requests that arrive a step apart, in one running batch or one after the other."""
    title = "16 clients, dense, 100M, fp32"
    print(title)
    made = text_model(models.ours(SHAPES["dense, 100M"]()))
    asked = prompts(16)

    def serve(batch: int) -> list[list[int]]:
        engine, requests = Engine(made, max_batch=batch, prefix_cache=False), []
        while len(requests) < len(asked) or engine.busy:
            if len(requests) < len(asked):
                requests.append(engine.submit(asked[len(requests)], Sampling(tokens, temperature=0)))
            engine.step()
        return [request.tokens for request in requests]

    if serve(16) != serve(1):
        raise Disagreement("a request gets another answer in a batch than alone")
    found = interleave({"together": lambda: serve(16), "one after the other": lambda: serve(1)}, rounds)
    table = Table(title, ("scheduling", "tokens/s", "CPU-ms per token"))
    for name, timing in found.items():
        table.add(name, 16 * tokens / timing.wall, timing.cpu * 1e3 / (16 * tokens))
    table.goal("throughput", found["together"].times_faster_than(found["one after the other"]), 3.0)
    return table


def guessing(tokens: int, rounds: int) -> Table:
    """Prompt lookup where the text repeats itself, and where no guess is right: what it gains and what it costs."""
    title = "Prompt lookup, dense, 100M, fp32, batch 1"
    print(title)
    torch.manual_seed(0)
    repeats = models.ours(SHAPES["dense, 100M"]())  # tied weights that were never trained say a token again and again
    made = text_model(repeats)

    class Wrong:
        def guess(self, tokens: list[int], count: int, draw: Any) -> Any:
            from moai_llm.inference.speculate import Guess

            return Guess([(tokens[-1] + 1 + i) % VOCAB for i in range(count)])

    told: dict[str, float] = {}

    def decode(name: str, drafter: Any) -> list[int]:
        engine = Engine(made, max_batch=1, prefix_cache=False, drafter=drafter)
        request = engine.submit(prompts(1)[0], Sampling(tokens, temperature=0))
        while engine.busy:
            engine.step()
        told[name] = engine.counters.taken_tokens / max(engine.counters.guessed_tokens, 1)
        return request.tokens

    runs = {
        "without": lambda: decode("without", None),
        "the text repeats itself": lambda: decode("the text repeats itself", PromptLookup()),
        "no guess is right": lambda: decode("no guess is right", Wrong()),
    }
    if not runs["without"]() == runs["the text repeats itself"]() == runs["no guess is right"]():
        raise Disagreement("guessing changed the text")
    found = interleave(runs, rounds)
    table = Table(title, ("guesses", "taken", "tokens/s", "times as fast"))
    for name, timing in found.items():
        table.add(name, f"{told[name]:.0%}", tokens / timing.wall, timing.times_faster_than(found["without"]))
    table.goal("best case", found["the text repeats itself"].times_faster_than(found["without"]), 1.5)
    table.goal("worst case", found["no guess is right"].times_faster_than(found["without"]), 0.5)
    return table
