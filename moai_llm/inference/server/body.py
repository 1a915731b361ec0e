"""The bytes of a request to a checked request, or an error that says what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect

from moai_llm.inference.server.errors import ApiError
from moai_llm.inference.server.protocol import IGNORED, Unsupported
from moai_llm.runtime import did_you_mean

Model = TypeVar("Model", bound=BaseModel)
HEARD = 8  # limits of a body that are read, and dropped, so that its sender gets to the answer
SECONDS = 30.0  # a body that takes longer keeps a connection for nothing


async def read_request(
    request: Request, model: type[Model], unsupported: Mapping[str, Unsupported], limit: int
) -> Model:
    """The body as a `model`.

    Raises:
        ApiError: 413 or 408 for a body that is too long or too slow, 415 for another type than JSON, 400 for all else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also what keeps a page of another origin from asking without a preflight
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    try:
        content = await asyncio.wait_for(_read(request, limit), SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS:.0f} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the body ended early") from None
    return check(parse(content), model, unsupported)


async def _read(request: Request, limit: int) -> bytes:
    too_long = ApiError(
        413, f"a request may have {limit:,} bytes; its operator sets --max-body-mb", headers={"Connection": "close"}
    )
    content, seen = bytearray(), 0
    async for piece in request.stream():
        seen += len(piece)
        if seen <= limit:
            content += piece
        elif seen > HEARD * limit:
            raise too_long
    if seen > limit:
        raise too_long
    return bytes(content)


def parse(content: bytes) -> dict[str, Any]:
    """A JSON object. NaN, infinities and lone surrogates are none of JSON's values, whatever Python says.

    Raises:
        ApiError: it is not one.
    """
    try:
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def check(value: dict[str, Any], model: type[Model], unsupported: Mapping[str, Unsupported]) -> Model:
    """
    Raises:
        ApiError: the first thing that is wrong, with the field's name in `param`.
    """
    kept = {}
    for name, held in value.items():
        rule = unsupported.get(name)
        if rule is not None:
            if not any(type(held) is type(same) and held == same for same in rule.neutral):
                raise ApiError(400, f"{name}: {rule.reason}", param=name, code="unsupported_parameter")
        elif name not in IGNORED:
            kept[name] = held
    unknown = [name for name in kept if name not in model.model_fields]
    if unknown:
        near = did_you_mean(unknown[0][:80], model.model_fields)
        raise ApiError(400, f"unknown field {unknown[0][:80]!r}{near}", param=unknown[0][:80], code="unknown_parameter")
    try:
        return model.model_validate(kept)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        # of a union, the form that came nearest: the right type, or right the furthest inside
        nearest = max(problems, key=lambda problem: (not problem["type"].endswith("_type"), len(problem["loc"])))
        steps = [step for step in nearest["loc"] if isinstance(step, int) or (step.isidentifier() and step != "str")]
        path = ".".join(map(str, steps))
        field = str(nearest["loc"][0]) if nearest["loc"] else None
        raise ApiError(400, f"{path}: {nearest['msg'][:300]}", param=field) from None
