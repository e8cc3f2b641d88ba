"""What the service keeps under a long mix of requests, cancels and mistakes; and that what is kept would be found."""

import json
import os
import random
import re
import signal
import threading
import time
import uuid
from statistics import median

import pytest

from tests.serving.conftest import WAIT, Server
from tests.serving.test_service import call

CLIENTS = 4
MOST_GROWTH, MOST_SLOPE = 20.0, 1.0  # MB, and MB a minute
STYLES, SIZES = (None, "neon", "chalk"), ("32x32", "64x64", "48x32")


class SoakServer(Server):
    """A server and what its two processes hold."""

    module = "tests.serving.soak_server"

    def held(self):
        """Return open files, threads and tasks once nothing is on its way."""
        self.process.send_signal(signal.SIGUSR1)
        before = self.log.count("tasks ")
        for _ in range(WAIT * 20):
            if self.log.count("tasks ") > before:
                break
            time.sleep(0.05)
        pids = (self.process.pid, self.engine())
        files, threads = ([len(os.listdir(f"/proc/{pid}/{what}")) for pid in pids] for what in ("fd", "task"))
        return {"files": files, "threads": threads, "tasks": int(re.findall(r"tasks (\d+)", self.log)[-1])}

    def resident(self):
        """Return the MB of each process."""
        sizes = []
        for pid in (self.process.pid, self.engine()):
            with open(f"/proc/{pid}/statm") as statm:
                sizes.append(int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        return sizes


def one(server, draw, number):
    """Make one request of the mix; return its status."""
    kind = draw.random()
    own = {"steps": draw.choice((1, 2, 4)), "seed": draw.randrange(99)}
    style = draw.choice(STYLES)
    if style is not None:
        own["style"] = style
    body = {"prompt": draw.choice(("a fish", "a cat")), "size": draw.choice(SIZES), "stylefast": own}
    body["stream"] = draw.random() < 0.2
    headers = {"content-type": "application/json", "x-request-id": number}
    if kind < 0.05:
        return call(server, "POST", "/v1/images/generations", json.dumps(body)[: draw.randrange(60)], headers)[0]
    if kind < 0.15:
        own["steps"] = 40
        threading.Timer(0.05 * draw.random(), call, (server, "DELETE", f"/v1/images/{number}")).start()
    return call(server, "POST", "/v1/images/generations", json.dumps(body), headers)[0]


def soak(server, enough):
    """Let clients work until `enough(requests, seconds)`; return statuses, and (seconds, MB of each process)."""
    statuses, samples, began, over = [], [], time.monotonic(), threading.Event()

    def work(client):
        draw = random.Random(client)
        while not over.is_set():
            statuses.append(one(server, draw, uuid.uuid4().hex))

    clients = [threading.Thread(target=work, args=(i,)) for i in range(CLIENTS)]
    for client in clients:
        client.start()
    while not enough(len(statuses), time.monotonic() - began):
        samples.append((time.monotonic() - began, server.resident()))
        time.sleep(0.25)
    over.set()
    for client in clients:
        client.join()
    return statuses, samples


def growth(samples):
    """Return the MB by which each process grew from the first to the last third, and its slope in MB a minute."""
    third = max(len(samples) // 3, 1)
    found = []
    for process in range(2):
        first, last = (median(sizes[process] for _, sizes in part) for part in (samples[:third], samples[-third:]))
        times, sizes = [at for at, _ in samples], [sizes[process] for _, sizes in samples]
        middle, mean = sum(times) / len(times), sum(sizes) / len(sizes)
        rise = sum((at - middle) * (size - mean) for at, size in zip(times, sizes, strict=True))
        spread = sum((at - middle) ** 2 for at in times) or 1.0
        found.append((last - first, 60 * rise / spread))
    return found


def settled(server):
    """Return what is held, once all connections and threads that end by themselves have ended."""
    found = server.held()
    for _ in range(120):
        time.sleep(0.5)
        before, found = found, server.held()
        if found == before:
            break
    return found


def test_a_soak_of_a_few_hundred_requests_leaves_nothing():
    server = SoakServer("--max-waiting", "1000", words=())
    try:
        server.ready()
        soak(server, lambda requests, seconds: requests >= 150)
        before = settled(server)
        statuses, samples = soak(server, lambda requests, seconds: requests >= 300)
        assert set(statuses) <= {200, 400, 499} and {200, 400} <= set(statuses)
        assert all(grown < MOST_GROWTH for grown, _ in growth(samples)), growth(samples)
        after = settled(server)
        assert after["files"] == before["files"] and after["tasks"] == before["tasks"]
        assert all(now <= then + 1 for now, then in zip(after["threads"], before["threads"], strict=True))
    finally:
        server.kill()


def test_the_detector_finds_a_planted_leak():
    server = SoakServer("--max-waiting", "1000", words=["--leak"])
    try:
        server.ready()
        _, samples = soak(server, lambda requests, seconds: requests >= 600)
        assert growth(samples)[0][0] >= MOST_GROWTH
    finally:
        server.kill()


@pytest.mark.soak
def test_a_soak_of_ten_minutes_leaves_nothing():
    server = SoakServer("--max-waiting", "1000", words=())
    try:
        server.ready()
        soak(server, lambda requests, seconds: seconds > 60)
        before = settled(server)
        statuses, samples = soak(server, lambda requests, seconds: seconds > 600)
        assert set(statuses) <= {200, 400, 499} and {200, 400, 499} <= set(statuses)
        assert all(grown < MOST_GROWTH and slope < MOST_SLOPE for grown, slope in growth(samples)), growth(samples)
        assert settled(server) == before
    finally:
        server.kill()
