"""A client of `stylefast serve` that needs nothing but Python."""

import base64
import json
import os
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .host import Bar, check_interrupted

# in the environment of ComfyUI: what a node's fields hold is saved in workflows, and in the pictures made with them
KEY = "STYLEFAST_API_KEY"
_SECONDS = 900.0
_LOOK_SECONDS = 0.25  # between two looks at how far a request is, and whether the user stops it


class ServerError(RuntimeError):
    """Message of the server, or that there is none."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A handler that follows no redirects, which would take the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse it."""


@dataclass(frozen=True)
class Client:
    """A running `stylefast serve`. Raises ServerError for an address that is not of HTTP."""

    url: str

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise ServerError(f"the server's address is {self.url[:200]!r}; it begins with http:// or https://")

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, number: str = "") -> Any:
        """Return the reply to a request, which has the id `number` if that is given. Raises ServerError."""
        headers = {"content-type": "application/json"} | ({"x-request-id": number} if number else {})
        if key := os.environ.get(KEY):
            headers["authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, content, headers, method=method)
        try:
            with urllib.request.build_opener(_NoRedirects).open(request, timeout=_SECONDS) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise ServerError(_message(error)) from None
        except (OSError, ValueError) as error:
            raise ServerError(f"no stylefast answers at {self.url} ({error}); start one: stylefast serve") from None

    def styles(self) -> list[str]:
        """Return the names of the styles that can be used."""
        return sorted(style["id"] for style in self.ask("GET", "/v1/styles")["data"] if style["fault"] is None)

    def draw(self, path: str, body: Mapping[str, Any]) -> list[bytes]:
        """Return the pictures of a request as PNG files; shows how far it is, and cancels it if the user stops it."""
        number, bar = f"comfyui-{secrets.token_hex(8)}", Bar()
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.ask, "POST", path, body, number)
            try:
                while not wait([asked], timeout=_LOOK_SECONDS).done:
                    check_interrupted()
                    self._show(number, bar)
            except BaseException:
                self._cancel(number)
                raise
            reply = asked.result()
        return [base64.b64decode(one["b64_json"]) for one in reply["data"]]

    def _show(self, number: str, bar: Bar) -> None:
        try:
            found = self.ask("GET", f"/v1/images/{number}")
        except ServerError:
            return  # it has not arrived yet
        bar.show(found["step"], found["steps"])

    def _cancel(self, number: str) -> None:
        with suppress(ServerError):  # it may be over
            self.ask("DELETE", f"/v1/images/{number}")


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered with status {error.code}"
