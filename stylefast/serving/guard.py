"""What every request passes first: its id, its key, the size and speed of its body, and one line in the log.

Written for ASGI itself, since it must see a body before the routes do, and replies that no route makes.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stylefast.serving import links, playground, tracing
from stylefast.serving.replies import ApiError, cancelled
from stylefast.serving.settings import ServeSettings
from stylefast.values import quoted

logger = logging.getLogger("stylefast.serving.requests")

# paths that need no key: they say nothing that a stranger may not know
OPEN_PATHS = ("/livez", "/readyz", "/health", "/version", *playground.PATHS)
ADMIN = "admin"
_LOCAL = ("localhost", "127.0.0.1", "::1")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# a body that takes longer than the time limit must at least come at this speed
_LEAST_SPEED = 16 * 2**10  # bytes a second


class Keys:
    """API keys, compared by their digests in constant time, and always against all of them."""

    def __init__(self, keys: Sequence[str], prefix: str):
        named = [key.rpartition(":") for key in keys]
        self._digests = [(name or f"{prefix}{i}", _digest(key)) for i, (name, _, key) in enumerate(named, 1)]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, key: str) -> str | None:
        """Return the name of a key, None for one that is unknown."""
        given, found = _digest(key), None
        for name, digest in self._digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found


def _request_id(scope: Scope) -> str:
    """Return the request's id, which its client may choose, and note it; and whether the client's can be used."""
    given = dict(scope["headers"]).get(b"x-request-id")
    state = scope.setdefault("state", {})
    state["id_is_fit"] = given is None or _ID.fullmatch(given.decode("latin-1")) is not None
    own = None if given is None or not state["id_is_fit"] else given.decode("ascii")
    state["request_id"] = own or f"req_{secrets.token_hex(12)}"
    return state["request_id"]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _key_in(header: str) -> str:
    """Return the key in an Authorization header: a bearer's, or the password that A1111's clients send."""
    kind, _, text = header.partition(" ")
    if kind.lower() == "bearer":
        return text.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(text.strip(), validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return ""
    return ""


def _check_sender(headers: Mapping[bytes, bytes], listening: str) -> None:
    """Refuse what the pages of other sites send to a server without keys, through the browser of its own machine.

    Such requests have another Origin than Host, or, where a foreign name was pointed here, a foreign Host. Raises
    ApiError.
    """
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in (*_LOCAL, listening):
        raise ApiError(
            403,
            f"without API keys this server answers to {' and '.join(_LOCAL[:2])} alone, not to {quoted(host)}; "
            "set STYLEFAST_SERVE_API_KEYS, or give --no-auth",
            code="host_not_allowed",
        )
    if origin and origin.partition("://")[2] != host:
        raise ApiError(
            403,
            f"the page of another site ({quoted(origin)}) may not use a server without API keys",
            code="origin_not_allowed",
        )


class Guard:
    """ASGI middleware in front of all routes."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, app_of_routes: Any):
        self._app, self._settings, self._routes = app, settings, app_of_routes
        self._keys, self._admins = Keys(settings.api_keys, "key"), Keys(settings.admin_keys, "admin")
        self._open = (*OPEN_PATHS, "/metrics") if settings.open_metrics else OPEN_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with tracing.request(scope["method"], dict(scope["headers"])) as span:
            await self._answered(scope, receive, send, span)

    async def _answered(self, scope: Scope, receive: Receive, send: Send, span: Any) -> None:
        began, status = time.monotonic(), 0
        number = _request_id(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode("ascii"))]}
            await send(message)

        try:
            self._admit(scope)
            body = _Body(receive, self._settings, scope)
            await self._app(scope, body.receive, watched)
        except ApiError as error:
            await self._refuse(error, scope, receive, watched)
        finally:
            self._log(scope, number, status, time.monotonic() - began)
            if span is not None:
                tracing.replied(span, scope["method"], self._route(scope), status, number)

    def _admit(self, scope: Scope) -> None:
        """Say who asks, in the request's state. Raises ApiError for those who may not."""
        state = scope.setdefault("state", {})
        state["owner"], state["is_admin"] = "anonymous", not self._keys and not self._admins
        headers = dict(scope["headers"])
        if scope["path"] in self._open:
            return
        if scope["method"] in ("GET", "HEAD") and links.PATH.fullmatch(scope["path"]):
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        key = _key_in(given)
        admin, owner = self._admins.owner(key), self._keys.owner(key)
        if admin is not None:
            state["owner"], state["is_admin"] = f"{ADMIN}:{admin}", True
        elif owner is not None:
            state["owner"] = owner
        elif not self._keys:
            if not self._settings.no_auth:
                _check_sender(headers, self._settings.host)
        else:
            what = "the key is not known here" if key else "an API key is missing; send Authorization: Bearer KEY"
            raise ApiError(401, what, code="invalid_api_key")

    async def _refuse(self, error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        from fastapi.responses import JSONResponse

        response = JSONResponse(error.body(), error.status, {**error.headers(), "connection": "close"})
        await response(scope, receive, send)

    def _log(self, scope: Scope, number: str, status: int, seconds: float) -> None:
        """Write one line: no path as typed, which may hold anything, no prompt and no key."""
        line = {
            "method": scope["method"],
            "route": self._route(scope),
            "status": status,
            "ms": round(1e3 * seconds, 1),
            "request_id": number,
            "owner": scope["state"]["owner"],
        }
        if self._settings.log_format == "json":
            logger.info(json.dumps(line))
        else:
            logger.info(" ".join(f"{name}={value}" for name, value in line.items()))
        service = getattr(self._routes.state, "service", None)
        if service is not None:
            service.metrics.replied(self._route(scope), status, seconds)

    def _route(self, scope: Scope) -> str:
        """Return the pattern of the route that a request met, or would meet by the live table."""
        met = getattr(scope.get("route"), "path", None)
        if met is not None:
            return met
        for route in self._routes.router.routes:
            match, _ = route.matches(scope)
            if match != Match.NONE:
                return getattr(route, "path", "other")
        return "other"


class _Body:
    """A request's body on its way in: not too large, not too slow, and not packed."""

    def __init__(self, receive: Receive, settings: ServeSettings, scope: Scope):
        self._receive, self._settings = receive, settings
        self._seen, self._done, self._began = 0, False, time.monotonic()
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") not in (b"", b"identity"):
            raise ApiError(415, "the body is compressed; send it as it is", code="unsupported_encoding")
        length = headers.get(b"content-length")
        if length is not None:
            if not length.isdigit():
                raise ApiError(400, "Content-Length is no number", code="invalid_request")
            if int(length) > settings.body_limit:
                raise self._too_large()

    async def receive(self) -> Message:
        """Return the next piece. Raises ApiError."""
        if self._done:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._settings.body_timeout)
        except TimeoutError:
            raise self._too_slow() from None
        if message["type"] == "http.disconnect":
            raise cancelled()
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            if self._seen > self._settings.body_limit:
                raise self._too_large()
            self._done = not message.get("more_body", False)
            spent = time.monotonic() - self._began
            if not self._done and spent > max(self._settings.body_timeout, self._seen / _LEAST_SPEED):
                raise self._too_slow()
        return message

    def _too_slow(self) -> ApiError:
        return ApiError(408, "the body did not arrive in time", code="body_timeout")

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._settings.body_limit} bytes", code="body_too_large")
