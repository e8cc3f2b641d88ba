"""Metrics for Prometheus. Labels come from the code and the route table, never from what a request says."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from stylefast.serving import safety, tickets, tracing
from stylefast.serving.messages import Done
from stylefast.serving.tickets import Ticket

if TYPE_CHECKING:
    from stylefast.serving.dispatcher import Dispatcher

_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1200)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
# label of pictures by their styles: others are those of classes that are not ours
KINDS = ("none", "StyleAligned", "InstantStyle", "DreamStyler", "several", "other")
# what the engine's process counts, and what it holds
COUNTED = {
    "unet_calls": "calls of the UNet",
    "picture_steps": "steps of pictures in these calls",
    "bank_page_loads": "pages of banks that were brought to the device",
    "bank_page_evictions": "pages of banks that gave way to others",
}
LEVELS = {
    "bank_pages": "pages of banks on the device",
    "bank_page_slots": "pages of banks for which the device has room",
    "bank_bytes": "bytes of this room",
    "loras_registered": "LoRAs that requests may name, those of registered styles included",
    "loras_resident": "LoRAs on the device",
    "lora_bytes": "bytes of LoRAs on the device",
    "memory_bytes": "resident memory of the engine's process",
}


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
        for name, text in LEVELS.items():
            self._gauge(name, text, lambda name=name: dispatcher.levels.get(name, 0.0))
        self._requests = Counter(
            "stylefast:requests", "requests that have ended, by how", ["status"], registry=self._registry
        )
        for status in tickets.OVER:
            self._requests.labels(status)
        self._pictures = Counter("stylefast:images", "pictures made", registry=self._registry)
        self._kinds = Counter(
            "stylefast:style_images", "pictures made, by their style's class", ["kind"], registry=self._registry
        )
        for kind in KINDS:
            self._kinds.labels(kind)
        self._pixels = Counter("stylefast:pixels", "pixels made", registry=self._registry)
        self._counts = {
            name: Counter(f"stylefast:{name}", text, registry=self._registry) for name, text in COUNTED.items()
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
        self._previewed = self._histogram("first_preview_seconds", "from arrival to the first preview")
        self._steps = self._histogram(
            "step_seconds", "time of a call of the UNet and its sampler step", (), _STEP_SECONDS
        )
        self._batch = self._histogram("step_pictures", "pictures in a call of the UNet", (), _PICTURES)
        self._replies = Counter(
            "stylefast:http_replies", "replies by route and status", ["route", "status"], registry=self._registry
        )
        self._http = self._histogram("http_seconds", "time of replies by route", ["route"])
        dispatcher.ended, dispatcher.drawn = self.ended, self.drawn
        dispatcher.counted, dispatcher.stepped = self.counted, self.stepped

    def ended(self, ticket: Ticket) -> None:
        """Count a request that has ended, and trace it."""
        tracing.ended(ticket)
        self._requests.labels(ticket.status).inc()
        self._latency.labels(ticket.status).observe((ticket.ended or ticket.arrived) - ticket.arrived)
        if ticket.started is not None:
            self._queued.observe(ticket.queue_seconds)
        if ticket.previewed is not None:
            self._previewed.observe(ticket.previewed - ticket.arrived)

    def drawn(self, done: Done) -> None:
        """Count a request's pictures."""
        for made in done.pictures:
            self._pictures.inc()
            self._pixels.inc(made.pixels.width * made.pixels.height)
        for kinds in done.kinds:
            kind = "several" if len(kinds) > 1 else kinds[0] if kinds else "none"
            self._kinds.labels(kind if kind in KINDS else "other").inc()

    def counted(self, name: str, more: float) -> None:
        """Count what the engine has done."""
        self._counts[name].inc(more)

    def refused(self, check: str) -> None:
        """Count a refusal of the safety check: of a "request" or a "picture"."""
        self._refusals.labels(check).inc()

    def stepped(self, seconds: float, pictures: int) -> None:
        """Count a call of the UNet."""
        self._steps.observe(seconds)
        self._batch.observe(pictures)

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

    def _histogram(
        self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = _SECONDS
    ) -> Histogram:
        return Histogram(f"stylefast:{name}", text, labels, buckets=buckets, registry=self._registry)
