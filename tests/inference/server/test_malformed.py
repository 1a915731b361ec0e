"""Bodies that are wrong in every way a seeded generator finds: each gets a 4xx in OpenAI's shape, and the server goes
on.
"""

from __future__ import annotations

import copy
import http.client
import json
import random
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from tests.inference.server.conftest import Served

COMPLETION = {"prompt": "Interest is", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1, "stop": ["x"],
              "seed": 1, "logprobs": 1, "echo": False, "stream": False, "stream_options": None, "typical_p": 0.9,
              "presence_penalty": 0.1, "frequency_penalty": 0.1, "top_k": 3, "min_p": 0.1,
              "repetition_penalty": 1.1}  # fmt: skip
CHAT = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "max_completion_tokens": 2, "temperature": 0.5, "logprobs": True, "top_logprobs": 2, "n": 1,
        "stop": "x", "stream_options": {"include_usage": True}, "stream": False}  # fmt: skip
EMBEDDING = {"input": ["a", "b"], "encoding_format": "float", "dimensions": 3}
ROUTES = {"completions": COMPLETION, "chat/completions": CHAT, "embeddings": EMBEDDING}

# values that are wrong for every field of every route
STRANGE: list[Any] = [
    -1, -0.5, 10**40, -(10**40), 1e308, 2**63, 2**31, {"a": {"b": []}}, [[[]]], [None], [True], {"$ne": 1},
    [{}, 3, "x"], ["a", 1], [[1], ["a"]], [1, -1], [1.5],
]  # fmt: skip


def deep(rng: random.Random) -> bytes:
    count = rng.choice((100, 5_000, 200_000))
    opened, closed = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = opened * count + (b"1" if opened != b"[" else b"") + closed * (count if rng.random() < 0.7 else 0)
    return b'{"prompt": ' + inner + b"}"


def broken_json(rng: random.Random, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    kind = rng.randrange(6)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + rng.choice((b"}", b"x", b"{}", b"\x00"))
    if kind == 2:
        return content.replace(b'"', b"'", rng.randrange(1, 9))
    if kind == 3:
        return content.replace(b":", rng.choice((b"=", b"", b"::")), 1)
    if kind == 4:
        return content.decode().encode(rng.choice(("utf-16", "utf-32-le")))
    return rng.choice((b"", b"null", b"[]", b"3", b'"text"', b"true", b"NaN", b"\xef\xbb\xbf{}"))


def bad_utf8(rng: random.Random, body: dict[str, Any]) -> bytes:
    content = bytearray(json.dumps({**body, "model": "m" * 20}).encode())
    place = content.index(b"mmm") + rng.randrange(15)
    content[place : place + 1] = rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"))
    return bytes(content)


def number_text(rng: random.Random, body: dict[str, Any]) -> bytes:
    """A number that Python's parser lets through, or nearly."""
    field = rng.choice(("max_tokens", "temperature", "n", "top_p", "seed", "dimensions"))
    written = rng.choice(
        ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 6000, "0x10", "1_0", "01", "+1")
    )
    content = json.dumps({**body, field: "HERE"}).replace('"HERE"', written)
    return content.encode()


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += [(value, key), *places(inner)]
    return found


def wrong_value(rng: random.Random, body: dict[str, Any]) -> bytes:
    changed = copy.deepcopy(body)
    container, key = rng.choice(places(changed))
    container[key] = rng.choice(STRANGE)
    return json.dumps(changed).encode()


def missing(rng: random.Random, body: dict[str, Any]) -> bytes:
    changed = copy.deepcopy(body)
    needed = next(name for name in ("prompt", "messages", "input") if name in changed)
    if needed == "messages" and rng.random() < 0.5:
        del changed["messages"][0][rng.choice(("role", "content"))]
        return json.dumps(changed).encode()
    del changed[needed]
    return json.dumps(changed).encode()


def unknown(rng: random.Random, body: dict[str, Any]) -> bytes:
    name = rng.choice(("temprature", "", "prompt\x00", "__proto__", "a" * 10_000, "model_config", "이자", "tools[]"))
    return json.dumps({**body, name: rng.choice((1, None, "x", {}))}).encode()


def surrogates(rng: random.Random, body: dict[str, Any]) -> bytes:
    half = rng.choice(("\\ud83d", "\\udc00", "x\\udfff\\ud800"))
    return json.dumps({**body, "model": "HERE"}).replace("HERE", half).encode()


def extreme(rng: random.Random, body: dict[str, Any]) -> bytes:
    """The right type, beyond what there is room for."""
    ways: list[dict[str, Any]] = [
        {"max_tokens": 10**9}, {"n": 10**6}, {"stop": ["x"] * 1000}, {"stop": "x" * 5000}, {"stop": [""]},
        {"temperature": 2.0000001}, {"top_p": 0}, {"logprobs": 10**6}, {"top_k": -1}, {"model": "x" * 100_000},
        {"repetition_penalty": 0}, {"seed": -(2**63) - 1}, {"dimensions": 0}, {"presence_penalty": 2.1},
    ]  # fmt: skip
    if "prompt" in body:
        ways += [{"prompt": "word " * 4000}, {"prompt": [2**30]}, {"prompt": ["x"] * 400}, {"prompt": [[]]}]
    if "messages" in body:
        ways += [{"messages": [{"role": "user", "content": "x " * 3000}]}, {"messages": []}, {"top_logprobs": 21}]
    return json.dumps({**body, **rng.choice(ways)}).encode()


Way = Callable[[random.Random, dict[str, Any]], bytes]
WAYS: list[Way] = [
    lambda rng, _: deep(rng), broken_json, bad_utf8, number_text, wrong_value, wrong_value, wrong_value, missing,
    unknown, surrogates, extreme,
]  # fmt: skip


def harmless(body: bytes) -> bool:
    """A change that left a request that is right: a whole number is one of these fields' values."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    allowed = {"seed": (-1, 2**31), "presence_penalty": (-1, -0.5), "frequency_penalty": (-1, -0.5)}
    return isinstance(value, dict) and any(value.get(name) in values for name, values in allowed.items())


def run(served: Served, count: int, seed: int) -> dict[int, int]:
    """Statuses of so many malformed requests over one connection that is opened anew where the server closed it."""
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as connection:
        return _send(connection, count, random.Random(seed))


def _send(connection: http.client.HTTPConnection, count: int, rng: random.Random) -> dict[int, int]:
    statuses, sent = dict[int, int](), 0
    while sent < count:
        path = rng.choice(list(ROUTES))
        body = rng.choice(WAYS)(rng, ROUTES[path])
        if harmless(body):
            continue
        sent += 1
        connection.request("POST", f"/v1/{path}", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        assert 400 <= answer.status < 500, (path, body[:300], content[:300])
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"} and len(content) < 2000
    return statuses


def check(served: Served, count: int, seed: int) -> None:
    before = served.complete()
    statuses = run(served, count, seed)
    assert sum(statuses.values()) == count and statuses[400] > count / 2
    assert served.ask("GET", "/health").json["status"] == "ok" and served.complete()["choices"] == before["choices"]
    served.idle()
    assert not [key for key in served.service.metrics.requests if key[1] >= 500]


def test_malformed_bodies(served: Served) -> None:
    check(served, 300, seed=0)


@pytest.mark.slow
def test_many_malformed_bodies(served: Served) -> None:
    check(served, 4000, seed=1)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_control_the_bodies_that_are_changed_are_right(served: Served, path: str) -> None:
    assert served.post(path, ROUTES[path]).status == 200


def test_extremes_that_are_allowed(served: Served) -> None:
    for fields in (
        {"temperature": 1e-300}, {"temperature": 5e-324}, {"top_p": 1e-300}, {"min_p": 1}, {"typical_p": 1e-300},
        {"repetition_penalty": 1e-300}, {"repetition_penalty": 10}, {"presence_penalty": -2, "frequency_penalty": 2},
        {"seed": -(2**63)}, {"seed": 2**63 - 1}, {"top_k": 2**31 - 1}, {"logprobs": 20}, {"stop": ["\x00", "😀" * 200]},
        {"temperature": 2, "top_k": 1, "n": 128, "max_tokens": 1}, {"prompt": "\x00\u2028\ufeff<|im_end|>"},
    ):  # fmt: skip
        assert served.post("completions", {"prompt": "a", "max_tokens": 3, **fields}).status == 200, fields


def test_what_is_no_http_or_no_body(served: Served) -> None:
    import socket

    for content in (b"\x16\x03\x01\x00", b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n",
                    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
                    b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    b"GET / HTTP/1.1\r\nHost: \xff\xfe\r\n\r\n"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
            try:
                connection.sendall(content)
                answer = connection.recv(4000)
            except OSError:
                answer = b""
            assert not answer or answer.split()[1][:1] == b"4", (content[:50], answer[:200])
    assert served.ask("GET", "/health").json["status"] == "ok"
