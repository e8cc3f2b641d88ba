"""Spans of OpenTelemetry, where its package is installed; nothing at all where it is not.

A request is one span of the server, with the caller's `traceparent` as its parent; the time in the queue, in the engine
and of encoding are its children. They hold numbers, routes and ids, and never a prompt, a key or a picture. Where they
go is decided by OpenTelemetry's own settings.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylefast.serving.tickets import Ticket

_BILLION = 1_000_000_000


@cache
def _api() -> Any:
    """Return OpenTelemetry's module of traces, None where it is not installed."""
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace


def _tracer() -> Any:
    return _api().get_tracer("stylefast")


@contextmanager
def request(method: str, headers: Mapping[bytes, bytes]) -> Iterator[Any]:
    """Trace a request as it comes in; yields its span, None where there is none to record."""
    if _api() is None:
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {
        name: headers[name.encode()].decode("latin-1")
        for name in ("traceparent", "tracestate")
        if name.encode() in headers
    }
    parent = TraceContextTextMapPropagator().extract(carrier)
    kind = _api().SpanKind.SERVER
    with _tracer().start_as_current_span(method, parent, kind, record_exception=False) as span:
        yield span if span.is_recording() else None


def replied(span: Any, method: str, route: str, status: int, number: str) -> None:
    """Say in a request's span what became of it."""
    span.update_name(f"{method} {route}")
    span.set_attributes(
        {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            "stylefast.request_id": number,
        }
    )
    if status >= 500:
        span.set_status(_api().StatusCode.ERROR)


def here() -> Any:
    """Return the context of what is being traced, for `ended`; None if nothing is."""
    if _api() is None:
        return None
    from opentelemetry.context import get_current

    return get_current() if _api().get_current_span().is_recording() else None


def ended(ticket: "Ticket") -> None:
    """Add the spans of a ticket's time in the queue and in the engine."""
    if ticket.trace is None:
        return
    now = time.monotonic()
    began, over = ticket.started or ticket.ended or now, ticket.ended or now
    attributes = {
        "stylefast.pictures": ticket.count,
        "stylefast.steps": ticket.steps,
        "stylefast.status": ticket.status,
    }
    _add("queue", ticket, ticket.arrived, began, {"stylefast.pictures": ticket.count})
    if ticket.started is not None:
        _add("engine", ticket, began, over, attributes)


def _add(name: str, ticket: "Ticket", start: float, end: float, attributes: Mapping[str, Any]) -> None:
    def at(moment: float) -> int:
        return int((ticket.created + moment - ticket.arrived) * _BILLION)

    span = _tracer().start_span(f"stylefast.{name}", ticket.trace, attributes=attributes, start_time=at(start))
    span.end(at(end))


@contextmanager
def encoding() -> Iterator[None]:
    """Trace the encoding of a picture."""
    if _api() is None or not _api().get_current_span().is_recording():
        yield
        return
    with _tracer().start_as_current_span("stylefast.encode"):
        yield
