"""The HTTP application: routes and middleware around one engine. No globals; several may live in a process."""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from dibit.engine.async_engine import AsyncEngine
from dibit.engine.errors import DibitError
from dibit.server import chat, completions, health, metrics, models, openapi, page, replies, schemas, tokenization
from dibit.server.errors import ApiError, describe
from dibit.server.middleware import REQUEST_ID, Envelope
from dibit.server.service import Service
from dibit.server.sse import ClientGoneError

# What a proxy logs for a client that left; nobody receives it.
CLIENT_GONE = 499


def create_app(
    engine: AsyncEngine,
    *,
    model_name: str | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    keep_alive_s: float = 15.0,
    max_body_bytes: int = 8 * 2**20,
    max_choices: int = 128,
) -> FastAPI:
    """An application that serves `engine`, which it starts when it starts and stops when it stops.

    model_name      name in the API (None: the engine's)
    api_key         if set, what clients must send as a bearer token to reach /v1, /tokenize and /detokenize
    cors_origins    browser origins that may use the API from their own pages ("*": any)
    keep_alive_s    longest silence on a stream before a comment is sent
    max_body_bytes  largest request body
    max_choices     most answers of one request: prompts times n
    """
    service = Service(
        engine=engine,
        model_name=model_name or engine.model_name,
        created=int(time.time()),
        keep_alive_s=keep_alive_s,
        max_body_bytes=max_body_bytes,
        # More than the engine ever holds would be refused for lack of room for ever.
        max_choices=min(max_choices, engine.config.max_num_seqs + engine.config.max_queued),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)
            service.tokenizing.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="dibit",
        summary="Low-bit language models behind the OpenAI API",
        version=importlib.metadata.version("dibit"),
        # The documentation pages load scripts from elsewhere; the description itself is at /openapi.json.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            DibitError: _on_error,
            RequestValidationError: _on_invalid,
            HTTPException: _on_http,
            ClientGoneError: _on_gone,
            ClientDisconnect: _on_gone,
        },
    )
    app.add_middleware(Envelope, api_key=api_key, guarded=tokenization.PATHS)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID, "Retry-After"],
        )
    for routes in (chat, completions, tokenization, models, health, metrics, page):
        app.include_router(routes.router(service))
    openapi.install(
        app,
        [
            schemas.ChatRequest,
            schemas.CompletionRequest,
            schemas.TokenizeRequest,
            schemas.DetokenizeRequest,
            replies.ChatChunk,
            replies.TextCompletion,
        ],
    )
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return describe(error).response()


async def _on_invalid(request: Request, error: Exception) -> Response:
    return ApiError(400, "the address is not one of this API").response()


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"[:200]
    match error.status_code:
        case 404:
            answer = ApiError(404, f"there is no {where}; /openapi.json lists what there is", code="unknown_url")
        case 405:
            answer = ApiError(405, f"{where} is not offered; see the Allow header", code="method_not_allowed")
        case status:
            answer = ApiError(status, str(error.detail))
    answer.headers.update(error.headers or {})
    return answer.response()


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
