"""The routes."""

from __future__ import annotations

import array
import base64
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from moai_llm import __version__
from moai_llm.inference.server import generate
from moai_llm.inference.server.body import read_request
from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.guard import LEFT, Gate, Watch, respond
from moai_llm.inference.server.protocol import (
    OF_CHAT,
    OF_COMPLETIONS,
    OF_EMBEDDINGS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
)  # fmt: skip
from moai_llm.inference.server.service import Service
from moai_llm.inference.server.sse import Gone, to_json
from moai_llm.pages.html import STYLE

PAGE = Path(__file__).parent / "page"
# what the chat page is made of, by the last part of the address: the files, put together, and their type
FILES = {
    "": ((PAGE / "index.html",), "text/html"),
    "chat.css": ((STYLE, PAGE / "chat.css"), "text/css"),
    "chat.js": ((PAGE / "chat.js",), "text/javascript"),
    "api.js": ((PAGE / "api.js",), "text/javascript"),
    "markdown.js": ((PAGE / "markdown.js",), "text/javascript"),
    "icon.svg": ((PAGE / "icon.svg",), "image/svg+xml"),
    "favicon.ico": ((PAGE / "icon.svg",), "image/svg+xml"),  # what browsers ask for at /health
}
OPEN = frozenset(("/health", *(f"/{name}" for name in FILES)))  # no key is asked for these
API = frozenset(("/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/embeddings"))


MOST_TEXTS = 2048  # to embed in one request, as at OpenAI


def build_app(service: Service) -> FastAPI:
    """The application for one model. Its start starts the thread of the model."""
    options = service.options

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.cut()
        service.close()

    # its own pages of documentation load scripts from elsewhere
    app = FastAPI(title="MOAI-LLM", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  openapi_url=None)  # fmt: skip
    app.router.redirect_slashes = False
    app.add_middleware(Gate, options=options, open_paths=OPEN)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["*"], expose_headers=["Retry-After"],
        )  # fmt: skip
    app.add_middleware(Watch, metrics=service.metrics, routes=OPEN | API)
    _say_errors(app)
    _add_page(app)

    @app.get("/health")
    async def health() -> Response:
        state = "stopping" if service.closing else "ok" if service.worker.healthy else "failed"
        content = {"status": state, "model": options.name, "running": service.worker.running,
                   "waiting": max(0, service.active - service.worker.running)}  # fmt: skip
        return Response(to_json(content), 200 if state == "ok" else 503, media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        worker = service.worker
        gauges: dict[str, tuple[str, float]] = {
            "moai_running": ("answers in the running batch", worker.running),
            "moai_waiting": ("answers that wait for a place", max(0, service.active - worker.running)),
            "moai_up": ("1 while the model answers", float(worker.healthy)),
        }
        kind = "text/plain; version=0.0.4; charset=utf-8"  # what Prometheus asks for
        return Response(service.metrics.text(gauges, worker.counters), media_type=kind)

    model = {
        "id": options.name, "object": "model", "created": int(time.time()), "owned_by": "moai-llm",
        "context": service.context, "chat": service.can_chat,
        "embeddings": service.embed is not None, "max_new_tokens": options.max_new_tokens,
    }  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        wanted = await read_request(request, CompletionRequest, OF_COMPLETIONS, options.max_body)
        return await generate.complete(service, request, wanted)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        wanted = await read_request(request, ChatRequest, OF_CHAT, options.max_body)
        return await generate.chat(service, request, wanted)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        wanted = await read_request(request, EmbeddingRequest, OF_EMBEDDINGS, options.max_body)
        return await embed(service, request, wanted)

    return app


async def embed(service: Service, request: Request, wanted: EmbeddingRequest) -> Response:
    """/v1/embeddings, for a model that makes them."""
    service.check_model(wanted.model)
    run = service.embed
    if run is None:
        raise ApiError(
            400, f"{service.options.name} continues text and makes no embeddings", param="model", code="no_embeddings"
        )
    prompts = await service.prompts(wanted.input, "input", MOST_TEXTS)
    longest = max(map(len, prompts))
    if not all(prompts) or longest > service.context:
        what = "an empty text" if not all(prompts) else f"{longest} tokens; the context is {service.context}"
        raise ApiError(400, f"{what} cannot be embedded", param="input")
    # what is text already stays as it is
    texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input
    if not isinstance(texts[0], str):
        texts = [service.tokenizer.decode(prompt) for prompt in prompts]
    vectors = [list(map(float, vector)) for vector in await service.with_model(request, lambda: run(texts))]
    if wanted.dimensions is not None:
        if wanted.dimensions > len(vectors[0]):
            raise ApiError(400, f"embeddings have {len(vectors[0])} dimensions", param="dimensions")
        vectors = [_unit(vector[: wanted.dimensions]) for vector in vectors]
    packed = wanted.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": i, "embedding": _packed(vector) if packed else vector}
        for i, vector in enumerate(vectors)
    ]
    tokens = sum(map(len, prompts))
    used = {"prompt_tokens": tokens, "total_tokens": tokens}
    answer = {"object": "list", "data": data, "model": service.options.name, "usage": used}
    return Response(to_json(answer), media_type="application/json")


def _unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(value * value for value in vector)) or 1.0
    return [value / norm for value in vector]


def _packed(vector: list[float]) -> str:
    """Little-endian fp32 in base64, what OpenAI's client asks for."""
    return base64.b64encode(array.array("f", vector).tobytes()).decode("ascii")


def _add_page(app: FastAPI) -> None:
    def add(name: str, content: bytes, kind: str) -> None:
        async def file() -> Response:
            return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.add_api_route(f"/{name}", file, methods=["GET", "HEAD"], response_class=Response)

    for name, (files, kind) in FILES.items():
        add(name, b"".join(file.read_bytes() for file in files), kind)


def _say_errors(app: FastAPI) -> None:
    """Every error has the shape of OpenAI's."""

    @app.exception_handler(ApiError)
    async def ours(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(Gone)
    async def of_nobody(_: Request, __: Exception) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(HTTPException)
    async def of_the_router(request: Request, error: HTTPException) -> Response:
        names = {404: f"there is nothing at {request.url.path[:100]}", 405: f"{request.method} is not for this route"}
        return respond(ApiError(error.status_code, names.get(error.status_code, error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def of_no_kind(_: Request, error: Exception) -> Response:
        return respond(ApiError(500, "the server failed; its log says more", code="internal_error"))
