"""The parts of the server without a server: bodies, options, text of tokens, events, metrics."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest

from moai_llm.inference.engine import Event
from moai_llm.inference.server.body import check, parse
from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.metrics import Metrics
from moai_llm.inference.server.options import Options, is_loopback
from moai_llm.inference.server.protocol import OF_CHAT, OF_COMPLETIONS, ChatRequest, CompletionRequest
from moai_llm.inference.server.sse import DONE, EventReader, event
from moai_llm.inference.server.text import LEAST, Answer, name_of
from moai_llm.inference.text_stream import TextStream
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not JSON"), (b"[1]", "must be a JSON object"), (b"null", "must be a JSON object"), (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is not a number"), (b'{"a": -Infinity}', "-Infinity is not"),
        (b"\xff{}", "not UTF-8: byte 0"),
        (b'{"prompt": "\\ud83d"}', "surrogate"), (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_request(content: bytes, what: str) -> None:
    with pytest.raises(ApiError, match=what) as caught:
        parse(content)
    assert caught.value.status == 400


def test_whole_surrogate_pairs_are_text() -> None:
    assert parse(b'{"prompt": "\\ud83d\\ude00 \xed\x95\x9c"}') == {"prompt": "😀 한"}


@pytest.mark.parametrize(
    ("fields", "param", "what"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"temperature": "1"}, "temperature", "number"), ({"temperature": 1e999}, "temperature", "finite"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"n": True}, "n", "integer"), ({"n": 0}, "n", "greater than"), ({"seed": 10**30}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"), ({"stop": ""}, "stop", "at least 1"),
        ({"stop": 3}, "stop", "string"),
        ({"tools": [{}]}, "tools", "does not parse calls"), ({"tool_choice": "required"}, "tool_choice", "tools"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "grammar"),
        ({"logit_bias": {"3": 1}}, "logit_bias", "not supported"), ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "cat", "content": "x"}]}, "messages", "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "messages", "type"),
        ({"stream_options": {"x": 1}}, "stream_options", "Extra inputs"),
    ],
)  # fmt: skip
def test_fields_that_are_refused(fields: dict[str, Any], param: str, what: str) -> None:
    with pytest.raises(ApiError, match=re.escape(what)) as caught:
        check({"messages": HELLO, **fields}, ChatRequest, OF_CHAT)
    assert caught.value.status == 400 and caught.value.param == param


def test_fields_that_ask_for_nothing() -> None:
    asked = check(
        {"messages": HELLO, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logit_bias": {},
         "user": "me", "metadata": {"a": 1}, "store": False, "temperature": None, "stop": None, "n": 1},
        ChatRequest, OF_CHAT,
    )  # fmt: skip
    assert asked.stops == () and asked.temperature is None and not asked.with_usage
    assert check({"prompt": [3, 4], "best_of": 1, "stop": "x"}, CompletionRequest, OF_COMPLETIONS).stops == ("x",)
    with pytest.raises(ApiError, match="best_of"):  # control: True is not 1
        check({"prompt": "a", "best_of": True}, CompletionRequest, OF_COMPLETIONS)


def test_messages_as_clients_send_them_back() -> None:
    said = {"role": "assistant", "content": "hi", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    parts = {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    asked = check({"messages": [parts, said, *HELLO]}, ChatRequest, OF_CHAT)
    assert [message.plain() for message in asked.messages] == [
        {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "hi"}, HELLO[0],
    ]  # fmt: skip


def test_options() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("[::1]") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.0.3") and not is_loopback("localhost.evil.com")
    with pytest.raises(MoaiError, match="no API key: set MOAI_API_KEY"):
        Options(host="0.0.0.0")
    assert Options(host="0.0.0.0", api_key="k").api_key == "k"
    for wrong in ({"port": 70000}, {"max_batch": 0}, {"timeout": 0.0}, {"max_body": 3}, {"api_key": "ü"},
                  {"cors_origins": ("chat.example.com",)}, {"cors_origins": ("https://a.b/c",)}):  # fmt: skip
        with pytest.raises(MoaiError):
            Options(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- events


def test_events_come_back_wherever_they_are_cut() -> None:
    values = [{"text": text} for text in ("plain", "줄\n바꿈\r\n끝", "😀 data: x\n\n", "", "\x00\x1f\u2028")]
    stream = b"".join([b": a comment\n\n", *(event(value) for value in values), DONE])
    expected = [*values, "[DONE]"]
    rng = random.Random(0)
    for form in (stream, stream.replace(b"\n", b"\r\n"), stream.replace(b"\n", b"\r")):
        for cuts in [*([k] for k in range(len(form))), *(rng.choices(range(len(form)), k=40) for _ in range(60))]:
            reader, found = EventReader(), []
            places = [0, *sorted(cuts), len(form)]
            for start, end in zip(places, places[1:]):
                found += reader.push(form[start:end])
            assert [data if data == "[DONE]" else json.loads(data) for data in found] == expected


def test_control_a_reader_that_forgets_its_rest_is_wrong() -> None:
    stream = event({"text": "가"})
    found = [data for i in range(len(stream)) for data in EventReader().push(stream[i : i + 1])]
    assert found == []


def test_events_are_valid_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        event({"logprob": float("nan")})


# ---------------------------------------------------------------- text of tokens


def events_of(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...], end: str | None) -> list[Event]:
    """What the engine says of an answer of these tokens."""
    text, events = TextStream(tokenizer, stop), []
    request: Any = SimpleNamespace()
    for place, token in enumerate(ids):
        piece = text.push(token)
        last = text.stopped or (place + 1 == len(ids) and end == "length")
        finished = ("stop" if text.stopped else "length") if last else None
        events.append(Event(request, token, piece + (text.end() if last else ""), -0.5, [(token, -0.5)], finished))
        if text.stopped:
            return events
    if end == "stop":  # by a stop token, which is not part of it
        events.append(Event(request, None, text.end(), finished="stop"))
    return events


def test_tokens_leave_with_their_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    texts = ["복리는 이자에 😀 이자가", "Interest is paid", "日本の首都は東京", "aXaXab", "def add(a, b):\n    return"]
    for _ in range(300):
        text = "".join(rng.choices(texts, k=2))
        ids = tokenizer.encode(text)
        cut = rng.randrange(len(text))
        stop = (text[cut : cut + rng.randint(1, 6)],) if rng.random() < 0.7 else ()
        answer = Answer(tokenizer, detailed=True)
        pieces = [answer.push(one) for one in events_of(tokenizer, ids, stop, rng.choice(["stop", "length"]))]
        whole = "".join(piece.text for piece in pieces)
        assert whole == (text[: text.index(stop[0])] if stop else text)
        tokens = [token for piece in pieces for token in piece.tokens]
        assert [token.id for token in tokens] == ids[: len(tokens)]
        assert all(token.start < len(whole) for token in tokens)
        if not stop:
            assert len(tokens) == len(ids) == answer.count
        left = 0
        for piece in pieces:  # never before the text it begins in
            left += len(piece.text)
            assert all(token.start < left for token in piece.tokens)
        assert "\ufffd" not in whole


def test_log_probabilities_are_finite(tokenizer: Tokenizer) -> None:
    answer = Answer(tokenizer, detailed=True)
    request: Any = SimpleNamespace()
    piece = answer.push(Event(request, 70, "x", float("-inf"), [(70, float("-inf"))], "length"))
    assert piece.tokens[0].logprob == LEAST and piece.tokens[0].top == [(70, LEAST)]


def test_names_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀")
    assert len(ids) > 1 and name_of(tokenizer, ids[0]).startswith("bytes:\\xf0")
    assert name_of(tokenizer, tokenizer.special_ids["<|im_end|>"]) == "<|im_end|>"
    assert name_of(tokenizer, tokenizer.encode("a")[0]) == "a"


# ---------------------------------------------------------------- metrics


def test_metrics_are_in_the_format_of_prometheus() -> None:
    metrics = Metrics()
    metrics.requests["/v1/models", 200] += 2
    for seconds in (0.004, 0.2, 1e9):
        metrics.first_token.observe(seconds)
    lines = metrics.text({"moai_up": ("up", 1.0)}, {"decode_steps": 3}).splitlines()
    pattern = re.compile(r'[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? -?[0-9.e+]+')
    assert all(line.startswith("# ") or pattern.fullmatch(line) for line in lines)
    assert 'moai_requests_total{route="/v1/models",code="200"} 2' in lines
    buckets = [int(line.split()[1]) for line in lines if line.startswith("moai_time_to_first_token_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[0] == 1 and buckets[-1] == 3
    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and "moai_engine_decode_steps_total 3" in lines
