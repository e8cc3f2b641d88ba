"""Spans of OpenTelemetry."""

import json
import sys

import pytest

from stylefast.serving import tracing
from tests.serving.bench import bench

sdk = pytest.importorskip("opentelemetry.sdk.trace")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch):
    """Return what lists the spans that have ended, by name."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", lambda: provider.get_tracer("stylefast"))
    return lambda: {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_one_trace_with_queue_engine_and_encoding(spans):
    with bench() as running:
        headers = {"traceparent": PARENT, "x-request-id": "traced"}
        assert running.draw(headers, prompt="a secret fish", user="someone", stylefast={"steps": 3})[0] == 200
    found = spans()
    request = found["POST /v1/images/generations"]
    assert f"{request.context.trace_id:032x}" == PARENT[3:35] and f"{request.parent.span_id:016x}" == PARENT[36:52]
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["stylefast.request_id"] == "traced"
    for name in ("queue", "engine", "encode"):
        part = found[f"stylefast.{name}"]
        assert part.parent.span_id == request.context.span_id and part.context.trace_id == request.context.trace_id
        assert part.start_time <= part.end_time
    assert found["stylefast.queue"].end_time == found["stylefast.engine"].start_time
    assert dict(found["stylefast.engine"].attributes) == {
        "stylefast.pictures": 1, "stylefast.steps": 3, "stylefast.status": "completed",
    }  # fmt: skip
    told = " ".join(span.to_json() for span in found.values())
    assert "secret" not in told and "someone" not in told


def test_without_a_parent_or_with_a_damaged_one_a_trace_begins(spans):
    with bench() as running:
        for headers in ({}, {"traceparent": "00-zz-1"}, {"traceparent": "\xff" * 3}):
            assert running.call("GET", "/v1/models", headers=headers)[0] == 200
        assert running.call("GET", "/nothing/secret")[0] == 404
    assert spans()["GET /v1/models"].parent is None and "secret" not in json.dumps(list(spans()))


def test_where_it_is_not_installed_nothing_is_traced(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.setattr(tracing, "_tracer", lambda: pytest.fail("there is nothing to trace with"))
    tracing._api.cache_clear()
    try:
        assert tracing._api() is None
        with bench() as running:
            assert running.draw({"traceparent": PARENT})[0] == running.draw(stream=True)[0] == 200
    finally:
        tracing._api.cache_clear()
