"""What stands before every route: a request id, tokens, the size of bodies, time, counts and the log. No Ray."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
import traceback
import uuid
from collections.abc import MutableMapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from pydantic import Field
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hashray.config import Config
from hashray.errors import InputError
from hashray.search.limits import MIB, Refused
from hashray.search.metrics import log
from hashray.search.service import Service

OPEN = {"/", "/health", "/ready"}  # without a token: the page holds nothing, probes have none
TOKEN = "HASHRAY_TOKEN"
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class SafetyConfig(Config):
    """Who may ask."""

    token_file: str | None = Field(None, description="File of a bearer token that requests need; unset: $HASHRAY_TOKEN")
    allowed_hosts: tuple[str, ...] = Field(
        (), description="Host names that requests may be for; unset: this machine's for a loopback --host, else any"
    )
    cors_origins: tuple[str, ...] = Field((), description="Origins of other sites' pages that may ask; unset: none")

    def token(self) -> bytes | None:
        """The token, or None where none is needed.

        Raises:
            InputError: the file cannot be read, or is empty.
        """
        if self.token_file is None:
            text = os.environ.get(TOKEN, "")
        else:
            try:
                text = Path(self.token_file).expanduser().read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"the token file {self.token_file} cannot be read: {error}") from error
            if not text.strip():
                raise InputError(f"the token file {self.token_file} is empty: write one line of text into it")
        return text.strip().encode() or None


class Guard:
    """ASGI middleware; the app finds the body in `request.state.body`, and the id in `request.state.request_id`."""

    def __init__(self, app: ASGIApp, service: Service, token: bytes | None, names: bool = True) -> None:
        """`names`: whether answers get X-Request-ID here; Ray's proxy adds it itself."""
        self.app, self.service, self._token, self._names = app, service, token, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_s, sent = perf_counter(), _Sent(send, self._names, self.service)
        headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
        state = scope.setdefault("state", {})
        given = headers.get("x-request-id", "")
        state["request_id"] = sent.request_id = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex[:16]
        metrics = self.service.metrics
        metrics.in_flight.inc()
        try:
            with ExitStack() as held:
                try:
                    async with asyncio.timeout(self.service.limits.timeout_s):
                        self._require_token(scope["path"], headers)
                        if scope["path"].startswith("/search"):
                            self.service.admission.check()
                        # Others' bodies are not read: what needs no token must not use up the places of bodies.
                        state["body"] = await self._read(headers, receive, held) if scope["method"] == "POST" else b""
                        await self.app(scope, _again(state["body"], receive), sent)
                except Refused as refused:
                    await refusal(scope, refused)(scope, receive, sent)
                except TimeoutError:
                    text = f"the answer takes longer than {self.service.limits.timeout_s:g} s"
                    await sent.fail(error_answer(scope, 504, text), scope, receive)
                except Exception as error:  # a fault of ours: the log has it, the answer says nothing of the inside
                    log("fault", "error", request_id=sent.request_id, error=repr(error), trace=traceback.format_exc())
                    await sent.fail(error_answer(scope, 500, "an internal error; the log has it"), scope, receive)
        finally:
            metrics.in_flight.dec()
            self._count(scope, sent, perf_counter() - start_s)

    def _require_token(self, path: str, headers: dict[str, str]) -> None:
        if self._token is None or path in OPEN:
            return
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(value.strip().encode("latin1"), self._token):
            raise Refused(401, "a bearer token is needed: Authorization: Bearer TOKEN")

    async def _read(self, headers: dict[str, str], receive: Receive, held: ExitStack) -> bytes:
        """The whole body, held in the count of bytes until the request ends."""
        length = headers.get("content-length", "")
        if length.isdigit():
            held.enter_context(self.service.admission.body(int(length)))
        elif "transfer-encoding" in headers:  # of unknown length: the most is held
            held.enter_context(self.service.admission.body(self.service.limits.body_mib * MIB))
        else:
            return b""
        most, body = self.service.limits.body_mib * MIB, bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the client went away")
            body += message.get("body", b"")
            if len(body) > most:
                raise Refused(413, f"the body has more than {self.service.limits.body_mib} MiB")
            if not message.get("more_body"):
                return bytes(body)

    def _count(self, scope: Scope, sent: _Sent, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics, status = self.service.metrics, sent.status
        metrics.requests.labels(route, str(status)).inc()
        metrics.request_s.labels(route).observe(seconds)
        if status in (401, 413, 429, 503, 504):
            names = {401: "token", 413: "size", 429: "overload", 503: "unavailable", 504: "time"}
            metrics.rejected.labels(names[status]).inc()
        if route not in ("/health", "/ready", "/metrics"):
            log("request", request_id=sent.request_id, method=scope["method"], route=route, status=status,
                ms=round(seconds * 1e3, 2))  # fmt: skip


class _Sent:
    """Sends on, with the request id and headers of safety, and remembers the status."""

    def __init__(self, send: Send, names: bool, service: Service) -> None:
        self._send, self._names, self._service, self.status, self.request_id = send, names, service, 0, ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            extra = [(b"x-content-type-options", b"nosniff")]
            if self._names:
                extra.append((b"x-request-id", self.request_id.encode()))
            if self._service.draining:  # or the client's next request meets a connection that is being closed
                extra.append((b"connection", b"close"))
            message = {**message, "headers": [*message["headers"], *extra]}
        await self._send(message)

    async def fail(self, response: Response, scope: Scope, receive: Receive) -> None:
        """Send an error, unless an answer has begun."""
        if not self.status:
            await response(scope, receive, self)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def error_answer(
    scope: MutableMapping[str, Any], status: int, text: str, headers: dict[str, str] | None = None
) -> Response:
    """The answer of a request that failed."""
    content = json.dumps({"error": text, "request_id": scope["state"]["request_id"]})
    return Response(content, status, headers, "application/json")


def refusal(scope: MutableMapping[str, Any], refused: Refused) -> Response:
    """The answer of a request that is refused: when it may come again, or that it needs a token."""
    headers = {} if refused.retry_after_s is None else {"Retry-After": str(refused.retry_after_s)}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return error_answer(scope, refused.status, str(refused), headers)
