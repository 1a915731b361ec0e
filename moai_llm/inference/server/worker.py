"""The thread in which the model lives. The event loop posts requests into it and gets events back; nothing of the model
ever runs in the loop, and nothing of the loop in here.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from moai_llm.inference.engine import Event
from moai_llm.inference.sampling import Sampling
from moai_llm.runtime import MoaiError, logger

T = TypeVar("T")
# an event of the engine, why there is none, or None: the engine has taken the prompt
News = Event | BaseException | None
Deliver = Callable[[News], None]
FAILURES, REST = 3, 10.0  # after so many steps that failed one after the other nothing is taken for so many seconds


class Steps(Protocol):
    """What the thread needs of an engine."""

    counters: Any

    @property
    def busy(self) -> bool: ...

    @property
    def running(self) -> int: ...

    def submit(self, prompt: list[int], sampling: Sampling) -> Any: ...

    def cancel(self, request: Any) -> None: ...

    def step(self) -> list[Event]: ...


class Idle:
    """The engine of a model that continues no text."""

    busy, running = False, 0

    def __init__(self) -> None:
        self.counters = SimpleNamespace()

    def submit(self, prompt: list[int], sampling: Sampling) -> Any:
        raise MoaiError("this model continues no text")

    def cancel(self, request: Any) -> None: ...

    def step(self) -> list[Event]:
        return []


class Ticket:
    """One answer that is asked of the engine. `deliver` is called in the event loop."""

    def __init__(self, prompt: list[int], sampling: Sampling, deliver: Deliver) -> None:
        self.prompt, self.sampling, self.deliver = prompt, sampling, deliver
        self.request: Any = None
        self.over = False


class Worker:
    """
    Args:
        make_engine: called now, and in the thread after a step that failed.
    """

    def __init__(self, make_engine: Callable[[], Steps]) -> None:
        self._make_engine = make_engine
        self._engine = make_engine()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}  # by the identity of the engine's request
        self._thread = threading.Thread(target=self._run, name="moai-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self.failures, self._failed = 0, 0.0
        self.running = 0
        self.counters: dict[str, int | float] = {}

    # ---------------------------------------------------------------- for the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def healthy(self) -> bool:
        resting = self.failures >= FAILURES and time.monotonic() < self._failed + REST
        return self._thread.is_alive() and not resting

    def submit(self, prompt: list[int], sampling: Sampling, deliver: Deliver) -> Ticket:
        ticket = Ticket(prompt, sampling, deliver)
        self._inbox.put(lambda: self._admit(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Its place in the batch becomes free before the next step; no more events come."""
        ticket.over = True
        self._inbox.put(lambda: self._drop(ticket))

    async def call(self, work: Callable[[], T]) -> T:
        """Run something else with the model, between two steps."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if future.done():  # nobody waits any more
                return
            future.set_exception(error) if error is not None else future.set_result(value)  # type: ignore[arg-type]

        def run() -> None:
            if future.cancelled():
                return
            try:
                value = work()
            except Exception as error:  # it belongs to the one who asked
                loop.call_soon_threadsafe(settle, None, error)
            else:
                loop.call_soon_threadsafe(settle, value, None)

        self._inbox.put(run)
        return await future

    def close(self) -> None:
        """End the thread after the step that runs."""
        self._closed = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(30)

    # ---------------------------------------------------------------- in the thread

    def _run(self) -> None:
        while not self._closed:
            self._read_inbox(wait=not self._engine.busy)
            if self._engine.busy and not self._closed:
                self._step()
            self._count()

    def _read_inbox(self, wait: bool) -> None:
        while True:
            try:
                action = self._inbox.get(block=wait)
            except queue.Empty:
                return
            if action is not None:
                action()
            wait = False

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # whatever a model can do; the server outlives it
            logger.exception("the model failed; its answers end, and the engine is made anew")
            self.failures, self._failed = self.failures + 1, time.monotonic()
            lost, self._tickets = list(self._tickets.values()), {}
            self._engine = self._make_engine()  # before anyone hears of it, so that who tries again is answered
            self._post([(ticket, error) for ticket in lost])
            return
        self.failures = 0
        out: list[tuple[Ticket, News]] = []
        for event in events:
            key = id(event.request)
            ticket = self._tickets.get(key)
            if event.finished is not None:
                self._tickets.pop(key, None)
            if ticket is not None:
                out.append((ticket, event))
        self._count()  # before anyone hears of it
        self._post(out)

    def _admit(self, ticket: Ticket) -> None:
        if ticket.over:
            return
        try:
            ticket.request = self._engine.submit(ticket.prompt, ticket.sampling)
        except Exception as error:  # a prompt the engine cannot take
            self._post([(ticket, error)])
        else:
            self._tickets[id(ticket.request)] = ticket
            self._post([(ticket, None)])

    def _drop(self, ticket: Ticket) -> None:
        if ticket.request is not None and self._tickets.pop(id(ticket.request), None) is not None:
            self._engine.cancel(ticket.request)

    def _post(self, out: list[tuple[Ticket, News]]) -> None:
        if out and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, out)

    def _count(self) -> None:
        self.running = self._engine.running
        self.counters = dict(vars(self._engine.counters))


def _deliver(out: list[tuple[Ticket, News]]) -> None:
    for ticket, event in out:
        if not ticket.over:
            ticket.deliver(event)
