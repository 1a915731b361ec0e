"""What all requests of a server share: the model, the places in the queue, and the way to its end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from fastapi import Request

from moai_llm.inference.engine import Engine
from moai_llm.inference.load import TextModel
from moai_llm.inference.server.errors import ApiError, stopping
from moai_llm.inference.server.metrics import Metrics
from moai_llm.inference.server.options import Options
from moai_llm.inference.server.sse import unless_gone
from moai_llm.inference.server.worker import Idle, Worker
from moai_llm.runtime import MoaiError
from moai_llm.tokenizer import Tokenizer
from moai_llm.tokenizer.chat import can_chat, render

T = TypeVar("T")
SHORT = 2000  # characters that are tokenised without a detour through a thread
Embed = Callable[[list[str]], Sequence[Sequence[float]]]


class Model(Protocol):
    """What every request needs of a model; a `TextModel`, or one that makes vectors."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def context(self) -> int: ...


class Service:
    """
    Args:
        model: continues text if it is a `TextModel`; another only embeds.
        embed: texts to vectors, run in the thread of the model; None for a model that makes none.
        engine: the engine's further options.
    """

    def __init__(self, model: Model, options: Options, *, embed: Embed | None = None, **engine: Any) -> None:
        self.model, self.options, self.embed = model, options, embed
        self.tokenizer, self.context = model.tokenizer, model.context
        self.generates = isinstance(model, TextModel)
        self.can_chat = self.generates and can_chat(self.tokenizer)
        if isinstance(model, TextModel):
            self.worker = Worker(lambda: Engine(model, max_batch=options.max_batch, **engine))
        else:
            self.worker = Worker(Idle)
        self.metrics = Metrics()
        self.active = 0  # answers that run or wait
        self.runs: set[Callable[[ApiError], None]] = set()  # how to end each request that is not over
        self.closing = False
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="moai-text")

    # ---------------------------------------------------------------- places

    @property
    def room(self) -> int:
        """Answers that may run and wait."""
        return self.options.max_batch + self.options.max_queue

    def enter(self, count: int) -> None:
        """Take places for so many answers.

        Raises:
            ApiError: 503 at shutdown or after the model failed, 429 where the queue is full, 400 where it never
                suffices.
        """
        if self.closing:
            raise stopping()
        if not self.worker.healthy:
            raise ApiError(503, "the model fails; see the server's log", code="model_failed")
        if count > self.room:
            what = f"{count} answers are asked for, and this server holds {self.room} at a time"
            raise ApiError(400, what, param="n")
        if self.active + count > self.room:
            self.metrics.refused += 1
            seconds = str(self.seconds_until_room())
            raise ApiError(
                429, f"the queue is full; try again in about {seconds} s", code="queue_full",
                headers={"Retry-After": seconds},
            )  # fmt: skip
        self.active += count

    def leave(self, count: int) -> None:
        self.active -= count

    async def with_model(self, request: Request, work: Callable[[], T]) -> T:
        """Run something that is no answer in the thread of the model. It takes a place, as an answer does.

        Raises:
            ApiError: there is no place, or no result in time.
            Gone: the client left before.
        """
        self.enter(1)
        try:
            return await asyncio.wait_for(unless_gone(request, self.worker.call(work)), self.options.timeout)
        except asyncio.TimeoutError:
            what = f"not done within {self.options.timeout:g} s"
            raise ApiError(503, what, code="timeout", headers={"Retry-After": str(self.seconds_until_room())}) from None
        finally:
            self.leave(1)

    def seconds_until_room(self) -> int:
        """A guess: the mean time of an answer, shared by those that run together."""
        latency = self.metrics.latency
        mean = latency.total / latency.count if latency.count else 1.0
        return min(60, max(1, math.ceil(mean / self.options.max_batch)))

    # ---------------------------------------------------------------- text

    async def off_loop(self, work: Callable[[], T], size: int) -> T:
        """Tokenising, out of the way of the event loop where it is long.

        Raises:
            ApiError: 400 for what the tokenizer or the chat template refuses.
        """
        try:
            if size <= SHORT:
                return work()
            return await asyncio.get_running_loop().run_in_executor(self._texts, work)
        except MoaiError as error:
            raise ApiError(400, str(error)) from None

    async def conversation(self, messages: list[dict[str, Any]]) -> list[int]:
        size = sum(len(message["content"] or "") + 20 for message in messages)
        rendered = await self.off_loop(lambda: render(self.tokenizer, messages, add_generation_prompt=True), size)
        return rendered.ids

    async def prompts(
        self, given: str | list[int] | list[str] | list[list[int]], field: str, most: int
    ) -> list[list[int]]:
        """One prompt or several, each as text or as ids, to ids.

        Raises:
            ApiError: there is none, there are more than `most`, or an id is no token.
        """
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        texts: list[Any] = list(given) if several else [given]
        if not given:
            raise ApiError(400, f"{field} is empty: give the model something to read", param=field)
        if len(texts) > most:
            raise ApiError(400, f"{len(texts)} prompts, and this server takes {most} at a time", param=field)
        return [await self._ids(text, field) for text in texts]

    async def _ids(self, prompt: str | list[int], field: str) -> list[int]:
        if isinstance(prompt, str):
            return await self.off_loop(lambda: self.tokenizer.encode(prompt), len(prompt))
        if prompt and max(prompt) >= self.tokenizer.vocab_size:
            last = self.tokenizer.vocab_size - 1
            raise ApiError(400, f"{field} holds the token {max(prompt)}; the last one is {last}", param=field)
        return prompt

    def check_generates(self) -> None:
        if not self.generates:
            what = f"{self.options.name} makes embeddings and continues no text: use /v1/embeddings"
            raise ApiError(400, what, param="model", code="no_generation")

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.name:
            raise ApiError(
                404, f"there is no model {name[:100]!r} here, only {self.options.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def room_for(self, prompt: list[int], asked: int | None, default: int, field: str) -> int:
        """Tokens an answer may have.

        Raises:
            ApiError: the prompt is empty or too long, or more is asked for than there is room.
        """
        most, room = self.options.max_new_tokens, self.context - len(prompt)
        if not prompt:
            raise ApiError(400, "an empty prompt: give the model something to continue", param=field)
        if asked is not None and asked > most:
            raise ApiError(400, f"an answer may have {most} tokens here, {asked} are asked for", param="max_tokens")
        if room < max(asked or 0, 1):
            what = f"the context is {self.context} tokens: {len(prompt)} of the prompt and {asked or 1} of the answer"
            raise ApiError(400, f"{what} do not fit", param=field, code="context_length_exceeded")
        return min(most, room, default) if asked is None else asked

    # ---------------------------------------------------------------- the end

    def drain(self) -> None:
        """No new requests; those that run go on."""
        self.closing = True

    def cut(self) -> None:
        """End all requests that are not over, and tell them why."""
        self.closing = True
        for end in list(self.runs):
            end(stopping())

    def close(self) -> None:
        self.worker.close()
        self._texts.shutdown(wait=False)
