"""The API's description at /openapi.json, for the routes that read their bodies and write their events themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from dibit.server.errors import ErrorReply

_REF = "#/components/schemas/{model}"


def describes(body: type, reply: type, chunk: type | None = None) -> dict[str, Any]:
    """Arguments of a POST route that reads `body`, answers with `reply`, and (where there is one) streams events of
    `chunk`."""
    stream = {} if chunk is None else {"content": {"text/event-stream": {"schema": _reference(chunk)}}}
    return {
        "response_model": None,
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(body)}}}
        },
        "responses": {
            200: {
                "model": reply,
                **stream,
                "description": "the answer" if chunk is None else "the answer, or a stream of chunks",
            },
            "4XX": {"model": ErrorReply, "description": "the request cannot be served as written"},
            "5XX": {"model": ErrorReply, "description": "no room, shutting down, or a fault"},
        },
    }


def _reference(shape: type) -> dict[str, str]:
    return {"$ref": _REF.format(model=shape.__name__)}


def install(app: FastAPI, shapes: Sequence[type]) -> None:
    """Makes `app` describe itself, with the shapes that `describes` was given."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            parts = schema.setdefault("components", {}).setdefault("schemas", {})
            for shape in shapes:
                own = TypeAdapter(shape).json_schema(ref_template=_REF)
                parts.update(own.pop("$defs", {}))
                parts[shape.__name__] = own
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
