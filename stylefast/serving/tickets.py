"""Requests on their way through the service, from arrival to the reply, and the register by which clients find them."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stylefast.serving.messages import Done, Made, Progress
from stylefast.serving.replies import ApiError
from stylefast.values import quoted

WAITING, RUNNING, DONE, FAILED, CANCELLED = "queued", "in_progress", "completed", "failed", "cancelled"
OVER = (DONE, FAILED, CANCELLED)
MOST_STEPS, USUAL_STEPS = 1000, 12  # of a request; the latter where it does not say, and its sampler has no preset


@dataclass(eq=False)
class Ticket:
    """One request. All of it is touched by the event loop's thread alone.

    call, uploads, previews: as in `messages.Run`; the first two are dropped at the end. owner: the name of the API key
    that sent it. run: its name with the engine, never used twice, as `id` may be. count: its pictures.
    """

    id: str
    owner: str
    call: Mapping[str, Any]
    uploads: Sequence[bytes] = ()
    previews: int = 0
    seconds: float | None = None  # it may take, waiting included
    status: str = WAITING
    step: int = 0
    steps: int = 0
    created: float = field(default_factory=time.time)
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    previewed: float | None = None  # when the first preview came
    ended: float | None = None
    pictures: Sequence[Made] = ()
    text_tokens: int = 0
    compute_seconds: float = 0.0
    error: ApiError | None = None
    tongue: str = "openai"  # of the route that it came by
    key: str | None = None  # of idempotency
    trace: Any = None  # of the request that brought it, see `tracing.here`
    timer: asyncio.TimerHandle | None = None  # of its deadline
    wanted: bool = True  # whether anybody may still ask for its pictures
    askers: int = 0  # HTTP requests that are being answered with it
    unchecked: bool = False  # whether the safety check may still refuse its pictures
    run: str = field(default_factory=lambda: f"run_{secrets.token_hex(8)}")
    count: int = field(init=False)
    _over: asyncio.Event = field(default_factory=asyncio.Event)
    _readers: list[asyncio.Queue[Progress | None]] = field(default_factory=list)

    def __post_init__(self):
        self.count = len(self.call["requests"])

    @property
    def steps_left(self) -> int:
        """Return the steps that are still to be made for its pictures, as far as its request tells."""
        if self.steps:
            return self.count * max(self.steps - self.step, 0)
        given = (request.get("steps") for request in self.call.get("requests", ()))
        return sum(steps if isinstance(steps, int) and 0 < steps <= MOST_STEPS else USUAL_STEPS for steps in given)

    @property
    def over(self) -> bool:
        """Return whether it has ended, in any way."""
        return self.status in OVER

    @property
    def expires(self) -> float | None:
        """Return when its deadline is, on the monotonic clock."""
        return None if self.seconds is None else self.arrived + self.seconds

    @property
    def queue_seconds(self) -> float:
        """Return how long it waited, or has waited."""
        return (self.started or self.ended or time.monotonic()) - self.arrived

    async def wait(self) -> Sequence[Made]:
        """Wait until it has ended; return its pictures, or raise its ApiError."""
        await self._over.wait()
        if self.error is not None:
            raise self.error
        return self.pictures

    async def progress(self) -> AsyncIterator[Progress]:
        """Yield what its steps report, until it has ended; then raise its error, if any."""
        if not self.over:
            news: asyncio.Queue[Progress | None] = asyncio.Queue()
            self._readers.append(news)
            try:
                while (found := await news.get()) is not None:
                    yield found
            finally:
                self._readers.remove(news)
        if self.error is not None:
            raise self.error

    def report(self, progress: Progress) -> None:
        """Note what its steps report, and pass it on."""
        self.step, self.steps = progress.step, progress.steps
        if progress.previews and self.previewed is None:
            self.previewed = time.monotonic()
        for reader in self._readers:
            reader.put_nowait(progress)

    def start(self) -> None:
        """Note that the engine has it."""
        self.status, self.started = RUNNING, time.monotonic()

    def take(self, done: Done) -> None:
        """Take its pictures, if anybody may still ask for them."""
        self.text_tokens, self.compute_seconds = done.text_tokens, done.seconds
        self.step = self.steps = max(self.steps, 1)
        if self.wanted:
            self.pictures = done.pictures

    def finish(self, status: str, error: ApiError | None = None) -> None:
        """End it, once, and drop what it was made from."""
        if self.over:
            return
        self.status, self.error, self.ended = status, error, time.monotonic()
        self.call, self.uploads = {}, ()
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        for reader in self._readers:
            reader.put_nowait(None)
        self._over.set()

    def refuse(self, error: ApiError) -> None:
        """Note that its pictures can't be had, though the engine made them."""
        if self.status == DONE:
            self.status, self.error, self.pictures = FAILED, error, ()

    def forget_pictures(self) -> None:
        """Drop the pictures once they were sent, since they take memory, and those that may still come."""
        self.pictures, self.wanted = (), False

    def shown(self) -> dict[str, Any]:
        """Return what a client may know of it: `GET /v1/images/{id}`."""
        error = None if self.error is None else self.error.body()["error"]
        return {
            "id": self.id,
            "object": "image.request",
            "status": RUNNING if self.status == DONE and self.unchecked else self.status,
            "created": int(self.created),
            "n": self.count,
            "step": self.step,
            "steps": self.steps,
            "progress": 1.0 if self.status == DONE else self.step / self.steps if self.steps else 0.0,
            "error": error,
        }


class Register:
    """Tickets by id, kept for some time after they have ended, and by idempotency key.

    most: tickets that are kept. most_bytes: of pictures that wait for a request to be repeated with its key.
    """

    def __init__(self, keep_seconds: float, most: int = 1000, most_bytes: int = 256 * 2**20):
        self._keep, self._most, self._most_bytes = keep_seconds, most, most_bytes
        self._tickets: OrderedDict[str, Ticket] = OrderedDict()
        self._keys: dict[tuple[str, str], tuple[str, Ticket]] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def add(self, ticket: Ticket, key: str | None = None, digest: str = "") -> None:
        """Add a ticket; `key`: the idempotency key of its request, `digest`: of what the request asks for.

        An id may be used again, by the same owner, once its request has ended without pictures: proxies repeat
        requests with the same id. Raises ApiError if a request of this id is known already otherwise.
        """
        self._forget()
        known = self._tickets.get(ticket.id)
        if known is not None and known.owner == ticket.owner and known.over and known.status != DONE:
            self.drop(known)
        elif known is not None:
            raise ApiError(
                409,
                f"a request with the id {quoted(ticket.id)} is known already; give each its own x-request-id",
                code="duplicate_id",
                retry=False,
            )
        self._tickets[ticket.id], ticket.key = ticket, key
        if key is not None:
            self._keys[ticket.owner, key] = digest, ticket

    def drop(self, ticket: Ticket) -> None:
        """Take out a ticket that was refused."""
        self._tickets.pop(ticket.id, None)
        self._unkey(ticket)

    def of(self, owner: str) -> list[Ticket]:
        """Return the tickets of an owner, the oldest first."""
        return [ticket for ticket in self._tickets.values() if ticket.owner == owner]

    def find(self, number: str, owner: str | None) -> Ticket:
        """Return the ticket of an id; `owner`: whose it must be, None for anybody's. Raises ApiError."""
        self._forget()
        ticket = self._tickets.get(number)
        if ticket is None or (owner is not None and ticket.owner != owner):
            raise ApiError(
                404,
                "no request of this id is known; ids are kept for a while after the reply",
                param="id",
                code="not_found",
            )
        return ticket

    def repeated(self, owner: str, key: str, digest: str) -> Ticket | None:
        """Return the ticket of an earlier request with this idempotency key. Raises ApiError if it asked for other."""
        self._forget()
        found = self._keys.get((owner, key))
        if found is None:
            return None
        if found[1].over and found[1].status != DONE:
            self._unkey(found[1])  # a request that failed is made again
            return None
        if found[0] != digest:
            raise ApiError(
                409,
                "this idempotency key was used for another request; give each request its own",
                param="idempotency-key",
                code="idempotency_key_reused",
                retry=False,
            )
        return found[1]

    def _forget(self) -> None:
        """Take out tickets that ended long ago, and the oldest of too many."""
        now, gone = time.monotonic(), []
        ended = [ticket for ticket in self._tickets.values() if ticket.ended is not None]
        surplus = len(self._tickets) - self._most
        for place, ticket in enumerate(ended):
            if place < surplus or (ticket.ended or now) + self._keep < now:
                gone.append(ticket)
        for ticket in gone:
            self.drop(ticket)
        size = 0
        for ticket in reversed(ended):
            size += sum(len(made.pixels.content) for made in ticket.pictures)
            if not ticket.askers and (size > self._most_bytes or ticket.key is None):
                ticket.forget_pictures()
                self._unkey(ticket)

    def _unkey(self, ticket: Ticket) -> None:
        """Take out a ticket's key, so that the next request with it is made anew."""
        if ticket.key is not None and self._keys.get((ticket.owner, ticket.key), ("", None))[1] is ticket:
            del self._keys[ticket.owner, ticket.key]
        ticket.key = None
