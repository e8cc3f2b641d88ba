"""Metrics for Prometheus. Labels come from the code and the route table, never from what a request says."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from stylefast.serving import safety, tickets
from stylefast.serving.tickets import Ticket

if TYPE_CHECKING:
    from stylefast.serving.dispatcher import Dispatcher

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)


class Metrics:
    """The service's counters, in a registry of their own."""

    def __init__(self, dispatcher: "Dispatcher", expires: Callable[[], float] = lambda: math.nan):
        """Make them; `expires` returns the seconds until the certificate of pictures expires, NaN without one."""
        self._registry = CollectorRegistry()
        self._gauge("num_requests_waiting", "requests in the queue", lambda: dispatcher.waiting)
        self._gauge("num_requests_running", "requests with the engine", lambda: dispatcher.running)
        self._gauge("num_pictures_running", "pictures with the engine", lambda: dispatcher.pictures)
        self._gauge("picture_slots", "pictures that may be with the engine at once", lambda: dispatcher.max_running)
        self._gauge("engine_restarts", "times that the engine's process was started again", lambda: dispatcher.restarts)
        self._gauge("certificate_seconds", "seconds until the certificate that signs pictures expires", expires)
        self._requests = Counter(
            "stylefast:requests", "requests that have ended, by how", ["status"], registry=self._registry
        )
        for status in tickets.OVER:
            self._requests.labels(status)
        self._pictures = Counter("stylefast:images", "pictures made", registry=self._registry)
        self._pixels = Counter("stylefast:pixels", "pixels made", registry=self._registry)
        self._counts = {
            "unet_calls": Counter("stylefast:unet_calls", "calls of the UNet", registry=self._registry),
            "picture_steps": Counter(
                "stylefast:picture_steps", "steps of pictures in these calls", registry=self._registry
            ),
        }
        self._refusals = Counter(
            "stylefast:safety_refusals",
            "requests and pictures that the safety check refused",
            ["check"],
            registry=self._registry,
        )
        for check in (safety.REQUEST, safety.PICTURE):
            self._refusals.labels(check)
        self._latency = self._histogram("request_latency_seconds", "from arrival to the end", ["status"])
        self._queued = self._histogram("queue_time_seconds", "from arrival to the start")
        self._replies = Counter(
            "stylefast:http_replies", "replies by route and status", ["route", "status"], registry=self._registry
        )
        self._http = self._histogram("http_seconds", "time of replies by route", ["route"])

    def ended(self, ticket: Ticket) -> None:
        """Count a request that has ended."""
        self._requests.labels(ticket.status).inc()
        self._latency.labels(ticket.status).observe((ticket.ended or ticket.arrived) - ticket.arrived)
        if ticket.started is not None:
            self._queued.observe(ticket.queue_seconds)
        for made in ticket.pictures:
            self._pictures.inc()
            self._pixels.inc(made.pixels.width * made.pixels.height)

    def counted(self, name: str, more: float) -> None:
        """Count what the engine has done."""
        self._counts[name].inc(more)

    def refused(self, check: str) -> None:
        """Count a refusal of the safety check: of a "request" or a "picture"."""
        self._refusals.labels(check).inc()

    def replied(self, route: str, status: int, seconds: float) -> None:
        """Count a reply."""
        self._replies.labels(route, str(status)).inc()
        self._http.labels(route).observe(seconds)

    def families(self) -> Iterable[Metric]:
        """Return all metrics, as they are now."""
        return self._registry.collect()

    def page(self) -> tuple[bytes, str]:
        """Return the page that Prometheus reads, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"stylefast:{name}", text, registry=self._registry).set_function(value)

    def _histogram(self, name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
        return Histogram(f"stylefast:{name}", text, labels, buckets=_SECONDS, registry=self._registry)
