"""Tokens per second of `moai serve` with 16 clients at once against one client after the other: the same server, the
same requests. What the clients read is compared first.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.harness import Disagreement, Table, threads
from moai_llm.inference.load import TextModel
from moai_llm.inference.server.sse import EventReader
from moai_llm.tokenizer.train import build_tokenizer

VOCAB, CLIENTS = 32000, 16


@dataclass
class Reading:
    """What one client has read of a streamed answer, and when, in seconds since it asked."""

    text: str
    tokens: int
    first: float
    seconds: float
    finish: str | None


async def read_answer(port: int, path: str, body: dict[str, Any], leave_after: int | None = None) -> Reading:
    """Ask for a stream on a connection of its own, and read it with nothing between: a client library costs more than
    a small model.

    Args:
        leave_after: hang up after so many pieces of text.
    """
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode()
        + content
    )
    reading, pieces, events = Reading("", 0, 0.0, 0.0, None), 0, EventReader()
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError((head + await reader.read()).decode("utf-8", "replace"))
        while leave_after is None or pieces < leave_after:
            size = int(await reader.readuntil(b"\r\n"), 16)  # chunks of HTTP
            piece = await reader.readexactly(size + 2)
            for data in events.push(piece[:size]):
                if data == "[DONE]":
                    return reading
                pieces += _add(reading, json.loads(data), began)
            reading.seconds = time.perf_counter() - began
    finally:
        writer.close()
    return reading


def _add(reading: Reading, chunk: dict[str, Any], began: float) -> bool:
    """Whether it held text."""
    if chunk.get("usage"):
        reading.tokens = chunk["usage"]["completion_tokens"]
    text = ""
    for choice in chunk["choices"]:
        text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        reading.finish = choice["finish_reason"] or reading.finish
    if text and not reading.text:
        reading.first = time.perf_counter() - began
    reading.text += text
    return bool(text)


async def together(port: int, path: str, bodies: list[dict[str, Any]]) -> list[Reading]:
    return list(await asyncio.gather(*(read_answer(port, path, body) for body in bodies)))


async def in_turn(port: int, path: str, bodies: list[dict[str, Any]]) -> list[Reading]:
    return [await read_answer(port, path, body) for body in bodies]


@contextmanager
def serving(text_model: TextModel, **options: Any) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    from moai_llm.inference.server.app import build_app
    from moai_llm.inference.server.options import Options
    from moai_llm.inference.server.run import Server, listen
    from moai_llm.inference.server.service import Service

    # without the cache of prefixes, as the same prompts are asked again
    service, bound = Service(text_model, Options(**options), prefix_cache=False), listen("127.0.0.1", 0)
    server = Server(build_app(service), service)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def run(quick: bool = False) -> list[Table]:
    rounds, clients, length, prompt = (1, 4, 8, 8) if quick else (3, CLIENTS, 48, 32)
    tokenizer = build_tokenizer([], ["<|endoftext|>", "<|pad|>"])  # bytes: what a token says does not matter here
    tables = []
    for dtype in (torch.float32, torch.bfloat16):
        kinds = {
            "dense, 100M": lambda: models.ours(models.qwen3(VOCAB, **models.DENSE_100M)),
            "Mamba, 115M": lambda: models.ours(models.mamba(VOCAB, **models.MAMBA_100M)),
        }
        table = Table(
            f"{clients} clients, {prompt} tokens of prompt, up to {length} of answer, {str(dtype)[6:]}",
            ("model", "clients", "tokens/s", "first token, median ms", "an answer, median ms"),
        )
        print(table.title)
        for name, make in kinds.items():
            with threads(2):
                _measure(table, name, make().to(dtype).eval(), tokenizer, clients, (rounds, length, prompt))
        tables.append(table)
    return tables


def _measure(table: Table, name: str, model: Any, tokenizer: Any, clients: int, sizes: tuple[int, int, int]) -> None:
    rounds, length, prompt = sizes
    generator = torch.Generator().manual_seed(0)
    bodies = [
        {"prompt": torch.randint(2, tokenizer.vocab_size, (prompt,), generator=generator).tolist(),
         "max_tokens": length, "temperature": 0}
        for _ in range(clients)
    ]  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {"1": [], str(clients): []}
    with serving(TextModel(model, tokenizer, Path()), port=0, max_batch=clients) as port:
        asyncio.run(in_turn(port, "/v1/completions", bodies[:1]))  # kernels that are built on first use
        for _ in range(rounds):
            readings = {}
            for way, ask in (("1", in_turn), (str(clients), together)):
                began = time.perf_counter()
                readings[way] = asyncio.run(ask(port, "/v1/completions", bodies))
                seconds = time.perf_counter() - began
                tokens = sum(reading.tokens for reading in readings[way])
                firsts, whole = [r.first for r in readings[way]], [r.seconds for r in readings[way]]
                found[way].append((tokens / seconds, statistics.median(firsts), statistics.median(whole)))
            if model.dtype == torch.float32:
                require_same(readings["1"], readings[str(clients)])
    for way, measured in found.items():
        rate, first, whole = (statistics.median(values) for values in zip(*measured))
        table.add(name, way, rate, first * 1e3, whole * 1e3)
    ratio = statistics.median(many[0] / one[0] for one, many in zip(found["1"], found[str(clients)]))
    table.goal(f"{name}: {clients} clients at once against one after the other", ratio, at_least=3)


def require_same(one: list[Reading], many: list[Reading]) -> None:
    """Greedy answers are the same, alone and in a batch.

    Raises:
        Disagreement: one is not.
    """
    for a, b in zip(one, many):
        if a.text != b.text:
            raise Disagreement(f"alone {a.text!r}, among others {b.text!r}")
