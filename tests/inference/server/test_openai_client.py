"""The official client of OpenAI as a conformance suite: what its users write works against this server."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

openai = pytest.importorskip("openai")

from moai_llm.inference.load import TextModel  # noqa: E402
from moai_llm.inference.sampling import Sampling  # noqa: E402
from moai_llm.inference.server.sse import DONE, event  # noqa: E402
from moai_llm.inference.session import Session, stream_text  # noqa: E402
from moai_llm.tokenizer.chat import render  # noqa: E402
from tests.inference.server.conftest import Served, serving  # noqa: E402

HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "이자가 뭐예요?"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def expected(text_model: TextModel) -> str:
    prompt = render(text_model.tokenizer, HELLO, add_generation_prompt=True).ids
    return "".join(stream_text(Session(text_model), prompt, Sampling(16, temperature=0)))


def test_models(client: Any) -> None:
    (model,) = client.models.list()
    assert model.id == "tiny" and model.object == "model" and client.models.retrieve("tiny").owned_by == "moai-llm"


def test_chat(client: Any, expected: str) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=16)
    (choice,) = answer.choices
    assert choice.message.content == expected and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 16


def test_streamed_chat(client: Any, expected: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=0, max_tokens=16, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 16 and chunks[-2].choices[0].finish_reason == "length"


def test_the_helper_that_collects_a_stream(client: Any, expected: str) -> None:
    fields: Any = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 16, "stop": expected[-3:-1]}
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
    assert stream.get_final_completion().choices[0].message.content == expected[: expected.index(expected[-3:-1])]


def test_an_answer_can_be_sent_back(client: Any) -> None:
    first = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=4)
    more = [*HELLO, first.choices[0].message, {"role": "user", "content": "Why?"}]
    second = client.chat.completions.create(model="tiny", messages=more, temperature=0, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.total_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_log_probabilities(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 5}
    content = client.chat.completions.create(**fields, logprobs=True, top_logprobs=4).choices[0].logprobs.content
    assert len(content) == 5 and all(len(entry.top_logprobs) == 4 for entry in content)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in content)
    streamed = client.chat.completions.create(**fields, logprobs=True, top_logprobs=4, stream=True)
    kept = [e for chunk in streamed for choice in chunk.choices if choice.logprobs for e in choice.logprobs.content]
    assert kept == content


def test_sampling_parameters(client: Any) -> None:
    fields: dict[str, Any] = {"model": "tiny", "prompt": "Interest", "max_tokens": 12, "temperature": 1.2, "seed": 3}
    one = client.completions.create(**fields)
    assert one.choices[0].text == client.completions.create(**fields).choices[0].text
    for changed in ({"top_p": 0.1}, {"presence_penalty": 2}, {"frequency_penalty": -2}, {"extra_body": {"top_k": 1}}):
        other = client.completions.create(**fields, **changed)
        assert other.choices[0].text != one.choices[0].text, changed
    greedy = client.completions.create(**{**fields, "temperature": 0})
    assert client.completions.create(**fields, extra_body={"top_k": 1}).choices[0].text == greedy.choices[0].text
    assert len(client.completions.create(**fields, n=3).choices) == 3


def test_completions(client: Any) -> None:
    echoed = client.completions.create(
        model="tiny", prompt=["a", "이자"], echo=True, max_tokens=3, temperature=0, logprobs=2
    )
    assert [choice.text[:1] for choice in echoed.choices] == ["a", "이"]
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    chunks = client.completions.create(model="tiny", prompt=["a", "이자"], max_tokens=3, temperature=0, stream=True)
    texts = ["", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert [front + text for front, text in zip(("a", "이자"), texts)] == [choice.text for choice in echoed.choices]
    whole = client.completions.create(model="tiny", prompt="Interest", max_tokens=30, temperature=0).choices[0].text
    stopped = client.completions.create(model="tiny", prompt="Interest", max_tokens=30, temperature=0, stop=whole[9:12])
    assert stopped.choices[0].text == whole[: whole.index(whole[9:12])] and stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("error", "call"),
    [
        ("NotFoundError", {"model": "gpt-9"}), ("BadRequestError", {"temperature": 9}),
        ("BadRequestError", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        ("BadRequestError", {"response_format": {"type": "json_object"}}), ("BadRequestError", {"max_tokens": 5000}),
    ],
)  # fmt: skip
def test_errors_are_those_of_the_client(client: Any, error: str, call: dict[str, Any]) -> None:
    with pytest.raises(getattr(openai, error)) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, **call})
    assert caught.value.body["message"] and caught.value.param is not None


def test_keys_embeddings_and_a_full_queue(text_model: TextModel) -> None:
    with serving(
        text_model, api_key="secret", max_batch=1, max_queue=0, embed=lambda ids: [[1.0, 2.0]] * len(ids)
    ) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as right:
            vectors = right.embeddings.create(model="tiny", input=["a", "b"])
            assert [item.embedding for item in vectors.data] == [[1.0, 2.0]] * 2
            server.service.active += 1
            with pytest.raises(openai.RateLimitError) as full:
                right.completions.create(model="tiny", prompt="a")
            assert full.value.response.headers["retry-after"] == "1"
            server.service.active -= 1


def test_the_asynchronous_client_and_a_stream_it_leaves(served: Served, expected: str) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
            left = await client.completions.create(model="tiny", prompt="a", max_tokens=200, temperature=0, stream=True)
            async for _ in left:
                break
            await left.close()
            asks = [
                client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_tokens=16)
                for _ in range(5)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asks)]

    assert asyncio.run(talk()) == [expected] * 5
    served.idle()


def test_the_client_reads_our_events_wherever_they_are_cut() -> None:
    """Bytes of a stream as a network may deliver them, in front of the client's own reader."""
    texts = ["이자", "는 😀", "\n\ndata: x", "", "\u2028끝\r\n"]
    shape = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunks = [{**shape, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    stream = b"".join([b": still here\n\n", *map(event, chunks), DONE])
    rng = random.Random(0)

    class Cut(httpx.SyncByteStream):
        def __init__(self, cuts: list[int]) -> None:
            self.places = [0, *sorted(cuts), len(stream)]

        def __iter__(self) -> Iterator[bytes]:
            for start, end in zip(self.places, self.places[1:]):
                yield stream[start:end]

    decode = openai._streaming.SSEDecoder
    for cuts in [*([k] for k in range(0, len(stream), 3)), *(rng.choices(range(len(stream)), k=60) for _ in range(60))]:
        found = [sse.data for sse in decode().iter_bytes(iter(Cut(cuts))) if sse.data]
        assert found[-1] == "[DONE]"
        assert [json.loads(data)["choices"][0]["delta"]["content"] for data in found[:-1]] == texts
