"""Checks of what is asked for and of what was drawn, by code of the operator's own.

It runs in a process of its own: it may take its time, hold a model, or crash, and neither the server nor the engine
waits. Where it fails nothing is passed on.
"""

import asyncio
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

from stylefast.errors import InvalidRequest
from stylefast.serving.media import Pixels
from stylefast.serving.replies import ApiError
from stylefast.values import quoted

logger = logging.getLogger("stylefast.serving")

START_SECONDS = 300.0  # to load the checks, and their model
CHECK_SECONDS = 60.0  # for one check
REQUEST, PICTURE = "request", "picture"
_METHODS = {REQUEST: "check_request", PICTURE: "check_picture"}
_LONGEST = 500  # characters of a refusal
_USUAL = "this server's safety check refuses it"


@dataclass(frozen=True)
class Refusal:
    """A check's no. message: what the client reads; param: the field that is at fault."""

    message: str = _USUAL
    param: str | None = None


@dataclass(frozen=True)
class Call:
    """Arguments of a check.

    requests: as in a request file, one for each picture, with "prompt" and the rest. uploads: files that were sent
    along, for `check_request`. owner: the name of the API key. index: of the picture among the call's, for
    `check_picture`. preview: whether it is one, unfinished and small.
    """

    requests: Sequence[Mapping[str, Any]]
    owner: str
    uploads: Sequence[bytes] = field(default=(), repr=False)
    index: int = 0
    preview: bool = False


class CheckFailed(Exception):
    """A check raised an error, took too long, or its process died. What it checked is not passed on."""


class Safety:
    """The checks that `name`, a "module:attribute", has: loaded at once, and again after a crash.

    The attribute is an object with `check_request(call)`, which returns None or a Refusal, and
    `check_picture(image, call)`, which returns the image, another one of its size, or a Refusal; one of them is enough.
    A class, or any other function, is called without arguments to get such an object.

    Raises InvalidRequest if it can't be loaded.
    """

    def __init__(self, name: str):
        self._name = name
        self._thread = ThreadPoolExecutor(1, "stylefast-safety")
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Any = None  # a Connection while the process lives
        self._kinds: Sequence[str] = ()
        self._closed = False
        try:
            self._start()
        except CheckFailed as error:
            raise InvalidRequest(f"--safety {quoted(name)}: {error}") from None

    def close(self) -> None:
        """End the process; a check that runs fails."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
        self._thread.shutdown(cancel_futures=True)
        self._end()

    async def check_request(self, call: Call) -> None:
        """Raise ApiError for a request that is refused, CheckFailed if that could not be found out."""
        if REQUEST in self._kinds:
            self._judge(await self._asked(REQUEST, call))

    async def check_picture(self, pixels: Pixels, call: Call) -> Pixels:
        """Return a picture as it may be shown. Raises ApiError and CheckFailed as `check_request` does."""
        if PICTURE not in self._kinds:
            return pixels
        found = self._judge(await self._asked(PICTURE, call, pixels))
        return pixels if found is None else found

    def _judge(self, found: Any) -> Any:
        if isinstance(found, Refusal):
            raise ApiError(400, found.message, param=found.param, code="content_policy_violation")
        return found

    async def _asked(self, *message: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, message)

    def _ask(self, message: Any) -> Any:
        if self._closed:
            raise CheckFailed("the server is shutting down")
        if self._pipe is None:
            self._start()
        return self._told(CHECK_SECONDS, message)

    def _start(self) -> None:
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=_main, args=(theirs, self._name), name="stylefast-safety", daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self._kinds = self._told(START_SECONDS)
        except CheckFailed:
            self._end()
            raise

    def _told(self, seconds: float, message: Any = None) -> Any:
        """Return the process's answer. Raises CheckFailed."""
        assert self._pipe is not None
        try:
            if message is not None:
                self._pipe.send(message)
            if not self._pipe.poll(seconds):
                self._end()
                raise CheckFailed(f"it gave no answer within {seconds:g} seconds")
            fits, found = self._pipe.recv()
        except (EOFError, OSError):
            self._end()
            raise CheckFailed("its process died") from None
        if not fits:
            raise CheckFailed(found)
        return found

    def _end(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._pipe = None


# in the process


def _main(pipe: Connection, name: str) -> None:
    """Answer until the server is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.path.append(os.getcwd())
    try:
        checks = _loaded(name)
    except Exception as error:
        pipe.send((False, _place(error) if not isinstance(error, InvalidRequest) else str(error)))
        return
    pipe.send((True, [kind for kind, method in _METHODS.items() if callable(getattr(checks, method, None))]))
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, _answer(checks, *message)
        except Exception as error:
            answer = False, _place(error)
        pipe.send(answer)


def _loaded(name: str) -> Any:
    module, _, attribute = name.partition(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    has = [method for method in _METHODS.values() if hasattr(found, method)]
    if callable(found) and (isinstance(found, type) or not has):
        found = found()
        has = [method for method in _METHODS.values() if hasattr(found, method)]
    if not has:
        raise InvalidRequest(f"it has neither {' nor '.join(_METHODS.values())}; define one of them")
    return found


def _answer(checks: Any, kind: str, call: Call, pixels: Pixels | None = None) -> Any:
    """Return a Refusal, other pixels, or None for what may pass."""
    if pixels is None:
        found = checks.check_request(call)
        if found is not None and not isinstance(found, Refusal):
            raise TypeError("check_request returns None or a Refusal")
    else:
        image = pixels.image()
        before = image.tobytes()
        found = checks.check_picture(image, call)
        if isinstance(found, Image.Image):
            if found.size != (pixels.width, pixels.height):
                raise TypeError("check_picture returns a picture of the same size, or a Refusal")
            content = found.convert("RGB").tobytes()
            return None if content == before else Pixels(pixels.width, pixels.height, content)
        if not isinstance(found, Refusal):
            raise TypeError("check_picture returns the picture, another one, or a Refusal")
    return None if found is None else Refusal(str(found.message)[:_LONGEST] or _USUAL, found.param)


def _place(error: Exception) -> str:
    """Return what went wrong and where, but not its text, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename != __file__] or frames
    return f"{type(error).__name__} in {inside[-1].filename}, line {inside[-1].lineno}"
