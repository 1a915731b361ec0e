"""Many streams at once: no answer is another's, none differs from what the model says alone, and whoever leaves frees
the place.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from benchmarks.serve import Reading, read_answer
from moai_llm.inference.load import TextModel
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.session import Session, stream_text
from moai_llm.tokenizer.chat import render
from tests.inference.server.conftest import Served, serving

WORDS = ["interest", "the deposit", "이자는", "은행에서", "붙어요", "and then", "둘째 줄", "\n\n", "more", "paid"]


def requests(text_model: TextModel, count: int, seed: int) -> list[tuple[str, dict[str, Any], list[int], int]]:
    """(route, body, the prompt in tokens, how long the answer may be): of every length, some of them nearly alike."""
    rng, made = random.Random(seed), []
    for i in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + ("" if i % 3 else f" {i}")
        length = rng.randint(1, 40)
        if rng.random() < 0.5:
            messages = [{"role": "user", "content": words}]
            prompt = render(text_model.tokenizer, messages, add_generation_prompt=True).ids
            made.append(("/v1/chat/completions", {"messages": messages}, prompt, length))
        else:
            made.append(("/v1/completions", {"prompt": words}, text_model.tokenizer.encode(words), length))
        made[-1][1].update(max_tokens=length, temperature=0)
    return made


def crowd(text_model: TextModel, count: int, seed: int = 0) -> list[Reading]:
    """So many streams at the same moment, and half as many that leave in the middle; each that stays is compared."""
    asked = requests(text_model, count, seed)
    leavers = [{"prompt": f"leaver {i} " * (1 + i % 5), "max_tokens": 200, "temperature": 0} for i in range(count // 2)]

    async def all_of_them(port: int) -> list[Reading]:
        staying = [read_answer(port, path, body) for path, body, _, _ in asked]
        leaving = [read_answer(port, "/v1/completions", body, 1 + i % 4) for i, body in enumerate(leavers)]
        mixed = [*staying, *leaving]
        order = list(range(len(mixed)))
        random.Random(seed).shuffle(order)
        found = await asyncio.gather(*(mixed[i] for i in order))
        return [reading for _, reading in sorted(zip(order, found), key=lambda pair: pair[0])][:count]

    with serving(text_model, max_batch=16, max_queue=2 * count) as server:
        readings = asyncio.run(all_of_them(server.port))
        server.idle()  # the leavers' places are free
        metrics = server.service.metrics
        assert sum(metrics.finished.values()) == count + len(leavers)
        assert metrics.finished["cut"] > 0.8 * len(leavers)  # some come to their end before they leave
        generated = server.service.worker.counters["generated_tokens"]
        assert generated < sum(r.tokens for r in readings) + 150 * len(leavers)  # they asked for 200 each
    for (_, _, prompt, length), reading in zip(asked, readings):
        alone = "".join(stream_text(Session(text_model), prompt, Sampling(length, temperature=0)))
        assert reading.text == alone and reading.tokens <= length
        assert reading.finish == ("length" if reading.tokens == length else "stop")
    return readings


def test_two_dozen_streams(text_model: TextModel) -> None:
    readings = crowd(text_model, 24)
    assert len({reading.text for reading in readings}) > 12  # control: crossed answers would show


@pytest.mark.slow
def test_two_hundred_streams(text_model: TextModel) -> None:
    readings = crowd(text_model, 200, seed=1)
    assert len(readings) == 200 and len({reading.text for reading in readings}) > 100


def test_requests_join_a_batch_that_runs(served: Served, text_model: TextModel) -> None:
    """A short answer that is asked for later is there before a long one ends."""

    async def both() -> tuple[float, float]:
        loop, body = asyncio.get_running_loop(), {"prompt": "the deposit", "temperature": 0}
        ends: dict[str, float] = {}

        async def timed(name: str, tokens: int) -> None:
            await read_answer(served.port, "/v1/completions", {**body, "max_tokens": tokens})
            ends[name] = loop.time()

        long = asyncio.ensure_future(timed("long", 220))
        while served.service.worker.running == 0:
            assert not long.done()
            await asyncio.sleep(0.001)
        await asyncio.gather(timed("short", 2), long)
        return ends["short"], ends["long"]

    short, long = asyncio.run(both())
    assert short < long
