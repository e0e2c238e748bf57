"""What stands before the interface: errors in OpenAI's shape, the API key, limits of requests, headers of answers."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import HTTPException
from fastapi.responses import JSONResponse

OPEN_PATHS = ("/", "/health")  # need no API key
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class ApiError(HTTPException):
    """Becomes an answer of this status in OpenAI's error shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        readable = message.encode("utf-8", "replace").decode()  # what it quotes may be half of a surrogate pair
        self.body = {"error": {"message": readable, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, self.headers)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Who may ask, and for how much."""

    api_key: str | None = None
    loopback_only: bool = True  # only requests that name this machine: a page elsewhere cannot rebind its name to us
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0


class Guard:
    """ASGI middleware. `count(path, status)` is told of every answer."""

    def __init__(self, app, rules: Rules, headers: dict[str, str], count: Callable[[str, int], None]):
        self.app, self.rules, self.count = app, rules, count
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._key = _digest(rules.api_key) if rules.api_key else None

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message["headers"], *self.headers]}
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
            body = Body(receive, self.rules)
            body.check_length(headers.get(b"content-length", b"0"))
        except ApiError as error:
            await error.response()(scope, receive, send_with_headers)
            return
        await self.app(scope, body, send_with_headers)

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self.rules.loopback_only and name.strip("[]").lower() not in LOOPBACK:
            raise ApiError(400, f"the request is for the host {host!r}, but the server listens on this machine only: "
                                f"ask for 127.0.0.1, or start it with --host", code="wrong_host")
        if self._key is None or path in OPEN_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(_digest(key.strip()), self._key):
            raise ApiError(401, "the API key is missing or wrong: send it as the header 'Authorization: Bearer KEY'",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


class Body:
    """An ASGI receive that bounds a request's body in size and time. After the body it passes messages on."""

    def __init__(self, receive: Callable[[], Awaitable], rules: Rules):
        self._receive, self._rules = receive, rules
        self._left, self._deadline = rules.max_body_bytes, time.monotonic() + rules.body_timeout_s
        self._complete = False

    def check_length(self, declared: bytes) -> None:
        if not declared.isdigit() or len(declared) > 18 or int(declared) > self._left:
            raise self._too_large()

    async def __call__(self):
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise ApiError(408, f"the request's body took more than {self._rules.body_timeout_s:g} s to arrive",
                           code="timeout") from None
        self._left -= len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._left < 0:
            raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request's body is larger than {self._rules.max_body_bytes} bytes", code="too_large")


def _digest(key: str | bytes) -> bytes:
    """Of one length, so that comparing takes one time."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
