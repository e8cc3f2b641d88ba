"""One queue in front of engines in several processes, on this machine or others.

`EngineReplica` is the side of an engine: a process of its own, whose calls come one by one. `Replicas` is the side of
the service: it looks like a single engine to the dispatcher, which keeps the queue, the turns and the deadlines.
Neither knows how messages travel between the two; `ray_serve` does.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stylefast.errors import StyleFastError
from stylefast.serving.dispatcher import Engine, Message
from stylefast.serving.engine_process import MOST_STEPS
from stylefast.serving.messages import (
    Answer,
    BakeStyle,
    Cancel,
    Capacity,
    Counts,
    Done,
    Failed,
    LoadStyle,
    NotReady,
    Progress,
    Ready,
    Run,
    Stop,
)
from stylefast.serving.replies import ENGINE_LOST

logger = logging.getLogger("stylefast.serving.replicas")

BEAT_SECONDS = 1.0  # between two questions to all replicas
SILENT_SECONDS = 10.0  # without an answer, after which there are none
# starts an engine's process, which calls its argument with each message, and with None when it has ended
StartProcess = Callable[[Callable[[Any], None]], Engine]
News = Progress | Done | Answer | Failed


@dataclass(frozen=True)
class Heartbeat:
    """Report of a replica on itself.

    pictures: how many it takes at once. ongoing: the calls that it has. counts: with its steps since the last report.
    """

    replica: str
    facts: Mapping[str, Any]
    pictures: int
    ongoing: int
    counts: Counts


def style_of(message: Message) -> str:
    """Return the style by which a message finds a replica that holds it; "" where it names none."""
    if isinstance(message, LoadStyle | BakeStyle):
        return message.name
    requests = message.call["requests"] if isinstance(message, Run) else ()
    named = [style for request in requests for style in request.get("style") or () if isinstance(style, str)]
    return next(iter(named), "")


class EngineReplica:
    """One engine in a process of its own.

    start: starts the process. pictures: that it may have at once. name: of the replica. stalled: seconds without a step
    after which an engine that has calls counts as stuck. lost: called when the process has died.
    """

    def __init__(
        self, start: StartProcess, *, pictures: int, name: str, stalled: float, lost: Callable[[], None] = lambda: None
    ):
        self._start, self._pictures, self._name, self._stalled, self._lost = start, pictures, name, stalled, lost
        self._engine: Engine | None = None
        self._ready: asyncio.Future[Mapping[str, Any]] | None = None
        self._calls: dict[str, asyncio.Queue[News]] = {}
        self._room = asyncio.Semaphore(pictures)
        self._counts, self._steps = Counts(), deque[tuple[float, int]](maxlen=MOST_STEPS)
        self._alive, self._moved = True, time.monotonic()
        self.waiting = 0  # requests in the queue of the service, as it last said

    async def start(self) -> None:
        """Start the process, and wait until its model is loaded. Raises StyleFastError if it can't be."""
        self._ready = asyncio.get_running_loop().create_future()
        self._engine = self._start(self._take)
        await self._ready

    async def run(self, message: Run | LoadStyle | BakeStyle) -> AsyncIterator[News]:
        """Yield what becomes of a message: reports of steps, then its end. A caller that leaves cancels it.

        Requests beyond those that it may have wait here, untaken: should it die, another replica can have them.
        """
        room = self._room if isinstance(message, Run) else nullcontext()
        async with room, aclosing(self._sent(message)) as stream:
            async for news in stream:
                yield news

    async def _sent(self, message: Run | LoadStyle | BakeStyle) -> AsyncGenerator[News, None]:
        if not self._alive or self._engine is None:
            yield Failed(message.ticket, ENGINE_LOST, "")
            return
        if isinstance(message, Run):
            line = {"request_id": message.request, "replica": self._name, "style": style_of(message)}
            logger.info(json.dumps({"drawing": line}))
        news = self._calls[message.ticket] = asyncio.Queue[News]()
        self._moved = time.monotonic() if len(self._calls) == 1 else self._moved
        self._engine.send(message)
        over = False
        try:
            if isinstance(message, Run):
                yield Progress(message.ticket, 0, 0)  # from here on, the call may have been drawn
            while not over:
                found = await news.get()
                over = not isinstance(found, Progress)
                yield found
        finally:
            del self._calls[message.ticket]
            if not over:
                self._engine.send(Cancel(message.ticket))

    async def load_style(self, name: str) -> bool:
        """Read a registered style ahead of the requests for it. Returns whether it is there and whole."""
        async for found in self.run(LoadStyle(f"load:{name}:{time.monotonic_ns()}", name)):
            if isinstance(found, Answer):
                return True
        return False

    def heartbeat(self, waiting: int = 0) -> Heartbeat:
        """Return how it is; `waiting`: requests in the queue of the service."""
        self.waiting = waiting
        facts = {} if self._ready is None or not self._ready.done() else self._ready.result()
        steps = tuple(self._steps.popleft() for _ in range(len(self._steps)))
        return Heartbeat(
            self._name,
            facts,
            self._pictures if self._alive and facts else 0,
            len(self._calls),
            replace(self._counts, steps=steps),
        )

    def check(self) -> None:
        """Raise RuntimeError if the engine can't make pictures: its process is dead, or stuck."""
        if not self._alive:
            raise RuntimeError("the engine's process has died")
        idle = time.monotonic() - self._moved
        if self._calls and idle > self._stalled:
            raise RuntimeError(f"the engine has {len(self._calls)} calls and made no step for {idle:.0f} seconds")

    async def close(self, seconds: float = 5.0) -> None:
        """End the process."""
        self._alive = False
        if self._engine is not None:
            self._engine.send(Stop())
            await asyncio.get_running_loop().run_in_executor(None, self._engine.end, seconds)

    def _take(self, message: Any) -> None:
        if message is None:
            self._died("its process died while it loaded the model")
        elif isinstance(message, Ready):
            self._settle(message.facts)
        elif isinstance(message, NotReady):
            self._settle(StyleFastError(message.message))
        elif isinstance(message, Counts):
            self._moved = time.monotonic() if message.values != self._counts.values else self._moved
            self._counts = message
            self._steps.extend(message.steps)
        elif message.ticket in self._calls:
            self._moved = time.monotonic()
            self._calls[message.ticket].put_nowait(message)

    def _settle(self, found: Mapping[str, Any] | StyleFastError) -> None:
        assert self._ready is not None
        if self._ready.done():
            return
        if isinstance(found, StyleFastError):
            self._ready.set_exception(found)
        else:
            self._ready.set_result(found)

    def _died(self, why: str) -> None:
        if not self._alive:
            return  # it was closed
        self._alive = False
        self._settle(StyleFastError(f"the engine does not run: {why}"))
        for ticket, news in self._calls.items():
            news.put_nowait(Failed(ticket, ENGINE_LOST, ""))
        self._lost()


class Stream(Protocol):
    """Replies to a message that was sent to a replica."""

    def __aiter__(self) -> AsyncIterator[News]:
        """Return the news, to the end of the call."""
        ...

    def cancel(self) -> None:
        """End the call."""


class Replicas:
    """All replicas, as the one engine of a dispatcher.

    tell: takes their messages. call: sends a message to one of them, if possible to one that holds the style of this
    name. ask: asks all for their heartbeats, and tells them how many requests wait; what it returns for one that does
    not answer is passed over. waiting: returns that number. bugs: the errors of `call` that are our own; all others
    mean that the replica is gone.
    """

    def __init__(
        self,
        tell: Callable[[Any], None],
        *,
        call: Callable[[Message, str], Stream],
        ask: Callable[[int], Awaitable[Sequence[Any]]],
        waiting: Callable[[], int],
        bugs: type[BaseException] | tuple[type[BaseException], ...] = (),
    ):
        self._tell, self._call, self._ask, self._waiting, self._bugs = tell, call, ask, waiting, bugs
        self._streams: dict[str, Stream] = {}
        self._cancelled: set[str] = set()
        self._known: dict[str, Mapping[str, float]] = {}  # counts by replica, of those that are gone too
        self._facts: Mapping[str, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beating = asyncio.ensure_future(self._beat())

    def send(self, message: Message) -> None:
        """Send a message, without waiting."""
        if isinstance(message, Cancel):
            stream = self._streams.get(message.ticket)
            if stream is not None:
                self._cancelled.add(message.ticket)
                stream.cancel()
        elif isinstance(message, Stop):
            self._beating.cancel()
        else:
            task = asyncio.ensure_future(self._follow(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def end(self, seconds: float) -> None:
        """Do nothing: replicas end by themselves."""

    def check(self) -> None:
        """Raise RuntimeError if the replicas are no longer asked how they are."""
        if self._beating.done() and not self._beating.cancelled():
            raise RuntimeError(f"the heartbeat has stopped: {self._beating.exception()}")

    async def _follow(self, message: Run | LoadStyle | BakeStyle) -> None:
        taken, failed = await self._attempt(message)
        if failed is not None and not taken:
            # the replica died before it drew anything, so another one may; once, in case it is the call that kills them
            _, failed = await self._attempt(message)
        self._cancelled.discard(message.ticket)
        if failed is not None:
            self._tell(failed)

    async def _attempt(self, message: Run | LoadStyle | BakeStyle) -> tuple[bool, Failed | None]:
        """Send a message to a replica, and pass on what it says. Returns whether it took it, and how it was lost."""
        ticket, taken, failed = message.ticket, False, Failed(message.ticket, ENGINE_LOST, "")
        stream = self._streams[ticket] = self._call(message, style_of(message))
        try:
            async for news in stream:
                if isinstance(news, Failed) and news.error == ENGINE_LOST:
                    break
                taken = True
                self._tell(news)
                if not isinstance(news, Progress):
                    return taken, None
        except asyncio.CancelledError:
            if ticket not in self._cancelled:  # it is the task that ends, with the service
                raise
        except self._bugs as error:
            logger.exception("a replica failed for a reason of ours", exc_info=error)
            taken, failed = True, Failed(ticket, type(error).__name__, "")
        except Exception as error:
            if ticket not in self._cancelled:
                logger.error("a replica was lost with a request in progress: %s", type(error).__name__)
        finally:
            del self._streams[ticket]
        if ticket in self._cancelled:
            return True, Failed(ticket, "JobCancelled", "the request was cancelled")
        return taken, failed

    async def _beat(self) -> None:
        said, heard = "", time.monotonic()
        while True:
            try:
                found = await self._ask(self._waiting())
            except Exception as error:
                # while there are no replicas, or one is dying; a line for each second would hide the rest of the log
                if type(error).__name__ != said:
                    said = type(error).__name__
                    logger.warning("the replicas can't be asked how they are: %s", said)
                if time.monotonic() - heard > SILENT_SECONDS:
                    self._tell(Capacity(0))
            else:
                said, heard = "", time.monotonic()
                self._heard([one for one in found if isinstance(one, Heartbeat) and one.pictures])
            await asyncio.sleep(BEAT_SECONDS)

    def _heard(self, alive: Sequence[Heartbeat]) -> None:
        if alive and not self._facts:
            self._facts = alive[0].facts
            self._tell(Ready(self._facts))
        self._tell(Capacity(sum(one.pictures for one in alive)))
        self._known |= {one.replica: one.counts.values for one in alive}
        levels = _sum(one.counts.levels for one in alive)
        self._tell(Counts(_sum(self._known.values()), levels, [step for one in alive for step in one.counts.steps]))


def _sum(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total
