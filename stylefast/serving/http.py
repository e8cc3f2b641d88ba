"""HTTP/1.1 for the server: uvicorn's protocol, with a time limit for headers and our shape for its own errors."""

import asyncio
import contextlib
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stylefast.serving.replies import ApiError

HEADER_SECONDS = 20.0  # for the whole head of a request, counted from the connection or the reply before


# parts of a body that are smaller, and how many of them a body may have: each takes as long as a large one
CRUMB, MOST_CRUMBS = 256, 16_384


class _Connection(h11.Connection):
    """Reader of a connection that limits how many tiny chunks a body may have."""

    _crumbs = 0

    def next_event(self) -> Any:
        """Return what comes next. Raises RemoteProtocolError for a body in too many small parts."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._crumbs = 0
        elif isinstance(event, h11.Data) and len(event.data) < CRUMB:
            self._crumbs += 1
            if self._crumbs > MOST_CRUMBS:
                raise h11.RemoteProtocolError(f"the body has more than {MOST_CRUMBS} parts below {CRUMB} bytes")
        return event


class Protocol(H11Protocol):
    """One connection. It is closed if the head of a request does not arrive in time."""

    _late: asyncio.TimerHandle | None = None

    def __init__(self, config: uvicorn.Config, *arguments: Any, **options: Any):
        super().__init__(config, *arguments, **options)
        self.conn = _Connection(h11.SERVER, config.h11_max_incomplete_event_size or 2**16)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; once it was a whole head, its body and reply have limits of their own."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        else:
            self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in the shape of all errors."""
        error = ApiError(400, msg.lower().rstrip("."), code="invalid_http")
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # the reply has begun already
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        if self.cycle is not None and not self.cycle.response_complete:
            # the route that waits for the rest of the body has nobody to answer any more
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _watch(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
