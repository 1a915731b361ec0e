"""A server on a free port of this machine, in a thread, over a small random model."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moai_llm.inference.load import TextModel
from moai_llm.inference.server.app import build_app
from moai_llm.inference.server.options import Options
from moai_llm.inference.server.run import Server, address, listen
from moai_llm.inference.server.service import Service
from moai_llm.inference.server.sse import EventReader
from tests.conftest import tiny_model
from tests.tokenizer.conftest import tokenizer_for

HYBRID = ["linear_attention", "full_attention"]


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return dict(self.json["error"])


@dataclass
class Served:
    """A running server and ways to ask it without a client of anybody."""

    service: Service
    url: str
    loop: asyncio.AbstractEventLoop = field(repr=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> Reply:
        content = json.dumps(body).encode() if raw is None and body is not None else raw
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.ask("POST", f"/v1/{path}", body, headers)

    def complete(self, prompt: Any = "Interest is", **fields: Any) -> Any:
        reply = self.post("completions", {"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields})
        assert reply.status == 200, reply.body
        return reply.json

    def events(self, path: str, body: dict[str, Any]) -> list[str]:
        reply = self.post(path, {**body, "stream": True})
        assert reply.status == 200, reply.body
        return EventReader().push(reply.body)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.01)

    def idle(self) -> None:
        """Nothing runs and nothing waits, in the server and in its engine."""
        self.wait_until(lambda: self.service.active == 0 and not self.service.worker._engine.busy)
        assert not self.service.worker._tickets and not self.service.runs


@pytest.fixture(scope="module")
def text_model() -> TextModel:
    torch.set_num_threads(1)
    tokenizer = tokenizer_for("chatml")
    model = tiny_model(layer_types=HYBRID, vocab_size=tokenizer.padded_vocab_size, max_position_embeddings=256)
    return TextModel(model, tokenizer, Path("tiny"))


@contextmanager
def serving(
    text_model: Any, *, embed: Any = None, engine: dict[str, Any] | None = None, **options: Any
) -> Iterator[Served]:
    service = Service(
        text_model, Options(**{"name": "tiny", "port": 0, "grace": 1.0, **options}), embed=embed, **(engine or {})
    )
    bound = listen("127.0.0.1", 0)
    server = Server(build_app(service), service)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[bound])

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield Served(service, address(bound), loops[0])
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
    assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="module")
def served(text_model: TextModel) -> Iterator[Served]:
    with serving(text_model) as running:
        yield running
