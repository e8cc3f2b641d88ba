"""The whole service in this process, on a stand-in for the engine whose steps a test allows one by one, or not at all.

What clients meet is real: uvicorn on a loopback address, the guard, the routes, the queue. `faulty.py` has the real
engine.
"""

import asyncio
import http.client
import json
import threading
import time
from contextlib import contextmanager

import uvicorn

from stylefast.serving.app import create_app
from stylefast.serving.dispatcher import Dispatcher
from stylefast.serving.http import Protocol
from stylefast.serving.media import Pixels
from stylefast.serving.messages import Answer, Cancel, Done, Failed, LoadStyle, Made, Progress, Ready, Run
from stylefast.serving.settings import ServeSettings
from tests.serving.conftest import WAIT

PIXELS = Pixels(64, 64, bytes(64 * 64 * 3))
FACTS = {
    "model": "tiny",
    "fingerprint": "0123456789abcdef",
    "size": (64, 64),
    "styles": ["chalk", "neon"],
    "adapters": ["ip"],
    "controls": [],
    "loras": ["gold"],
    "schedulers": ["euler"],
    "samplers": {"Euler": "euler"},
    "downscale": 8,
    "device": "cpu",
}


class StandIn:
    """An engine that draws black pictures, all requests at once, a step of each at a time.

    steps: those done, by ticket. open: whether steps go on; `allow` lets one step happen while it is not.
    """

    def __init__(self, tell, pixels=PIXELS):
        self._tell, self._loop, self.pixels = tell, asyncio.get_running_loop(), pixels
        self.steps, self.runs, self._tasks = {}, 0, {}
        self._open = asyncio.Event()
        self._open.set()
        tell(Ready(FACTS))

    def send(self, message):
        if isinstance(message, Run):
            self.runs += 1
            self.steps[message.ticket] = 0
            self._tasks[message.ticket] = self._loop.create_task(self._draw(message))
        elif isinstance(message, LoadStyle):
            self._loop.call_soon(self._tell, Answer(message.ticket, {"kinds": []}))
        elif isinstance(message, Cancel) and message.ticket in self._tasks:
            self._tasks[message.ticket].cancel()

    def end(self, seconds):
        pass

    def shut(self):
        """Stop before the next step, until `go`; from any thread."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def go(self):
        """Go on."""
        self._loop.call_soon_threadsafe(self._open.set)

    async def _draw(self, run):
        requests = run.call["requests"]
        try:
            for step in range(1, requests[0].get("steps", 2) + 1):
                await self._open.wait()
                await asyncio.sleep(0)
                self.steps[run.ticket] = step
                previews = [self.pixels] if step <= run.previews else ()
                self._tell(Progress(run.ticket, step, requests[0].get("steps", 2), previews))
            made = [Made(self.pixels, "{}", "", request["seed"]) for request in requests]
            self._tell(Done(run.ticket, made, 0.0, 1, [[] for _ in requests]))
        except asyncio.CancelledError:
            self._tell(Failed(run.ticket, "JobCancelled", ""))
        finally:
            del self._tasks[run.ticket]


class Bench:
    """A running service. app, service, engine: what it consists of."""

    def __init__(self, app, address, loop):
        self.app, self.address, self.loop = app, address, loop
        self.url = f"http://{address[0]}:{address[1]}"

    @property
    def service(self):
        return self.app.state.service

    @property
    def engine(self):
        return self.service.dispatcher.engine

    def call(self, method, path, body=None, headers=None):
        """Return status, headers and body of a request."""
        connection = http.client.HTTPConnection(*self.address, timeout=WAIT)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            return reply.status, reply.headers, reply.read()
        finally:
            connection.close()

    def draw(self, headers=None, **body):
        """Return status, headers and body of a request for pictures."""
        body = json.dumps({"prompt": "a fish", **body})
        return self.call(
            "POST", "/v1/images/generations", body, {"content-type": "application/json", **(headers or {})}
        )

    def metric(self, name):
        """Return the number of a metric, labels in its name included."""
        page = self.service.metrics.page()[0].decode()
        return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"stylefast:{name} "))

    def until(self, condition):
        """Wait for a condition."""
        end = time.monotonic() + 5 * WAIT
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.005)

    def idle(self):
        """Wait until nothing waits or runs."""
        dispatcher = self.service.dispatcher
        self.until(lambda: not dispatcher.running and not dispatcher.waiting)


@contextmanager
def bench(start=StandIn, **settings):
    """Run a service in a thread. start: called in its event loop, returns the engine; settings: of the service."""
    chosen = ServeSettings(port=0, **settings)

    def make_dispatcher():
        return Dispatcher(
            start,
            max_running=chosen.max_running,
            max_waiting=chosen.max_waiting,
            max_per_owner=chosen.max_per_key,
        )

    app = create_app(chosen, make_dispatcher)
    config = uvicorn.Config(
        app,
        port=0,
        http=Protocol,
        log_config=None,
        access_log=False,
        lifespan="on",
        backlog=16384,
        h11_max_incomplete_event_size=64 * 2**10,
        timeout_graceful_shutdown=1,
    )
    server, loops = uvicorn.Server(config), []

    async def run():
        loops.append(asyncio.get_running_loop())
        await server.serve()

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="bench")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.005)
        running = Bench(app, server.servers[0].sockets[0].getsockname(), loops[0])
        running.until(lambda: running.call("GET", "/readyz")[0] == 200)
        yield running
    finally:
        server.should_exit = True
        thread.join()


def together(calls):
    """Make calls at once, each in a thread; return what they return, in their order."""
    found = [None] * len(calls)

    def one(i):
        found[i] = calls[i]()

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
