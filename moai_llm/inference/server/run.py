"""Sockets, signals, and an end that loses nothing it does not have to."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from moai_llm.inference.server.service import Service
from moai_llm.runtime import MoaiError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Server(uvicorn.Server):
    """uvicorn that asks the service to end: the first signal lets running answers finish within the grace time and then
    cuts them with a reason, the second cuts them at once. Either is an ordinary end, with exit code 0.
    """

    def __init__(self, app: FastAPI, service: Service) -> None:
        grace = service.options.grace
        config = uvicorn.Config(
            app, host=service.options.host, port=service.options.port, log_level=logging.WARNING, access_log=False,
            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=int(grace) + 5, ws="none",
            log_config=None,
        )  # fmt: skip
        super().__init__(config)
        self.service = service
        self._loop: asyncio.AbstractEventLoop | None = None  # once the end has begun

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # in a test or a notebook
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self.service.cut)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        service, loop = self.service, asyncio.get_running_loop()
        self._loop = loop
        service.drain()
        if service.active:
            time = f"{service.options.grace:g} s to end; Ctrl-C again cuts them"
            print(f"stopping: running answers ({service.active}) have {time}", flush=True)
        cutting = loop.call_later(service.options.grace, service.cut)
        await super().shutdown(sockets)
        cutting.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded.

    Raises:
        MoaiError: it is in use, or the host is not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where a socket names its protocol; else each waits 40 ms
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host.strip("[]"), port))
        bound.listen(512)
        return bound
    except OSError as error:
        bound.close()
        raise MoaiError(f"cannot listen on {host}, port {port}: {error.strerror}; --port chooses another") from None


def address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(app: FastAPI, service: Service, bound: socket.socket) -> None:
    """Until a signal ends it."""
    server: Any = Server(app, service)
    server.run(sockets=[bound])
