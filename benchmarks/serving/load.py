"""Admission under load: Poisson arrivals at three servers of one model, in turns.

The servers are ours, ours with one picture at a time (`--max-running 1`), and the published methods on diffusers
behind a lock (`published.py`). All run from the start. Before anything is timed, ours and the peer must draw the same
pictures.
"""

import random
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.serving.mix import STYLES, body, mixed
from benchmarks.serving.service import OURS, PEER, RefusedError, Reply, Service, running, stream

SHARED, ALONE, PUBLISHED = "steps shared", "one at a time", "diffusers behind a lock"
KINDS: dict[str, tuple[str, ...]] = {
    SHARED: (*OURS, "--max-running", "8"),
    ALONE: (*OURS, "--max-running", "1"),
    PUBLISHED: PEER,
}
LOADS = (0.5, 0.8, 1.1)
CLIENTS = 16
SECONDS = 10.0  # of measuring how much the server can do
# largest difference of a colour, of 255, between our picture and the peer's: both round the same number, give or take
# what fp32 makes of another order of sums
MOST_LEVELS = 1
RESAMPLES = 2000
# percentile -> its share, and how many values it takes to show it
PERCENTILES = {"p50": (0.5, 1), "p95": (0.95, 60), "p99": (0.99, 300)}


def load(count: int) -> dict[str, Any]:
    """Return latencies of all servers at all loads, each with `count` requests."""
    with ExitStack() as stack:
        services = {kind: stack.enter_context(running(command)) for kind, command in KINDS.items()}
        compared = same_pictures(services)  # also the first use of every style and size
        most = capacity(services[SHARED], SECONDS)
        kinds: dict[str, Any] = {kind: {"by_load": {}} for kind in services}
        for turn, share in enumerate(LOADS):
            order = [*services][turn:] + [*services][:turn]
            for kind in order:
                kinds[kind]["by_load"][str(share)] = latencies(services[kind], share * most, count)
    return {
        "requests": count,
        "clients": CLIENTS,
        "capacity": round(most, 3),
        "loads": LOADS,
        "same_pictures": compared,
        "kinds": kinds,
    }


def same_pictures(services: Mapping[str, Service]) -> dict[str, Any]:
    """Return the largest difference in levels between the pictures of the first server and of the others, by style.

    Raises SystemExit where it is more than `MOST_LEVELS`: then they would not do the same work.
    """
    found = {}
    for style in STYLES:
        asked = [body(style, "a fish", "64x64", 8, 7.5, 3), body(style, "a cat", "96x64", 4, 1.0, 4)]
        found[style] = 0
        for one in asked:
            first, *others = (stream(service, one) for service in services.values())
            found[style] = max(found[style], *(apart(first, other) for other in others))
        if found[style] > MOST_LEVELS:
            raise SystemExit(
                f"with the style {style!r}, pictures of {', '.join(services)} differ by {found[style]} of 255; at most "
                f"{MOST_LEVELS} is rounding, so their times would say nothing"
            )
    return {"most_levels": MOST_LEVELS, "levels": found}


def apart(one: Reply, other: Reply) -> int:
    """Return the largest difference of two pictures' colours, of 255; 255 for pictures of different sizes."""
    first, second = (np.asarray(reply.image.convert("RGB")).astype(int) for reply in (one, other))
    return int(np.abs(first - second).max()) if first.shape == second.shape else 255


def capacity(service: Service, seconds: float) -> float:
    """Return the requests a second that clients get who always wait for the reply."""
    until, done = time.monotonic() + seconds, [0] * CLIENTS

    def work(number: int) -> None:
        while time.monotonic() < until:
            stream(service, mixed(10_000 * (number + 1) + done[number]))
            done[number] += 1

    start = time.monotonic()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.monotonic() - start)


def latencies(service: Service, rate: float, count: int) -> dict[str, Any]:
    """Send requests at random times, `rate` a second on average; return their times in seconds."""
    draw, threads = random.Random(7), []
    found: list[Reply] = []
    refused: list[str] = []

    def one(seed: int) -> None:
        try:
            found.append(stream(service, mixed(seed)))
        except (RefusedError, RuntimeError, OSError) as error:
            refused.append(str(error))

    start, due = time.monotonic(), 0.0
    for seed in range(count):
        due += draw.expovariate(rate)
        time.sleep(max(0.0, start + due - time.monotonic()))
        threads.append(threading.Thread(target=one, args=(seed,)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    took = time.monotonic() - start
    return {
        "rate": round(rate, 3),
        "requests": count,
        "pictures_a_second": round(len(found) / took, 3),  # what the server can do, if that is less than the rate
        "refused": len(refused),
        "errors": refused[:3],
        "previews": sum(reply.first is not None for reply in found),
        # without a preview, the picture is the first that is seen
        "to_preview": percentiles([reply.last if reply.first is None else reply.first for reply in found]),
        "to_picture": percentiles([reply.last for reply in found]),
    }


def percentiles(values: Sequence[float]) -> dict[str, Any]:
    """Return the percentiles that so many values can show, each with the middle 95 % of it in resampled values."""
    ordered = np.sort(np.asarray(values, dtype=float))
    if not len(ordered):
        return {}
    resampled = np.sort(np.random.default_rng(0).choice(ordered, (RESAMPLES, len(ordered))), axis=1)
    found: dict[str, Any] = {}
    for name, (share, least) in PERCENTILES.items():
        if len(ordered) >= least:
            place = min(int(share * len(ordered)), len(ordered) - 1)
            low, high = np.quantile(resampled[:, place], (0.025, 0.975))
            found[name] = round(float(ordered[place]), 3)
            found[f"{name}_between"] = [round(float(low), 3), round(float(high), 3)]
    return found
