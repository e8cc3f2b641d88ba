"""Finished pictures in memory that clients fetch by addresses nobody can guess, for clients that can't read base64."""

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from stylefast.serving.replies import ApiError

# the address is the key: who has it may fetch the picture, as with the addresses of OpenAI
PATH = re.compile(r"/v1/images/img_[A-Za-z0-9_-]{32}/[0-9]{1,2}\.(?:png|jpeg|webp)")


@dataclass(frozen=True)
class Linked:
    """A picture's file. expires: on the monotonic clock."""

    content: bytes
    form: str
    expires: float


class Links:
    """Pictures by their paths, until they expire, or newer ones need the room; one thread uses it."""

    def __init__(self, seconds: float, most_bytes: int):
        self.seconds, self.most_bytes = seconds, most_bytes
        self._held: OrderedDict[str, Linked] = OrderedDict()  # the oldest first
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, contents: Sequence[bytes], form: str) -> list[str]:
        """Keep the pictures of one reply; return their paths. Raises ApiError if they are too large together."""
        size = sum(map(len, contents))
        if size > self.most_bytes:
            raise ApiError(
                400,
                f"the pictures have {size} bytes, and this server keeps {self.most_bytes} for addresses; ask for "
                "response_format b64_json",
                param="response_format",
                code="link_too_large",
            )
        self._forget(size)
        folder = f"/v1/images/img_{secrets.token_urlsafe(24)}"
        paths = [f"{folder}/{i}.{form}" for i in range(len(contents))]
        expires = time.monotonic() + self.seconds
        for path, content in zip(paths, contents, strict=True):
            self._held[path] = Linked(content, form, expires)
        self._bytes += size
        return paths

    def find(self, path: str) -> Linked:
        """Return the picture of a path. Raises ApiError."""
        self._forget(0)
        found = self._held.get(path)
        if found is None:
            raise ApiError(
                404,
                f"there is no picture at this address; they are kept for {self.seconds:g} seconds, or less if others "
                "need the room",
                code="not_found",
            )
        return found

    def _forget(self, room: int) -> None:
        now = time.monotonic()
        while self._held:
            path, oldest = next(iter(self._held.items()))
            if oldest.expires > now and self._bytes + room <= self.most_bytes:
                return
            del self._held[path]
            self._bytes -= len(oldest.content)
