"""The answers of one request: asked of the engine, given back piece by piece, and ended in time. Whatever ends the
request, the places of its answers become free.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import NamedTuple

from moai_llm.inference.engine import Event
from moai_llm.inference.sampling import Sampling
from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.service import Service
from moai_llm.inference.server.text import Answer, Piece
from moai_llm.inference.server.worker import News, Ticket
from moai_llm.runtime import MoaiError

PULSE = 15.0  # seconds between two signs of life of a stream, whether it waits or not


class Ask(NamedTuple):
    """An answer that is wanted."""

    prompt: list[int]
    sampling: Sampling


class Update(NamedTuple):
    """News of a choice; `finish` is OpenAI's reason, once it is over. choice -1: a sign of life."""

    choice: int
    piece: Piece
    finish: str | None = None


class Answers:
    """
    Args:
        detailed: log-probabilities are wanted.
    """

    def __init__(self, service: Service, asks: list[Ask], detailed: bool) -> None:
        self.service, self.asks = service, asks
        self.states = [Answer(service.tokenizer, detailed) for _ in asks]
        self._tickets: list[Ticket] = []
        self._open: dict[int, Ticket] = {}
        self._inbox: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        self._early: list[tuple[int, News]] = []
        self._began, self._first, self._over = time.perf_counter(), False, False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def tokens(self) -> int:
        return sum(state.count for state in self.states)

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were known from earlier; of choices that share a prompt the first counts."""
        firsts = {id(ticket.prompt): ticket for ticket in reversed(self._tickets)}
        return sum(ticket.request.reused for ticket in firsts.values() if ticket.request is not None)

    async def start(self) -> None:
        """Take places, and wait until the engine has taken the prompts.

        Raises:
            ApiError: there is no place, or the engine refuses a prompt.
        """
        service = self.service
        service.enter(len(self.asks))
        service.runs.add(self._end)
        late = ApiError(
            503, f"no place became free within {service.options.timeout:g} s", code="timeout",
            headers={"Retry-After": str(service.seconds_until_room())},
        )  # fmt: skip
        self._timers["limit"] = asyncio.get_running_loop().call_later(service.options.timeout, self._end, late)
        for i, ask in enumerate(self.asks):
            deliver = lambda news, i=i: self._inbox.put_nowait((i, news))  # noqa: E731
            self._open[i] = service.worker.submit(ask.prompt, ask.sampling, deliver)
        self._tickets = list(self._open.values())
        try:
            missing = len(self.asks)
            while missing:
                index, news = await self._inbox.get()
                if isinstance(news, BaseException):
                    raise self._error(news)
                missing -= news is None
                if news is not None:
                    self._early.append((index, news))
        except BaseException:
            self.close()
            raise
        self.service.metrics.prompt_tokens += sum(len(ask.prompt) for ask in self.asks)
        self._pulse()

    async def updates(self) -> AsyncIterator[list[Update]]:
        """What has happened since the last time, as soon as anything has.

        Raises:
            ApiError: the model failed, or the server ends. A time limit ends an answer that has begun as a limit of
                tokens does.
        """
        while self._open:
            waiting = self._early or [await self._inbox.get()]
            self._early = []
            while not self._inbox.empty():
                waiting.append(self._inbox.get_nowait())
            yield [update for index, news in waiting for update in self._read(index, news)]
        self.close()

    def _read(self, index: int, news: News) -> list[Update]:
        if news is None:
            return [Update(-1, Piece("", []))]
        if isinstance(news, ApiError) and news.code == "timeout" and self._first:
            still = list(self._open.items())
            for i, ticket in still:
                self.service.worker.cancel(ticket)
                self._finish(i, "length")
            return [Update(i, Piece("", []), "length") for i, _ in still]
        if isinstance(news, BaseException):
            raise self._error(news)
        return [self._update(index, news)] if index in self._open else []

    def close(self) -> None:
        """Leave all places; may be called twice."""
        if self._over:
            return
        self._over = True
        for ticket in self._open.values():
            self.service.worker.cancel(ticket)
        service, metrics = self.service, self.service.metrics
        for timer in self._timers.values():
            timer.cancel()
        service.runs.discard(self._end)
        service.leave(len(self.asks))
        metrics.finished["cut"] += len(self._open)
        metrics.generated_tokens += self.tokens
        if not self._open:
            metrics.latency.observe(time.perf_counter() - self._began)
        self._open.clear()

    def _pulse(self) -> None:
        if "pulse" in self._timers:
            self._inbox.put_nowait((-1, None))
        self._timers["pulse"] = asyncio.get_running_loop().call_later(PULSE, self._pulse)

    def _end(self, error: ApiError) -> None:
        self._inbox.put_nowait((-1, error))

    def _update(self, index: int, news: Event) -> Update:
        if news.token is not None and not self._first:
            self._first = True
            self.service.metrics.first_token.observe(time.perf_counter() - self._began)
        piece = self.states[index].push(news)
        if news.finished is not None:
            self._finish(index, news.finished)
        return Update(index, piece, news.finished)

    def _finish(self, index: int, reason: str) -> None:
        del self._open[index]
        self.service.metrics.finished[reason] += 1

    @staticmethod
    def _error(news: BaseException) -> ApiError:
        if isinstance(news, ApiError):
            return news
        if isinstance(news, MoaiError):
            return ApiError(400, str(news))
        return ApiError(500, "the model failed on this request; the server's log says more", code="model_failed")
