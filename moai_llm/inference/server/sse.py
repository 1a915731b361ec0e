"""Server-sent events: one way to write them, one to read them, and a response that ends when its reader leaves."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
ALIVE = b": still here\n\n"  # a comment: keeps proxies from closing a stream that waits in the queue


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")


def event(value: Any) -> bytes:
    """One event. JSON writes line ends as escapes, so a value is always one line."""
    return b"data: " + to_json(value) + b"\n\n"


class EventReader:
    """Bytes in, the data of events out, wherever the bytes were cut (the field `data` and comments of the format of
    https://html.spec.whatwg.org/multipage/server-sent-events.html).
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line, self._data, self._after_return = "", list[str](), False

    def push(self, piece: bytes) -> list[str]:
        found = []
        for character in self._decoder.decode(piece):
            second_half = self._after_return and character == "\n"
            self._after_return = character == "\r"
            if second_half:
                continue
            if character not in "\r\n":
                self._line += character
                continue
            line, self._line = self._line, ""
            if not line and self._data:
                found.append("\n".join(self._data))
                self._data = []
            elif line.startswith("data:"):
                self._data.append(line[5:].removeprefix(" "))
        return found


class EventStream(Response):
    """Sends what an iterator gives. When the reader leaves, that ends at once, not at the next event.

    Args:
        close: called at the end, however it comes, also when nothing was ever read.
        limit: seconds after which the reader is left behind.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], limit: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.pieces, self.close, self.limit = pieces, close, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            await asyncio.wait({writing, leaving}, timeout=self.limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _stop(writing, leaving)
            self.close()
        if not writing.cancelled() and (error := writing.exception()) is not None:
            raise error

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Gone(Exception):
    """The client has left: there is nobody to answer."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives.

    Raises:
        Gone: the client has left before; the work has been stopped.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        await _stop(working, leaving)


async def _stop(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
