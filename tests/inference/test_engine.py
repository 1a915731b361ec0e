"""Many requests at once: each gets what it would get alone, whoever joins, leaves or shares its beginning."""

from __future__ import annotations

import random

import pytest
import torch

from moai_llm.inference import Engine, Request, Sampling
from moai_llm.modeling.slots import SlotCache, SlotStates
from moai_llm.runtime import MoaiError
from tests.inference.conftest import KINDS, SIZE, alone, greedy, ids_model


def finish(engine: Engine, requests: list[Request] | None = None) -> None:
    while engine.busy:
        engine.step()
    assert all(request.finished for request in requests or [])


def prompts_of(rng: random.Random, count: int) -> list[list[int]]:
    """Some share a beginning, two are equal."""
    base = [rng.randrange(SIZE) for _ in range(30)]
    found = [
        base[: rng.randrange(30)] + [rng.randrange(SIZE) for _ in range(rng.randrange(1, 20))] for _ in range(count - 1)
    ]
    return [*found, found[0]]


@pytest.mark.parametrize(
    ("kind", "batch", "chunk", "prefix"),
    [
        *zip(KINDS, (4, 8, 3, 4, 8, 5, 4, 3), (7, 1, 512, 5, 512, 3, 11, 2), (True,) * 8),
        ("attention", 1, 1, False),
        ("hybrid", 3, 7, False),
    ],
)
def test_each_request_gets_what_it_gets_alone(kind: str, batch: int, chunk: int, prefix: bool) -> None:
    """Requests come and go at random times; some are cancelled at random times and must leave no trace."""
    rng, model = random.Random(batch), ids_model(kind)
    prompts = prompts_of(rng, 7)
    counts = [rng.randrange(1, 12) for _ in prompts]
    engine = Engine(model, max_batch=batch, prefill_chunk=chunk, prefix_cache=prefix)
    requests: list[Request] = []
    doomed: list[Request] = []
    while len(requests) < len(prompts) or engine.busy:
        if len(requests) < len(prompts) and rng.random() < 0.5:
            requests.append(engine.submit(prompts[len(requests)], greedy(counts[len(requests)])))
            if rng.random() < 0.4:
                doomed.append(engine.submit(rng.choice(prompts)[:9], greedy(30)))
        if doomed and (rng.random() < 0.3 or len(requests) == len(prompts)):
            engine.cancel(doomed.pop())
        events = engine.step()
        assert engine.running <= batch and len({e.request for e in events if e.token is not None}) <= batch
    for request, prompt, count in zip(requests, prompts, counts):
        assert request.tokens == alone(model, prompt, count) and request.finished == "length"
    assert not engine.running and not engine.waiting
    assert prefix or not engine.counters.reused_tokens


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_control_a_row_that_is_not_moved_gives_another_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = ids_model(kind), random.Random(0)
    prompts = [[rng.randrange(SIZE) for _ in range(9)] for _ in range(3)]

    def run() -> list[list[int]]:
        engine = Engine(model, max_batch=3, prefix_cache=False)
        requests = [engine.submit(prompt, greedy(20)) for prompt in prompts]
        engine.step()
        engine.cancel(requests[0])
        finish(engine)
        return [request.tokens for request in requests[1:]]

    truth = [alone(model, prompt, 20) for prompt in prompts[1:]]
    assert run() == truth
    monkeypatch.setattr(SlotCache, "move", lambda *_: None)
    assert run() != truth


@pytest.mark.parametrize("kind", ["attention", "mamba", "hybrid"])
def test_a_shared_beginning_is_computed_once(kind: str) -> None:
    """Keys can be cut anywhere; states are kept at the ends and where two prompts were seen to part."""
    model, rng = ids_model(kind), random.Random(1)
    system = [rng.randrange(SIZE) for _ in range(20)]
    engine = Engine(model, max_batch=1)
    tails = [[rng.randrange(SIZE) for _ in range(6)] for _ in range(3)]
    requests = []
    for tail in tails:  # one after the other: nothing is known of the next
        requests.append(engine.submit([*system, *tail], greedy(4)))
        finish(engine)
    reused = [request.reused for request in requests]
    assert reused == ([0, 20, 20] if kind == "attention" else [0, 0, 20])
    turn = engine.submit([*system, *tails[0], *requests[0].tokens, 1, 2, 3], greedy(5))  # the next turn of a chat
    finish(engine)
    assert turn.reused == 20 + 6 + 3  # all that was fed: the last token of an answer never is
    for request in [*requests, turn]:
        assert request.tokens == alone(model, request.prompt, request.limit)


@pytest.mark.parametrize("kind", ["attention", "mamba"])
def test_equal_prompts_are_computed_once(kind: str) -> None:
    model, prompt = ids_model(kind), list(range(20))
    engine = Engine(model, max_batch=4)
    requests = [engine.submit(prompt, Sampling(8, 1.0, 0, 1.0, seed=seed)) for seed in (1, 2, 1)]
    finish(engine, requests)
    assert [request.reused for request in requests] == [0, 19, 19]
    assert requests[0].tokens == requests[2].tokens != requests[1].tokens


def test_the_store_forgets_what_was_not_used_for_the_longest_time() -> None:
    model, rng = ids_model("attention"), random.Random(2)
    first, second, third = ([rng.randrange(SIZE) for _ in range(20)] for _ in range(3))
    engine = Engine(model, max_batch=1, cache_tokens=50)

    def reused(prompt: list[int]) -> int:
        request = engine.submit(prompt, greedy(2))
        finish(engine)
        return request.reused

    assert [reused(p) for p in (first, second, first, third)] == [0, 0, 19, 0]  # the third pushes the second out
    assert reused(first) == 19 and reused(second) == 0


def test_a_state_model_decodes_in_constant_memory() -> None:
    model = ids_model("mamba alone")
    engine = Engine(model, max_batch=2, prefix_cache=False)
    engine.submit([1, 2, 3], greedy(200))
    sizes = set()
    while engine.busy:
        engine.step()
        pairs = [layer.pair for layer in engine._cache.layers]
        assert all(isinstance(layer, SlotStates) for layer in engine._cache.layers)
        sizes.add(sum(t.numel() for pair in pairs for t in pair))
    assert len(sizes) == 1 and engine.counters.generated_tokens == 200  # past the 128 positions of the config


def test_seeds_do_not_depend_on_the_batch() -> None:
    model, rng = ids_model("hybrid"), random.Random(3)
    prompts = prompts_of(rng, 5)
    filters = ((0, 1.0), (9, 1.0), (0, 0.9), (5, 0.8), (0, 1.0))
    samplings = [Sampling(9, 1.0, k, p, seed=k, frequency_penalty=0.5) for k, p in filters]
    together = Engine(model, max_batch=5)
    requests = [together.submit(prompt, sampling) for prompt, sampling in zip(prompts, samplings)]
    finish(together)
    for request in requests:
        engine = Engine(model, max_batch=1)
        single = engine.submit(request.prompt, request.sampling)
        finish(engine)
        assert single.tokens == request.tokens


def test_events_tell_everything_once() -> None:
    model = ids_model()
    engine = Engine(model, max_batch=2)
    sampling = Sampling(6, temperature=0, logprobs=3)
    request = engine.submit([1, 2, 3], sampling)
    events = []
    while engine.busy:
        events += engine.step()
    assert [e.token for e in events] == request.tokens and "".join(e.text for e in events) == "".join(
        chr(65 + t % 26) for t in request.tokens
    )
    assert [e.finished for e in events] == [None] * 5 + ["length"]
    with torch.no_grad():
        logp = model.model(torch.tensor([[1, 2, 3]])).logits[0, -1].log_softmax(-1)
    best = logp.topk(3)
    assert events[0].logprob == pytest.approx(float(best.values[0]))
    assert events[0].top is not None and [i for i, _ in events[0].top] == best.indices.tolist()
    assert [p for _, p in events[0].top] == pytest.approx(best.values.tolist())
    assert engine.step() == [] and not engine.busy


def test_stop_tokens_and_stop_texts() -> None:
    truth = alone(ids_model(), [1, 2, 3], 12)
    letters = "".join(chr(65 + t % 26) for t in truth)
    model = ids_model(stops=[truth[5]])
    engine = Engine(model)
    request = engine.submit([1, 2, 3], greedy(12))
    events = []
    while engine.busy:
        events += engine.step()
    cut = truth.index(truth[5])
    assert request.tokens == truth[:cut] and events[-1].token is None and events[-1].finished == "stop"
    engine, stop = Engine(ids_model()), letters[4:6]
    request = engine.submit([1, 2, 3], Sampling(12, temperature=0, stop=(stop, "never")))
    text = ""
    while engine.busy:
        text += "".join(event.text for event in engine.step())
    assert text == letters[: letters.index(stop)] and request.finished == "stop"


def test_a_cancelled_request_leaves_at_once() -> None:
    engine = Engine(ids_model(), max_batch=1)
    first, second = engine.submit([1, 2], greedy(50)), engine.submit([3, 4], greedy(3))
    engine.step()
    assert engine.running == 1 and engine.waiting == 1
    engine.cancel(first)
    engine.cancel(first)  # twice is once
    assert engine.running == 0
    ends = [event for event in engine.step() if event.finished]
    assert [(e.request, e.finished, e.token) for e in ends] == [(first, "cancelled", None)]
    engine.cancel(second)
    assert [e.finished for e in engine.step()] == ["cancelled"] and not engine.busy


def test_what_can_never_run_is_refused() -> None:
    engine = Engine(ids_model(), max_batch=1)
    with pytest.raises(MoaiError, match="empty prompt"):
        engine.submit([], greedy(1))
    with pytest.raises(MoaiError, match="the prompt has 128 tokens; this model takes 128"):
        engine.submit([1] * 128, greedy(1))
    with pytest.raises(MoaiError, match="not among the model's 61"):
        engine.submit([61], greedy(1))
    with pytest.raises(MoaiError, match="max_batch = 0"):
        Engine(ids_model(), max_batch=0)
    assert engine.submit([1] * 120, greedy(50)).limit == 8
    assert Engine(ids_model("mamba")).submit([1] * 500, greedy(50)).limit == 50  # states have no limit
    assert not Engine(ids_model()).busy


def test_only_models_with_slots() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from moai_llm.inference import TextModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(MoaiError, match="GPT2LMHeadModel.*moai import"):
        Engine(TextModel(model, ids_model().tokenizer, ids_model().path))
