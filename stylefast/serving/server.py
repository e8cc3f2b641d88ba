"""The server's process: uvicorn, and what signals and a lost engine mean for it."""

import asyncio
import itertools
import logging
import math
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from stylefast.errors import StyleFastError
from stylefast.serving.app import create_app
from stylefast.serving.dispatcher import BROKEN, Dispatcher, EngineProcess
from stylefast.serving.engine_process import Load, StylesOf
from stylefast.serving.http import Protocol
from stylefast.serving.settings import ServeSettings

logger = logging.getLogger("stylefast.serving")

_CLOSE_SECONDS = 5  # that connections get after the last reply


def serve(settings: ServeSettings, load: Load) -> None:
    """Serve until a signal ends it. Raises StyleFastError if the engine can't be kept alive.

    load: called in the engine's process; it must be picklable.
    """
    log_to_stderr()
    server: _Server | None = None

    def broken(why: str) -> None:
        logger.error("the engine does not run: %s", why)
        if server is not None:
            server.should_exit = True

    starts = itertools.count()

    def start(tell: Callable[[Any], None]) -> EngineProcess:
        styles = None if settings.styles_dir is None else StylesOf(settings.styles_dir, first=next(starts) == 0)
        return EngineProcess(load, not settings.no_warm_up, tell, styles)

    def make_dispatcher() -> Dispatcher:
        return Dispatcher(
            start,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            max_per_owner=settings.max_per_key,
            broken=broken,
        )

    app = create_app(settings, make_dispatcher)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http=Protocol,
        h11_max_incomplete_event_size=64 * 2**10,
        # finished pictures may still wait for the safety check
        timeout_graceful_shutdown=_CLOSE_SECONDS if settings.safety is None else math.ceil(settings.grace),
    )
    server = _Server(config, app, settings.grace)
    server.run()
    dispatcher = getattr(app.state, "service", None) and app.state.service.dispatcher
    if dispatcher is not None and dispatcher.state == BROKEN:
        raise StyleFastError(f"the engine does not run: {dispatcher.why}")
    if not server.started:
        raise StyleFastError(f"can't listen on {settings.host}:{settings.port}; give another --port")


class _Server(uvicorn.Server):
    """uvicorn's server, which goes on answering while it drains.

    After the first signal the listening socket stays open, so that new requests get 503 and health checks an answer,
    until the requests on their way are done or the grace is over. A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, app: Any, grace: float):
        super().__init__(config)
        self._app, self._grace, self._draining = app, grace, False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listening in self.servers:
            for socket in listening.sockets:
                host, port = socket.getsockname()[:2]
                print(f"serving on http://{host}:{port}", file=sys.stderr, flush=True)

    @contextmanager
    def capture_signals(self):
        """Take the signals that end the server, without raising them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal; end at the second."""
        service = getattr(self._app.state, "service", None)
        if self._draining or service is None or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain(service.dispatcher)))

    async def _drain(self, dispatcher: Dispatcher) -> None:
        logger.info("shutting down: %d requests are on their way", dispatcher.running + dispatcher.waiting)
        await dispatcher.drain(self._grace)
        self.should_exit = True


def log_to_stderr() -> None:
    """Send the service's log to stderr, and uvicorn's with it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name, level in (("stylefast.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
