"""From an exception to what a client sees: a status and the OpenAI error body, in one table.

    RequestError, ContextLengthError, any other UserError   400  invalid_request_error
    ApiError (the server's own: 401, 404, 413, 415, ...)    as raised
    CapacityError                                           503  service_unavailable_error, with Retry-After
    EngineDead                                              503  service_unavailable_error
    EngineFault                                             500  server_error
    anything else                                           500  server_error, without the details

Reference: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from starlette.responses import Response
from typing_extensions import TypedDict

from dibit.engine.errors import CapacityError, DibitError, EngineDead, EngineFault, RequestError, UserError

INVALID = "invalid_request_error"
UNAVAILABLE = "service_unavailable_error"
INTERNAL = "server_error"


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(TypedDict):
    error: ErrorDetail


class ApiError(DibitError):
    """An answer that is an error: HTTP status, and the members of the OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> ErrorReply:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return Response(
            orjson.dumps(self.body()),
            status_code=self.status,
            media_type="application/json",
            headers=self.headers,
        )


def describe(error: BaseException) -> ApiError:
    """What the client is told about `error`."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, message, param=error.param, code=error.code)
        case UserError():
            return ApiError(400, message)
        case CapacityError():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return ApiError(503, message, type=UNAVAILABLE, code="queue_full", headers=wait)
        case EngineDead():
            return ApiError(503, message, type=UNAVAILABLE, code="engine_dead")
        case EngineFault():
            return ApiError(500, message, type=INTERNAL, code="engine_fault")
        case _:
            return ApiError(
                500, "the server failed on this request; its log has the cause", type=INTERNAL, code="internal_error"
            )


def shutting_down() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down; send the request to another one, or again later",
        type=UNAVAILABLE,
        code="shutting_down",
        headers={"Retry-After": "5"},
    )
