"""What must not happen: a request lost, an error of the server's own, memory that grows, a picture made twice.

soak: clients whose requests are cancelled, cut off and malformed now and then. crash: the engine's process is killed
under load. starts: from the command to the first request that is answered.
"""

import json
import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.serving.mix import mixed
from benchmarks.serving.service import JSON, OURS, PATH, RefusedError, Service, read_stream, refusal, running, stream

CLIENTS = 8
CANCELLED, MALFORMED = 0.10, 0.05  # shares of the requests
STRETCHES = 20
WARM_UP = 8  # stretches after which memory must be flat: the matrix library keeps prepared data of many shapes
IDLE_SECONDS = 2.0  # before memory is read: the engine gives some back once it has nothing to do
MOST_MEGABYTES, MOST_START = 20.0, 20.0
SHORT = (2, 4, 8)  # steps: here many requests count, not long ones
LATEST_CANCEL = 0.8  # seconds after which a request is cancelled at the latest
KILLS = 2  # three deaths in a minute would end the server on purpose
BEFORE, AFTER = 5.0, 5.0  # seconds of load before a kill, and after the server is ready again
STARTS = 3
OTHER_ERRORS = "errors of the server"
STATUSES = ("completed", "cancelled", "failed")  # of requests that are over
# bodies that no server may take
BAD_BODIES: tuple[tuple[bytes, dict[str, str]], ...] = (
    (b"", JSON),
    (b"{", JSON),
    (b"[1]", JSON),
    (b"\xff\xfe", JSON),
    (b'{"size": "64x64"}', JSON),
    (b'{"prompt": 5}', JSON),
    (b'{"prompt": "a fish", "size": "63x64"}', JSON),
    (b'{"prompt": "a fish", "size": "9999999x8"}', JSON),
    (b'{"prompt": "a fish", "style": "nothing"}', JSON),
    (b'{"prompt": "a fish", "model": "other"}', JSON),
    (b'{"prompt": "a fish", "stylefast": {"steps": -1}}', JSON),
    (b'{"prompt": "a fish", "stylefast": {"guidance": "much"}}', JSON),
    (b'{"prompt": "a fish", "stylefast": {"style": {"kind": "Unknown"}}}', JSON),
    (b'{"prompt": "a fish", "n": 1000}', JSON),
    (b'{"prompt": "a fish", "prompt": "a cat"}', JSON),
    (b"prompt=a+fish", {"content-type": "text/plain"}),
    (b"[" * 100_000, JSON),
)


@dataclass
class Tally:
    """Counts of how requests ended, and what was wrong with them."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, end: str, wrong: str = "") -> None:
        """Count a request; `wrong`: what should not have been."""
        with self.lock:
            self.ends[end] += 1
            if wrong:
                self.wrong.append(f"{end}: {wrong}")

    def run(self, work: Callable[[], str]) -> None:
        """Run one request, which returns how it ended; what it raises is wrong."""
        try:
            self.add(work())
        except RefusedError as error:
            self.add(OTHER_ERRORS if error.status >= 500 else "refused", str(error))
        except Exception as error:
            self.add("lost", f"{type(error).__name__}: {error}")


def soak(seconds: float, stretches: int = STRETCHES, warm_up: int = WARM_UP) -> dict[str, Any]:
    """Return how the requests of eight clients ended, and the memory of server and engine between stretches."""
    tally, megabytes, numbers, warm = Tally(), [], iter(range(10**9)), 0
    with running(OURS) as service:
        start = time.monotonic()
        for stretch in range(stretches):
            until = start + seconds * (stretch + 1) / stretches

            def client(until: float = until) -> None:
                while time.monotonic() < until:
                    with tally.lock:
                        number = next(numbers)
                    tally.run(partial(one_request, service, number))

            together(client, CLIENTS)
            time.sleep(IDLE_SECONDS)
            megabytes.append(round(service.megabytes(), 1))
            if stretch == warm_up - 1:
                warm = sum(tally.ends.values())
        took, metrics = time.monotonic() - start, settled(service)
    counted = {status: round(metrics[f'stylefast:requests_total{{status="{status}"}}']) for status in STATUSES}
    growth = max(megabytes[warm_up:]) - megabytes[warm_up - 1]
    return {
        "seconds": round(took, 1),
        "clients": CLIENTS,
        "requests": sum(tally.ends.values()),
        "ends": dict(sorted(tally.ends.items())),
        "server_counted": counted,
        "counts_agree": agree(tally.ends, counted),
        "warm_up_requests": warm,
        "lost": tally.ends["lost"],
        "server_errors": tally.ends[OTHER_ERRORS],
        "wrong": tally.wrong[:10],
        "megabytes": megabytes,
        "growth_megabytes": round(growth, 1),
        "goal_megabytes": MOST_MEGABYTES,
        "passed": not tally.wrong and agree(tally.ends, counted) and growth <= MOST_MEGABYTES,
    }


def agree(ends: Mapping[str, int], counted: Mapping[str, int]) -> bool:
    """Return whether the server counted the requests that clients saw end, each once.

    Those cut off ended in either way, and some malformed ones only in the engine.
    """
    either, made = ends.get("cut off", 0), ends.get("picture", 0) + ends.get("too late to cancel", 0)
    more_made, more_cancelled = counted["completed"] - made, counted["cancelled"] - ends.get("cancelled", 0)
    each_once = more_made >= 0 and more_cancelled >= 0 and more_made + more_cancelled == either
    return each_once and counted["failed"] <= ends.get("malformed", 0)


def one_request(service: Service, number: int) -> str:
    """Send the request of a number, and return how it ended. Raises where that is wrong."""
    draw = random.Random(number)
    fate = draw.random()
    if fate < MALFORMED:
        return refused(service, *draw.choice(BAD_BODIES))
    body = mixed(number)
    body["stylefast"]["steps"] = draw.choice(SHORT)
    if fate < MALFORMED + CANCELLED:
        how = cut_off if draw.random() < 0.5 else cancelled
        return how(service, body, f"soak-{number}", draw.uniform(0.0, LATEST_CANCEL))
    if draw.random() < 0.5:
        stream(service, body).image.load()
    else:
        whole(service, body)
    return "picture"


def whole(service: Service, body: dict[str, Any]) -> None:
    """Send a request without a stream. Raises RefusedError."""
    connection = service.connect()
    try:
        connection.request("POST", PATH, json.dumps({**body, "stream": False, "partial_images": 0}), JSON)
        reply = connection.getresponse()
        content = reply.read()
    finally:
        connection.close()
    if reply.status != 200:
        raise refusal(reply.status, content)
    if len(json.loads(content)["data"]) != 1:
        raise RuntimeError("a reply has not one picture")


def refused(service: Service, content: bytes, headers: dict[str, str]) -> str:
    """Send a malformed body, which must get an envelope with a status below 500. Raises RefusedError otherwise."""
    connection = service.connect()
    try:
        connection.request("POST", PATH, content, headers)
        reply = connection.getresponse()
        error = refusal(reply.status, reply.read())
    finally:
        connection.close()
    if not 400 <= error.status < 500:
        raise error
    return "malformed"


def cancelled(service: Service, body: dict[str, Any], name: str, delay: float) -> str:
    """Cancel a request by its id after a delay; it must end as cancelled, unless it was done before."""
    connection = service.connect()
    try:
        start = time.monotonic()
        connection.request("POST", PATH, json.dumps(body), {**JSON, "x-request-id": name})
        time.sleep(delay)
        other = service.connect()
        other.request("DELETE", f"/v1/images/{name}")
        reply = other.getresponse()
        answer = json.loads(reply.read())
        other.close()
        try:
            read_stream(connection.getresponse(), start)
        except RefusedError as error:
            if error.code != "request_cancelled":
                raise
            return "cancelled"
        if answer.get("cancelled"):
            raise RuntimeError("a picture came after its request was cancelled")
        # 404: the request was not there yet
        return "too late to cancel" if reply.status == 200 else "picture"
    finally:
        connection.close()


def cut_off(service: Service, body: dict[str, Any], name: str, delay: float) -> str:
    """Close the connection after a delay, as a client does that leaves; the request must be over soon."""
    connection = service.connect()
    connection.request("POST", PATH, json.dumps(body), {**JSON, "x-request-id": name})
    time.sleep(delay)
    connection.close()
    closed = time.monotonic()
    while time.monotonic() < closed + 60:
        status, content = service.get(f"/v1/images/{name}")
        if status == 200 and json.loads(content)["status"] in STATUSES:
            return "cut off"
        if status == 404 and time.monotonic() > closed + 15:
            return "cut off before it was read"
        time.sleep(0.1)
    raise RuntimeError("a request whose client has left is not over after a minute")


def settled(service: Service) -> dict[str, float]:
    """Return the metrics once nothing waits or runs."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        metrics = service.metrics()
        if metrics["stylefast:num_requests_waiting"] == metrics["stylefast:num_requests_running"] == 0:
            return metrics
        time.sleep(0.2)
    raise RuntimeError("a minute after the last reply, requests are still on their way")


def crash(before: float = BEFORE, after: float = AFTER) -> dict[str, Any]:
    """Kill the engine's process under load, twice; return how requests ended and how long it took to come back."""
    tally, numbers, errors = Tally(), iter(range(10**9)), Counter[str]()
    back: list[float] = []
    with running(OURS) as service:
        over = threading.Event()

        def client() -> None:
            while not over.is_set():
                with tally.lock:
                    number = next(numbers)
                tally.run(partial(picture_or_error, service, number, errors))

        clients = threading.Thread(target=together, args=(client, CLIENTS))
        clients.start()
        try:
            for _ in range(KILLS):
                time.sleep(before)
                engine = service.engine()
                assert engine is not None, "there is no engine to kill"
                os.kill(engine, signal.SIGKILL)
                killed = time.monotonic()
                while service.ready():
                    time.sleep(0.005)
                while not service.ready():
                    time.sleep(0.02)
                back.append(round(time.monotonic() - killed, 2))
                time.sleep(after)
        finally:
            over.set()
            clients.join()
        metrics = settled(service)
    made = round(metrics["stylefast:images_total"])
    return {
        "clients": CLIENTS,
        "kills": len(back),
        "requests": sum(tally.ends.values()),
        "ends": dict(sorted(tally.ends.items())),
        "errors": dict(sorted(errors.items())),
        "wrong": tally.wrong[:10],
        "pictures_made": made,
        "ready_again_seconds": back,
        "restarts": round(metrics["stylefast:engine_restarts"]),
        # one picture made for each that a client got: none twice
        "passed": not tally.wrong and made == tally.ends["picture"] and len(back) == KILLS,
    }


def picture_or_error(service: Service, number: int, errors: Counter[str]) -> str:
    """Send a request, which must end in one picture, or in an error that says that the engine is gone."""
    try:
        stream(service, mixed(number)).image.load()
    except RefusedError as error:
        if error.code not in ("engine_lost", "starting"):
            raise
        errors[str(error.code)] += 1
        time.sleep(1.0)  # before the next request; the error asks for 5
        return "clear error"
    return "picture"


def starts(count: int = STARTS) -> dict[str, Any]:
    """Return the seconds from the command until the service is ready, its first picture for itself included."""
    seconds = []
    for _ in range(count):
        with running(OURS) as service:
            seconds.append(round(service.seconds, 2))
    median = statistics.median(seconds)
    return {"seconds": seconds, "median": median, "goal_seconds": MOST_START, "passed": max(seconds) <= MOST_START}


def together(work: Callable[[], None], count: int) -> None:
    """Run a function in several threads, and wait for all."""
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
