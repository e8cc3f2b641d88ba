"""Errors as clients see them."""

import pytest

from stylefast.serving import replies


@pytest.mark.parametrize(
    "message, param, shown",
    [
        ("request 0: steps is 5000; it must be a whole number from 1 to 1000", "steps", "steps is 5000;"),
        ("request 3: width is 100; it must be divisible by 8", "size", "width is 100;"),
        ("request 0: the prompt is empty; say what the picture shows", "prompt", "the prompt is empty;"),
        ("request 0: no LoRA named 'x' is registered", None, "no LoRA named"),
        ("spacing is 'odd'; it must be leading", "spacing", "spacing is"),
    ],
)
def test_messages_of_the_engine_name_their_field(message, param, shown):
    error = replies.of_engine("InvalidRequest", message)
    assert (error.status, error.code, error.param) == (400, "invalid_request", param)
    assert error.message.startswith(shown)


def test_errors_that_are_bugs_keep_their_text_to_themselves():
    error = replies.of_engine("KeyError", "'secret'")
    assert (error.status, error.code, error.headers()) == (500, "internal_error", {"x-should-retry": "false"})
    assert "secret" not in error.message


@pytest.mark.parametrize("seconds, shown", [(0.1, "1"), (1.2, "2"), (500.0, "60")])
def test_retry_after_is_from_1_to_60_whole_seconds(seconds, shown):
    assert replies.queue_full(8, 8, seconds).headers() == {"retry-after": shown}


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "authentication_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_types_are_those_that_clients_know(status, kind):
    assert replies.ApiError(status, "x").body()["error"]["type"] == kind


def test_a_body_that_is_not_read_to_its_end_takes_its_connection_along():
    assert replies.ApiError(408, "late").headers()["connection"] == "close"
    assert replies.ApiError(413, "large").headers()["connection"] == "close"
    assert "connection" not in replies.ApiError(400, "bad").headers()
