"""Serve a model over HTTP: OpenAI's API under /v1, and a page to talk to it. Ends with Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moai_llm.commands.sampling import add_device
from moai_llm.runtime import MoaiError, logger, require

if TYPE_CHECKING:
    from moai_llm.inference.server.options import Options
    from moai_llm.inference.server.service import Service

KEY_VARIABLE = "MOAI_API_KEY"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a model directory, a run, or a quickstart directory")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes any free one")
    parser.add_argument("--name", help="what requests call the model (default: the directory's name)")
    parser.add_argument(
        "--api-key", help=f"the key requests must carry (default: ${KEY_VARIABLE}); needed where --host is not loopback"
    )
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="an origin whose pages may use the API from a browser, such as https://chat.example.com; may be repeated",
    )  # fmt: skip
    parser.add_argument("--max-batch", type=int, default=16, help="answers that grow at the same time (default 16)")
    parser.add_argument("--max-queue", type=int, default=128, help="answers that wait; one more gets 429 (default 128)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="the longest answer (default 1024)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds an answer may take (default 300)")
    parser.add_argument("--max-body-mb", type=float, default=4, help="the largest request (default 4)")
    parser.add_argument("--grace", type=float, default=10, help="seconds running answers have at the end (default 10)")
    parser.add_argument("--quiet", action="store_true", help="no line for each request")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    for package in ("fastapi", "uvicorn"):
        require(package, "serve")
    from moai_llm.inference.server.options import Options

    options = Options(
        host=arguments.host, port=arguments.port, name=arguments.name or _name_of(arguments.model),
        api_key=arguments.api_key or os.environ.get(KEY_VARIABLE) or None, cors_origins=tuple(arguments.cors_origin),
        max_batch=arguments.max_batch, max_queue=arguments.max_queue, max_new_tokens=arguments.max_new_tokens,
        timeout=arguments.timeout, max_body=int(arguments.max_body_mb * 2**20), grace=arguments.grace,
    )  # fmt: skip
    from moai_llm.inference.server.app import build_app
    from moai_llm.inference.server.run import address, listen, serve

    with listen(options.host, options.port) as bound:
        service = service_of(arguments.model, options, arguments.device, arguments.dtype)
        if arguments.quiet:
            logger.setLevel("WARNING")
        url = address(bound)
        print(f"{options.name} at {url}: a page to talk to it; OpenAI's API at {url}/v1. Ctrl-C ends it", flush=True)
        serve(build_app(service), service, bound)


def service_of(path: str | Path, options: Options, device: str = "auto", dtype: str = "auto") -> Service:
    """The model there, as a server knows it: it continues text, or it makes vectors."""
    from moai_llm.inference.embed import embed, load_embedder
    from moai_llm.inference.load import is_for_vectors, load_model
    from moai_llm.inference.server.service import Service

    if not is_for_vectors(path):
        return Service(load_model(path, device, dtype), options)
    embedder = load_embedder(path, device, dtype)
    return Service(embedder, options, embed=lambda texts: embed(embedder, texts).tolist())


def _name_of(model: str) -> str:
    name = Path(model).resolve().name
    if not name:
        raise MoaiError(f"{model} has no name to call the model by: choose one with --name")
    return name
