"""The queue in front of the engine: who is next, what runs, and what becomes of both when the engine's process dies.

Requests wait here rather than in the engine, so that a crash costs none of those that wait, API keys take turns, and a
refusal needs no answer from the engine. As many pictures as `max_running` are with the engine, which batches them.
"""

import asyncio
import contextlib
import logging
import multiprocessing
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from typing import Any, Protocol

from stylefast.serving import engine_process, replies, tickets
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
from stylefast.serving.tickets import Ticket

logger = logging.getLogger(__name__)

STARTING, READY, DRAINING, BROKEN = "starting", "ready", "draining", "broken"
# an engine that dies so often is not started again
MOST_DEATHS, DEATHS_SECONDS = 3, 60.0
# the engine ends late requests itself; this long after their deadline the server does not wait for it
LATE_SECONDS = 5.0
Message = Run | Cancel | LoadStyle | BakeStyle | Stop
_FIRST_ESTIMATE = 0.4  # seconds of a step, before any request was done
_WEIGHT = 0.2  # of the latest request in the estimate


class EngineProcess:
    """One process with an engine, seen from the server's event loop."""

    def __init__(
        self,
        load: engine_process.Load,
        warm_up: bool,
        tell: Callable[[Any], None],
        styles: engine_process.StylesOf | None = None,
    ):
        """Start it; `tell` is called in the event loop with each message, and with None when the process has ended."""
        context = multiprocessing.get_context("spawn")
        self._loop, self._tell = asyncio.get_running_loop(), tell
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=engine_process.main, args=(theirs, load, warm_up, styles), name="stylefast-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._reaping = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="stylefast-engine-calls", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="stylefast-engine-news", daemon=True).start()

    @property
    def pid(self) -> int | None:
        """Return the process's id."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Send a message, without waiting."""
        self._outbox.put(message)

    def end(self, seconds: float) -> None:
        """Wait for the process to end; kill it after `seconds`."""
        if not wait([self._process.sentinel], seconds):
            self._process.kill()
        self._reap()

    def _reap(self) -> None:
        """Wait for the process, so that no zombie and no file of it stays."""
        wait([self._process.sentinel])
        with self._reaping:
            self._process.join()

    def _read(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while True:
                try:
                    message = self._ours.recv()
                except (EOFError, OSError):
                    message = None
                self._loop.call_soon_threadsafe(self._tell, message)
                if message is None:
                    break
        self._outbox.put(None)
        self._writer.join()
        self._ours.close()
        self._reap()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader says that it has died
            while (message := self._outbox.get()) is not None:
                self._ours.send(message)


class Engine(Protocol):
    """Interface of the engine's process that the dispatcher needs."""

    def send(self, message: Message) -> None:
        """Send a message, without waiting."""

    def end(self, seconds: float) -> None:
        """Wait for it to end; kill it after `seconds`."""


# starts an engine, which calls its argument in the event loop with each message, and with None when it has ended
Start = Callable[[Callable[[Any], None]], Engine]


class Dispatcher:
    """Requests that wait and run, in one event loop.

    max_running: pictures that are with the engine. max_waiting: requests in the queue. max_per_owner: pictures that an
    owner may have on their way; 0: any number. broken: called when the engine can't be kept alive.
    """

    def __init__(
        self,
        start: Start,
        *,
        max_running: int,
        max_waiting: int,
        max_per_owner: int = 0,
        broken: Callable[[str], None] = lambda why: None,
    ):
        self._start, self._broken = start, broken
        self.max_running, self.max_waiting, self.max_per_owner = max_running, max_waiting, max_per_owner
        self.state, self.why = STARTING, ""
        self.facts: dict[str, Any] = {}
        self._counts: dict[str, float] = {}  # of the engine that runs
        self.engine: Engine | None = None
        self.restarts = 0
        self._waiting: OrderedDict[str, deque[Ticket]] = OrderedDict()  # by owner; the first has the next turn
        self._running: dict[str, Ticket] = {}
        self._deaths: deque[float] = deque()
        self._seconds = _FIRST_ESTIMATE
        self._changed = asyncio.Event()
        # messages that make no pictures: what awaits their answers, and what is told of their steps
        self._errands: dict[str, tuple[asyncio.Future[Any], Callable[[Progress], None]]] = {}
        # told of every ticket that has ended, of pictures made for one, and of what else the engine has done
        self.ended: Callable[[Ticket], None] = lambda ticket: None
        self.drawn: Callable[[Done], None] = lambda done: None
        self.counted: Callable[[str, float], None] = lambda name, more: None
        self.stepped: Callable[[float, int], None] = lambda seconds, pictures: None
        self.levels: Mapping[str, float] = {}  # what the engine holds

    def start(self) -> None:
        """Start the engine's process."""
        self._counts, self.levels = {}, {}
        self.engine = self._start(self._take)

    @property
    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        """Return the number of requests that are with the engine."""
        return len(self._running)

    @property
    def pictures(self) -> int:
        """Return the number of pictures that are with the engine."""
        return sum(ticket.count for ticket in self._running.values())

    def expected_seconds(self) -> float:
        """Return the seconds after which a request that arrives now may be expected to start."""
        waiting = (ticket for queued in self._waiting.values() for ticket in queued)
        steps = sum(ticket.steps_left for ticket in (*self._running.values(), *waiting))
        return self._seconds * steps / self.max_running

    def submit(self, ticket: Ticket) -> None:
        """Queue a request. Raises ApiError where it is refused."""
        self._check_ready()
        if self.max_per_owner:
            own = sum(one.count for one in self._of(ticket.owner)) + ticket.count
            if own > self.max_per_owner:
                raise replies.over_quota(own, self.max_per_owner, self._seconds * ticket.steps_left / ticket.count)
        if not self._fits(ticket) and self.waiting >= self.max_waiting:
            raise replies.queue_full(self.waiting, self.max_waiting, self.expected_seconds())
        self._waiting.setdefault(ticket.owner, deque()).append(ticket)
        if ticket.seconds is not None:
            ticket.timer = asyncio.get_running_loop().call_later(ticket.seconds, self._expire, ticket)
        self._advance()

    def errand(
        self, message: LoadStyle | BakeStyle, news: Callable[[Progress], None] = lambda progress: None
    ) -> "asyncio.Future[Any]":
        """Send the engine what makes no pictures, at once; await its answer, or an ApiError.

        news: called with each report of steps. `send_cancel` ends it.
        """
        self._check_ready()
        assert self.engine is not None
        answer = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may wait for it any more
        self._errands[message.ticket] = answer, news
        self.engine.send(message)
        return answer

    def send_cancel(self, errand: str) -> None:
        """Ask the engine to end an errand, which then fails."""
        if errand in self._errands and self.engine is not None:
            self.engine.send(Cancel(errand))

    def named_styles(self) -> set[str]:
        """Return the names of styles in all requests that wait."""
        calls = [ticket.call for queued in self._waiting.values() for ticket in queued]
        styles = [style for call in calls for request in call["requests"] for style in request.get("style") or ()]
        return {style for style in styles if isinstance(style, str)}

    def _check_ready(self) -> None:
        if self.state == DRAINING:
            raise replies.draining()
        if self.state == BROKEN:
            raise replies.ApiError(503, f"the engine does not run: {self.why}", code="engine_broken", retry_after=60)
        if not self.facts:
            raise replies.starting()

    def cancel(self, ticket: Ticket) -> bool:
        """Cancel a request: at once while it waits, after the current step while it runs. Returns False if it is over.

        The ticket of a running one is over at once; the engine is told.
        """
        if ticket.over:
            return False
        if ticket.run in self._running:
            assert self.engine is not None
            self.engine.send(Cancel(ticket.run))
            self._end(ticket, tickets.CANCELLED, replies.cancelled(), keep_slot=True)
        else:
            self._unqueue(ticket)
            self._end(ticket, tickets.CANCELLED, replies.cancelled())
        return True

    async def drain(self, seconds: float) -> None:
        """Accept no more requests, and wait until those on their way are done, for `seconds` at most."""
        self.state = BROKEN if self.state == BROKEN else DRAINING
        until = time.monotonic() + seconds
        for errand in list(self._errands):
            self.send_cancel(errand)
        while (self._running or self.waiting) and time.monotonic() < until:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(until - time.monotonic(), 0.0))
            except TimeoutError:
                break
        for ticket in [*self._running.values(), *(one for queued in self._waiting.values() for one in queued)]:
            if not ticket.over:
                self._end(ticket, tickets.FAILED, replies.draining())
        self._waiting.clear()

    async def close(self, seconds: float = 5.0) -> None:
        """End the engine's process."""
        self.state = BROKEN if self.state == BROKEN else DRAINING
        if self.engine is not None:
            self.engine.send(Stop())
            await asyncio.get_running_loop().run_in_executor(None, self.engine.end, seconds)

    # inside

    def _of(self, owner: str) -> list[Ticket]:
        mine = [ticket for ticket in self._running.values() if ticket.owner == owner and not ticket.over]
        return [*mine, *self._waiting.get(owner, ())]

    def _fits(self, ticket: Ticket) -> bool:
        """Return whether a request could be given to the engine at once."""
        free = not self._running or self.pictures + ticket.count <= self.max_running
        return self.state == READY and free and not self.waiting

    def _advance(self) -> None:
        """Give waiting requests to the engine as long as there is room; owners take turns."""
        while self.state in (READY, DRAINING) and self.facts and self.engine is not None and self._waiting:
            owner, queued = next(iter(self._waiting.items()))
            if self._running and self.pictures + queued[0].count > self.max_running:
                return
            ticket = queued.popleft()
            del self._waiting[owner]
            if queued:
                self._waiting[owner] = queued  # behind the others
            self._running[ticket.run] = ticket
            ticket.start()
            left = None if ticket.expires is None else max(ticket.expires - time.monotonic(), 1e-3)
            self.engine.send(Run(ticket.run, ticket.call, ticket.uploads, ticket.previews, left, ticket.id))

    def _unqueue(self, ticket: Ticket) -> None:
        queued = self._waiting.get(ticket.owner)
        if queued is not None and ticket in queued:
            queued.remove(ticket)
            if not queued:
                del self._waiting[ticket.owner]

    def _expire(self, ticket: Ticket) -> None:
        if ticket.over:
            return
        if ticket.run not in self._running:
            self._unqueue(ticket)
            self._end(ticket, tickets.FAILED, replies.too_late(ticket.seconds or 0.0))
        elif time.monotonic() < (ticket.expires or 0.0) + LATE_SECONDS:
            ticket.timer = asyncio.get_running_loop().call_later(LATE_SECONDS, self._expire, ticket)
        else:
            assert self.engine is not None
            self.engine.send(Cancel(ticket.run))
            late = replies.of_engine("DeadlineExceeded", f"the request took more than {ticket.seconds:g} seconds")
            self._end(ticket, tickets.FAILED, late, keep_slot=True)

    def _end(self, ticket: Ticket, status: str, error: replies.ApiError | None = None, keep_slot: bool = False) -> None:
        """End a ticket; its place with the engine stays taken if `keep_slot`, until the engine says that it is free."""
        if not keep_slot:
            self._running.pop(ticket.run, None)
        told = not ticket.over
        ticket.finish(status, error)
        if told:
            self.ended(ticket)
        self._changed.set()

    def _take(self, message: Any) -> None:
        """Take a message of the engine's process."""
        if message is None:
            self._died()
        elif isinstance(message, Ready):
            self.facts = dict(message.facts)
            self.state = READY if self.state == STARTING else self.state
            self._advance()
        elif isinstance(message, NotReady):
            self._break(message.message)
        elif isinstance(message, Capacity):
            self._resize(message.pictures)
        elif isinstance(message, Counts):
            for name, value in message.values.items():
                self.counted(name, value - self._counts.get(name, 0.0))
            self._counts, self.levels = dict(message.values), message.levels
            for seconds, pictures in message.steps:
                self.stepped(seconds, pictures)
        elif message.ticket in self._errands:
            self._take_answer(message)
        else:
            ticket = self._running.get(message.ticket)
            if ticket is None:
                return
            if isinstance(message, Progress):
                ticket.report(message)
                return
            if isinstance(message, Done):
                self._seconds += _WEIGHT * (message.seconds / max(ticket.steps, 1) - self._seconds)
                if not ticket.over:  # else it was cancelled, and nobody asks for the pictures
                    ticket.take(message)
                    self.drawn(message)
                self._end(ticket, tickets.DONE)
            elif isinstance(message, Failed):
                error = replies.of_engine(message.error, message.message)
                gone = message.error == "JobCancelled"
                self._end(ticket, tickets.CANCELLED if gone else tickets.FAILED, error)
            self._advance()

    def _resize(self, pictures: int) -> None:
        """Let as many pictures be with the engine; while there is room for none, requests wait."""
        if pictures:
            self.max_running = pictures
        if self.state in (STARTING, READY) and self.facts:
            self.state = READY if pictures else STARTING
        self._advance()

    def _take_answer(self, message: Any) -> None:
        answer, news = self._errands[message.ticket]
        if isinstance(message, Progress):
            news(message)
            return
        del self._errands[message.ticket]
        if answer.done():
            return  # nobody waits for it any more
        if isinstance(message, Answer):
            answer.set_result(message.value)
        else:
            answer.set_exception(replies.of_engine(message.error, message.message))

    def _died(self) -> None:
        for answer, _ in self._errands.values():
            if not answer.done():
                answer.set_exception(replies.engine_lost())
        self._errands.clear()
        if self.state == BROKEN or (self.state == DRAINING and not self._running and not self.waiting):
            return
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - DEATHS_SECONDS:
            self._deaths.popleft()
        logger.error("the engine's process died with %d requests in progress", len(self._running))
        self.facts = {}
        for ticket in list(self._running.values()):
            self._end(ticket, tickets.FAILED, replies.engine_lost())
        if len(self._deaths) >= MOST_DEATHS:
            self._break(f"its process died {len(self._deaths)} times within {DEATHS_SECONDS:g} seconds")
            return
        self.state = STARTING if self.state == READY else self.state
        self.restarts += 1
        self.start()

    def _break(self, why: str) -> None:
        self.state, self.why = BROKEN, why
        error = replies.ApiError(503, f"the engine does not run: {why}", code="engine_broken", retry_after=60)
        for queued in list(self._waiting.values()):
            for ticket in list(queued):
                self._end(ticket, tickets.FAILED, error)
        self._waiting.clear()
        self._broken(why)
