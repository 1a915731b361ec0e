"""Prompts of different lengths in one forward: pieces laid end to end are what each piece is alone, and the engine's
steps are those of prompts computed one after the other.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moai_llm.inference import Engine, Event, Request
from moai_llm.modeling.model import MoaiForCausalLM
from moai_llm.modeling.slots import SlotCache
from tests.conftest import tiny_model
from tests.inference.conftest import KINDS, SIZE, alone, greedy, ids_model

MODELS: dict[str, dict[str, Any]] = {**KINDS, "multi-query": {"num_key_value_heads": 1}}
PASTS = [9, 0, 17, 0, 4, 1]  # the first row runs and has no piece
PIECES = [5, 1, 13, 2, 1]
FINALS = [20, 5, 33, 70, 9, 8]  # "dynamic" rotates by these
FIRST = 1


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, SIZE, (1, count), generator=torch.Generator().manual_seed(seed))


def begun(model: MoaiForCausalLM) -> SlotCache:
    """Rows with and without a past."""
    cache = SlotCache(model.config)
    for row, (past, final) in enumerate(zip(PASTS, FINALS)):
        cache.clear(row, final)
        if past:
            model(tokens(past, row), past_key_values=cache.select(row))
    return cache


@torch.inference_mode()
def together(model: MoaiForCausalLM, cache: SlotCache, sizes: list[int]) -> Tensor:
    """(sum of the pieces, V)"""
    row = torch.cat([tokens(size, 100 + i) for i, size in enumerate(PIECES)], 1)
    return model(row, past_key_values=cache.select(FIRST, len(sizes), sizes)).logits[0]


@torch.inference_mode()
def separate(model: MoaiForCausalLM, cache: SlotCache) -> Tensor:
    rows = enumerate(PIECES)
    return torch.cat([model(tokens(n, 100 + i), past_key_values=cache.select(FIRST + i)).logits[0] for i, n in rows])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_pieces_end_to_end_are_each_piece_alone(kind: str, dtype: torch.dtype) -> None:
    """Logits of every token, what the rows then hold, and the step after."""
    model = tiny_model(**MODELS[kind]).to(dtype)
    tolerance = {"rtol": 0, "atol": 1e-9 if dtype == torch.float64 else 1e-3}
    one, other = begun(model), begun(model)
    torch.testing.assert_close(together(model, one, PIECES), separate(model, other), **tolerance)
    assert one.lengths[: len(PASTS)] == other.lengths[: len(PASTS)] == [9, 5, 18, 13, 6, 2]
    for row in range(len(PASTS)):
        for kept, truth in zip(one.keep(row).layers, other.keep(row).layers):
            torch.testing.assert_close(kept, truth, **tolerance)
    step = tokens(len(PASTS), 7).T
    found, truth = (model(step, past_key_values=cache.select(0, len(PASTS))).logits for cache in (one, other))
    torch.testing.assert_close(found, truth, **tolerance)


@pytest.mark.parametrize("kind", MODELS)
@torch.inference_mode()
def test_control_borders_and_beginnings_matter(kind: str) -> None:
    model = tiny_model(**MODELS[kind])
    truth = separate(model, begun(model))
    moved = together(model, begun(model), [4, 2, *PIECES[2:]])
    assert (moved[4:6] - truth[4:6]).abs().max() > 1e-4
    torch.testing.assert_close(moved[6:], truth[6:], rtol=0, atol=1e-9)  # the pieces after it are as they were
    cache = begun(model)
    kept, other = cache.keep(1 + FIRST), cache.keep(3 + FIRST)
    cache.put(1 + FIRST, other)
    cache.put(3 + FIRST, kept)
    mixed = together(model, cache, PIECES)
    assert (mixed[5] - truth[5]).abs().max() > 1e-4 and (mixed[19:21] - truth[19:21]).abs().max() > 1e-4


def test_a_mixer_that_ignores_the_pieces_is_told() -> None:
    model = tiny_model("linear_attention")
    cache = begun(model).select(FIRST, len(PIECES), PIECES)
    with pytest.raises(AssertionError):
        cache.layers[0].rows()
    with pytest.raises(AssertionError):
        cache.select(FIRST, 2, PIECES)


# ---------------------------------------------------------------- the engine


class OneByOne(Engine):
    """No prompt joins another."""

    def _admit(self, beside: list[Request]) -> Request | None:
        return None if beside else super()._admit(beside)


def run(engine: Engine) -> list[list[Event]]:
    steps = []
    while engine.busy:
        steps.append(engine.step())
    return steps


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_that_arrive_together_are_one_forward(kind: str) -> None:
    model, rng = ids_model(kind), random.Random(5)
    prompts = [[rng.randrange(SIZE) for _ in range(length)] for length in (5, 1, 23, 2, 9, 14, 1)]
    engine, forwards = Engine(model, max_batch=7), []
    with model.model.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape), with_kwargs=True
    ):
        requests = [engine.submit(prompt, greedy(6)) for prompt in prompts]
        events = engine.step()
        assert forwards == [(1, 55), (7, 1)]  # the prompts, then a token for each
        run(engine)
    assert [event.request for event in events] == [*requests, *requests]
    assert (engine.counters.prefill_forwards, engine.counters.prefill_chunks) == (1, 7)
    for request in requests:
        assert request.tokens == alone(model, request.prompt, 6)


def test_sixteen_short_prompts() -> None:
    rng = random.Random(6)
    for batch, forwards, running in ((16, 1, 16), (5, 1, 5)):
        engine = Engine(ids_model(), max_batch=batch)
        for _ in range(16):
            engine.submit([rng.randrange(SIZE) for _ in range(32)], greedy(9))
        engine.step()
        assert (engine.counters.prefill_forwards, engine.running, engine.waiting) == (forwards, running, 16 - running)


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_a_long_prompt_closes_the_forward(kind: str) -> None:
    model, rng = ids_model(kind), random.Random(7)
    prompts = [[rng.randrange(SIZE) for _ in range(length)] for length in (3, 5, 40, 4)]
    for cancelled in (False, True):
        engine = Engine(model, max_batch=8, prefill_chunk=16)
        requests = [engine.submit(prompt, greedy(8)) for prompt in prompts]
        engine.step()
        assert (engine.counters.prefill_forwards, engine.counters.prefill_chunks) == (1, 3)
        assert [request.fed for request in requests] == [4, 6, 16, 0] and engine.running == 3
        if cancelled:
            engine.cancel(requests[2])
        run(engine)
        for request in requests:
            truth = [] if cancelled and request is requests[2] else alone(model, request.prompt, 8)
            assert request.tokens == truth


@pytest.mark.parametrize("kind", ["attention", "mamba", "hybrid", "dynamic"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_steps_and_reuse_are_those_of_one_by_one(kind: str, chunk: int) -> None:
    """Beginnings within beginnings arrive together and apart: nothing that an earlier prompt leaves is lost."""
    model, saved = ids_model(kind), 0
    for seed in range(4):
        told, engines = [], []
        for make in (Engine, OneByOne):
            rng = random.Random(seed)
            base = [rng.randrange(SIZE) for _ in range(40)]
            prompts = [base[: rng.choice((0, 0, 12, 25, 40))] + [rng.randrange(SIZE)] for _ in range(12)]
            prompts += [prompts[0], prompts[3], [*prompts[5], 1, 2, 3]]
            engine = make(model, max_batch=6, prefill_chunk=chunk, cache_tokens=100_000)
            requests: list[Request] = []
            steps: list[list[Event]] = []
            while len(requests) < len(prompts) or engine.busy:
                for prompt in prompts[len(requests) : len(requests) + rng.choice((0, 1, 6))]:
                    requests.append(engine.submit(prompt, greedy(rng.randrange(2, 5))))
                steps.append(engine.step())
            what = [[(requests.index(e.request), e.token, e.finished) for e in events] for events in steps]
            told.append((what, [request.reused for request in requests]))
            engines.append(engine)
        assert told[0] == told[1]
        assert sum(told[0][1]) > (20 if kind == "dynamic" else 50)  # kept keys fit one RoPE choice
        mine, theirs = (dict(vars(engine.counters)) for engine in engines)
        saved += theirs.pop("prefill_forwards") - mine.pop("prefill_forwards")
        assert mine == theirs and theirs["prefill_chunks"] >= 15
    assert saved > 4


def test_control_a_prompt_that_does_not_wait_for_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    base = list(range(20))

    def reused() -> list[int]:
        engine = Engine(ids_model(), max_batch=4)
        requests = [engine.submit([*base, i], greedy(2)) for i in range(3)]
        run(engine)
        assert engine.counters.prefill_forwards == 2  # the beginning; then the three ends
        return [request.reused for request in requests]

    assert reused() == [0, 20, 20]
    monkeypatch.setattr("moai_llm.inference.engine.shared", lambda *_: 0)
    monkeypatch.setattr("moai_llm.inference.prefix.PrefixStore.parting", lambda *_: 0)
    with pytest.raises(AssertionError):
        reused()


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_after_a_forward_that_failed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever joined it can be cancelled, and what comes next is right."""
    model = ids_model(kind)
    engine = Engine(model, max_batch=4)
    requests = [engine.submit(list(range(i + 1)), greedy(4)) for i in range(6)]

    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("moai_llm.modeling.slots.slot_attention" if kind == "attention" else
                      "moai_llm.modeling.mamba.selective_scan", fails)  # fmt: skip
        with pytest.raises(MemoryError):
            engine.step()
    for request in requests[:5]:
        engine.cancel(request)
    run(engine)
    assert [request.finished for request in requests] == ["cancelled"] * 5 + ["length"]
    assert requests[5].tokens == alone(model, requests[5].prompt, 4)
