"""Before and around every route: who may come in, what each answer carries, what is counted."""

from __future__ import annotations

import hmac
import time

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.metrics import Metrics
from moai_llm.inference.server.options import Options, is_loopback
from moai_llm.inference.server.sse import to_json
from moai_llm.runtime import logger

# scripts and styles come from this server alone, and no string becomes HTML whatever a script tries
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
LEFT = 499  # the client went away before the answer: nginx's number


def respond(error: ApiError) -> Response:
    return Response(to_json(error.content()), error.status, error.headers, "application/json")


class Watch:
    """Outermost: counts and logs each request, and puts the safety headers on each answer. Never logs texts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = LEFT, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests[route, status] += 1
            if route.startswith("/v1/"):
                logger.info("%s %s %d %.2fs", scope["method"], route, status, time.perf_counter() - began)


class Gate:
    """The API key where there is one; else the name under which the server was reached: a page of another site can make
    its name resolve to this machine, but not change what the browser then writes into `Host`.
    """

    def __init__(self, app: ASGIApp, options: Options, open_paths: frozenset[str]) -> None:
        self.app, self.options, self.open_paths = app, options, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await respond(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name: value for name, value in scope["headers"]}
        if self.options.api_key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
            if is_loopback(name):
                return None
            return ApiError(403, f"without an API key this server answers to localhost only, not to {host[:100]!r}")
        if scope["path"] in self.open_paths:
            return None
        given = headers.get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.options.api_key.encode()):
            return None
        what = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        return ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
