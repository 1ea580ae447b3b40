"""Reading a JSON body: content type, size, syntax, then the strict model; every failure names the field.

The body is parsed here and not by the framework, so that each failure keeps its own status (413, 415, 400) and a
message of the one form `field: what is wrong (what was found)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import Request

from dibit.server.errors import ApiError

M = TypeVar("M", bound=BaseModel)

# Longest silence within a body.
BODY_STALL_S = 30.0


async def read_model(request: Request, model: type[M], *, max_bytes: int) -> M:
    """The request's body as `model`. Raises ApiError 400, 408, 413 or 415."""
    kind, _, more = request.headers.get("content-type", "").lower().partition(";")
    if kind.strip() != "application/json":
        raise ApiError(415, f"the content type is {kind.strip() or 'missing'}; send application/json")
    charset = more.partition("charset=")[2].partition(";")[0].strip(' "')
    if charset not in ("", "utf-8", "utf8"):
        raise ApiError(415, f"the body's character set is {charset}; send UTF-8")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"the content encoding is {coding}; send the body as it is, without compression")
    return parse(model, await _read(request, max_bytes=max_bytes))


async def _read(request: Request, *, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > max_bytes:
        raise too_large
    body = bytearray()
    parts = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(BODY_STALL_S):
                body += await anext(parts)
        except StopAsyncIteration:
            return bytes(body)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"{len(body)} bytes of the body came, and then nothing for {BODY_STALL_S:g} s; send it whole",
                headers={"Connection": "close"},
            ) from error
        if len(body) > max_bytes:
            raise too_large


def parse(model: type[M], body: bytes) -> M:
    """`body` as `model`. Raises ApiError 400."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise ApiError(400, f"the body is a JSON {type(data).__name__}; send an object")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(error, data) from error


def _explain(error: ValidationError, data: object) -> ApiError:
    """One message for the first field that is wrong; of a union's branches, the one that got furthest."""
    problems = [(_path(problem, data), problem) for problem in error.errors(include_url=False)]
    first_field = problems[0][0][:1]
    problems = [(path, problem) for path, problem in problems if path[:1] == first_field]
    deepest = max(len(path) for path, _ in problems)
    path = next(path for path, _ in problems if len(path) == deepest)
    problems = [pair for pair in problems if pair[0] == path]
    refused = next((problem for _, problem in problems if problem["type"] == "refused"), None)
    if refused is not None:
        param = _spell((*path, *refused["ctx"].get("field", ())))
        return ApiError(400, f"{param}: {refused['msg']}", param=param, code=refused["ctx"].get("code"))
    param = _spell(path)
    if problems[0][1]["type"] == "extra_forbidden":
        return ApiError(400, f"{param}: unknown field; it is not supported", param=param, code="unknown_field")
    if problems[0][1]["type"] == "missing":
        return ApiError(400, f"{param}: missing; it is required", param=param, code="missing_field")
    wishes = "; or ".join(dict.fromkeys(_lower(problem["msg"]) for _, problem in problems))
    return ApiError(400, f"{param}: {wishes} (found {_short(problems[0][1]['input'])})", param=param)


def _path(problem: ErrorDetails, data: object) -> tuple[str | int, ...]:
    """The problem's place in the body: its location without the names of union branches."""
    path: list[str | int] = []
    here: Any = data
    for key in problem["loc"]:
        if (isinstance(here, dict) and key in here) or (isinstance(here, list) and isinstance(key, int)):
            here = here[key]  # type: ignore[index]
            path.append(key)
    if problem["type"] == "missing":
        path.append(problem["loc"][-1])
    return tuple(path)


def _spell(path: Sequence[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")[:200] or "body"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def _short(value: object) -> str:
    match value:
        case dict():
            return "an object"
        case list():
            return f"a list of {len(value)}"
        case _:
            text = orjson.dumps(value, default=repr).decode()
            return text if len(text) <= 60 else text[:57] + "..."
