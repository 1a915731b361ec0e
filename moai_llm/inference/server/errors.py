"""Errors in the shape of OpenAI's API, so that its clients raise what their users know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETRY = {"Retry-After": "1"}


class ApiError(Exception):
    """An answer other than 2xx.

    Args:
        param: the field of the request that is wrong.
        code: for programs, such as `context_length_exceeded`.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", code="server_shutdown", headers=RETRY)
