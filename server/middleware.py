"""Around every request: its id, the key, and an answer whatever fails. HEAD is answered as GET is, without the body."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dibit.server.errors import ApiError, describe

_log = logging.getLogger("dibit.server")
_PLAIN_ID = re.compile(r"[\x21-\x7e]{1,200}")
REQUEST_ID = "x-request-id"


class Envelope:
    """Gives each request an id (the client's x-request-id if it is plain text) and returns it in the answer; with an
    `api_key`, refuses what is under /v1, or one of the `guarded` paths, and does not carry it; turns an exception into
    an error answer.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, guarded: Sequence[str] = ()) -> None:
        self._app = app
        self._guarded = guarded
        self._key = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        request_id = given if _PLAIN_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        head_only = scope["method"] == "HEAD"
        if head_only:
            # A copy: what is on the wire is the server's, which must know.
            scope = {**scope, "method": "GET"}
        started = False

        async def reply(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            elif head_only:
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, receive, reply)
        except Exception as error:
            answer = describe(error)
            if answer.code == "internal_error":
                _log.exception("request %s failed", request_id)
            if not started:
                await answer.response()(scope, receive, reply)

    def _check_key(self, path: str, headers: Headers) -> None:
        if self._key is None or not (path == "/v1" or path.startswith("/v1/") or path in self._guarded):
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip().encode("latin-1")), self._key):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _digest(key: bytes) -> bytes:
    # Of one length whatever the key's, so that the time to compare says nothing.
    return hashlib.sha256(key).digest()
