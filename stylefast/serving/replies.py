"""Errors of the service: one class, one shape for all of them, and what becomes of the engine's own.

Every error body is OpenAI's envelope {"error": {"message", "type", "param", "code"}}, which the clients' libraries turn
into their exceptions; inside a stream it is an event with the same object at its top.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

INVALID, AUTHENTICATION, RATE_LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
# seconds within which a client that is told to come back should expect its turn
LEAST_RETRY, MOST_RETRY = 1, 60


class ApiError(Exception):
    """An error that a client gets to see.

    Args:
        status: of HTTP.
        message: says the value, the limit and the way out.
        param: the field that is at fault.
        code: for programs.
        retry_after: seconds; the reply then carries a Retry-After of 1 to 60.
        retry: whether trying again may help; None leaves that to the client.
        more_headers: of the reply, such as Allow.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        retry: bool | None = None,
        more_headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.retry, self._more_headers = retry_after, retry, more_headers or {}

    @property
    def kind(self) -> str:
        """Return the type in the envelope."""
        if self.status in (401, 403):
            return AUTHENTICATION
        if self.status == 429:
            return RATE_LIMIT
        return SERVER if self.status >= 500 else INVALID

    def body(self) -> dict[str, Any]:
        """Return the envelope."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def event(self) -> dict[str, Any]:
        """Return the event for the inside of a stream."""
        return {"type": "error", **self.body()}

    def headers(self) -> dict[str, str]:
        """Return the headers that say whether and when to try again."""
        found = dict(self._more_headers)
        if self.retry_after is not None:
            seconds = min(max(math.ceil(self.retry_after), LEAST_RETRY), MOST_RETRY)
            found["retry-after"] = str(seconds)
        if self.retry is not None:
            found["x-should-retry"] = "true" if self.retry else "false"
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.status in (408, 413):  # the rest of the body is not waited for
            found["connection"] = "close"
        return found


# errors that the engine's process reports by the names of their classes: status, code, whether trying again may help
_OF_ENGINE: Mapping[str, tuple[int, str, bool | None]] = {
    "InvalidRequest": (400, "invalid_request", None),
    "PromptError": (400, "invalid_prompt", None),
    "ImageError": (400, "invalid_image", None),
    "StyleError": (400, "invalid_style", None),
    "AdapterError": (400, "invalid_adapter", None),
    "QueueFull": (429, "queue_full", None),
    "DeadlineExceeded": (504, "deadline_exceeded", False),
    "JobCancelled": (499, "request_cancelled", False),
    "NumericsError": (500, "numerics", False),
    "OutOfMemory": (503, "out_of_memory", None),
    "EngineClosed": (503, "engine_closed", None),
    "EngineMismatch": (400, "engine_mismatch", None),
}


ENGINE_LOST = "EngineLost"  # in place of an error's class, where the process that would report one has died
# of a request: how the engine's messages begin -> the field that clients know
_FIELDS = {
    **{name: name for name in ("prompt", "steps", "guidance", "seed", "scheduler", "spacing", "clip_skip", "loras")},
    **{name: name for name in ("negative_prompt", "prompt_2", "negative_prompt_2", "prompt_syntax", "style", "size")},
    **{name: name for name in ("guidance_rescale", "guidance_interval")},
    "width": "size",
    "height": "size",
}
_PLACE, _BEGINNING = re.compile(r"request \d+: "), re.compile(r"(?:the )?(\w+) (?:is|has|contains) ")


def of_engine(name: str, message: str) -> ApiError:
    """Return the error for one that the engine's process reports by the name of its class.

    Errors that are not the project's own are bugs: their text may quote what nobody should see, so it stays in the log.
    """
    if name == ENGINE_LOST:
        return engine_lost()
    message = _PLACE.sub("", message, count=1)
    found = _BEGINNING.match(message)
    param = _FIELDS.get(found[1]) if found else None
    if name not in _OF_ENGINE:
        return ApiError(500, "an internal error ended this request; the log has it", code="internal_error", retry=False)
    status, code, retry = _OF_ENGINE[name]
    retry_after = LEAST_RETRY if status in (429, 503) else None
    return ApiError(status, message, param=param, code=code, retry_after=retry_after, retry=retry)


def starting() -> ApiError:
    """Return the error for a request that comes before the model is loaded."""
    return ApiError(503, "the model is being loaded; try again in a moment", code="starting", retry_after=5)


def draining() -> ApiError:
    """Return the error for a request that comes while the server shuts down."""
    return ApiError(503, "the server is shutting down; try another one", code="draining", retry_after=LEAST_RETRY)


def engine_lost() -> ApiError:
    """Return the error for a request whose engine process died."""
    return ApiError(
        503,
        "the engine's process died while it made this picture, and is being started again; send the request again",
        code="engine_lost",
        retry_after=5,
    )


def queue_full(waiting: int, limit: int, seconds: float) -> ApiError:
    """Return the error for a request that finds no place in the queue; `seconds`: until one is expected to be free."""
    return ApiError(
        429,
        f"{waiting} requests are waiting, and the limit is {limit}; try again after the time in Retry-After",
        code="queue_full",
        retry_after=seconds,
    )


def over_quota(pictures: int, limit: int, seconds: float) -> ApiError:
    """Return the error for a key that has too many pictures on their way."""
    return ApiError(
        429,
        f"this key would have {pictures} pictures on their way, and its limit is {limit}; wait for some of them",
        code="quota_exceeded",
        retry_after=seconds,
    )


def too_late(seconds: float) -> ApiError:
    """Return the error for a request whose deadline passed while it waited."""
    return ApiError(
        504,
        f"the request's deadline of {seconds:g} seconds passed before it could start; nothing was drawn",
        code="deadline_exceeded",
        retry=False,
    )


def cancelled() -> ApiError:
    """Return the error for a request that was cancelled, by DELETE or because its client went away."""
    return ApiError(499, "the request was cancelled", code="request_cancelled", retry=False)
