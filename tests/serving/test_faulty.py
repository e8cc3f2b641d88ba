"""The service on the real engine, with faults and at chosen steps."""

import hashlib
import json
import os
import random
import signal
import socket
import threading
import time
from functools import partial
from io import BytesIO

import pytest
from PIL import Image

from stylefast.serving.dispatcher import EngineProcess
from tests.serving.bench import bench, together
from tests.serving.conftest import WAIT
from tests.serving.faulty import Switches
from tests.serving.mutator import bodies

STEPS = 8


@pytest.fixture(scope="module")
def switches():
    return Switches()


@pytest.fixture(scope="module")
def running(switches):
    # tests look at what is sent, so nothing waits in the service but for the engine
    with bench(lambda tell: EngineProcess(switches.load(), False, tell), max_running=8, max_waiting=500) as found:
        yield found


def draw(running, seed, steps=4, **more):
    """Return the picture of a request, or its status and error."""
    own = {"steps": steps, "seed": seed, **more.pop("stylefast", {})}
    status, _, body = running.draw(size="64x64", stylefast=own, **more)
    content = json.loads(body)
    return content["data"][0]["b64_json"] if status == 200 else (status, content["error"]["code"])


def pixels(picture):
    """Return what is equal for equal pictures."""
    import base64

    return hashlib.sha256(Image.open(BytesIO(base64.b64decode(picture))).tobytes()).hexdigest()


def connected(running, number, body):
    """Send a request for pictures on a connection that can be closed."""
    content = json.dumps({"prompt": "a fish", **body}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(running.address, timeout=WAIT)
    connection.sendall(
        head.encode() + f"X-Request-Id: {number}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content
    )
    return connection


@pytest.mark.parametrize("k", range(STEPS))
def test_a_client_that_leaves_during_a_step_costs_that_step_and_no_other(running, switches, k):
    running.idle()
    switches.close()
    begun, done = switches.begun.value, switches.steps.value
    try:
        body = {"size": "64x64", "stream": bool(k % 2), "stylefast": {"steps": STEPS}}
        with connected(running, f"left-{k}", body):
            switches.allow(k)
            running.until(lambda: switches.begun.value == begun + k + 1)  # it is in its step
        running.until(lambda: running.service.dispatcher.running == 0)
        assert json.loads(running.call("GET", f"/v1/images/left-{k}")[2])["status"] == "cancelled"
    finally:
        switches.open()
    assert isinstance(draw(running, 1, 1), str)  # which waits for the step in progress
    assert switches.steps.value == done + k + 1 + 1


def test_a_storm_of_cancels_changes_no_bit_of_the_others(running):
    running.idle()
    seeds, statuses, rest = range(4), [], random.Random(5)
    expected = [pixels(draw(running, seed, 6)) for seed in seeds]
    before = {
        name: running.metric(f'requests_total{{status="{name}"}}') for name in ("completed", "failed", "cancelled")
    }
    numbers, over, steady = iter(range(200)), threading.Event(), []

    def storm():
        while (number := next(numbers, None)) is not None:
            name, pause = f"storm-{number}", rest.random() * 0.05

            def cancel(name=name, pause=pause):
                running.until(lambda: running.call("GET", f"/v1/images/{name}")[0] == 200)
                time.sleep(pause)
                running.call("DELETE", f"/v1/images/{name}")

            canceller = threading.Thread(target=cancel)
            canceller.start()
            statuses.append(running.draw({"x-request-id": name}, size="32x32", stylefast={"steps": 30})[0])
            canceller.join()

    def steadily():
        while not over.is_set():
            steady.append([pixels(draw(running, seed, 6)) for seed in seeds])

    beside = threading.Thread(target=steadily)
    beside.start()
    together([storm] * 6)
    over.set()
    beside.join()
    running.idle()
    assert len(statuses) == 200 and set(statuses) <= {200, 499} and 499 in statuses
    assert steady and all(found == expected for found in steady)
    assert running.metric('requests_total{status="cancelled"}') - before["cancelled"] == statuses.count(499)
    drawn = statuses.count(200) + len(seeds) * len(steady)
    assert running.metric('requests_total{status="completed"}') - before["completed"] == drawn
    assert running.metric('requests_total{status="failed"}') == before["failed"]


def test_a_batch_that_finds_no_memory_is_split_and_nobody_notices(running, switches):
    running.idle()
    expected = [pixels(draw(running, seed)) for seed in range(4)]
    switches.full.value = 3
    try:
        switches.close()
        begun = switches.begun.value
        first = threading.Thread(target=draw, args=(running, 9, 1))
        first.start()
        running.until(lambda: switches.begun.value == begun + 1)
        found: list = []
        others = threading.Thread(
            target=lambda: found.extend(together([partial(draw, running, seed) for seed in range(4)]))
        )
        others.start()
        running.until(lambda: running.service.dispatcher.running == 5)
        switches.open()
        for one in (first, others):
            one.join()
        assert [pixels(picture) for picture in found] == expected
        switches.full.value = 1
        assert draw(running, 5) == (503, "out_of_memory")
    finally:
        switches.full.value = 0
        switches.open()
    assert pixels(draw(running, 0)) == expected[0] and switches.left.value == 0


def test_a_picture_that_becomes_nan_fails_alone(running, switches):
    running.idle()
    expected = [pixels(draw(running, seed)) for seed in range(4)]
    switches.close()
    begun = switches.begun.value
    found: list = []
    try:
        first = threading.Thread(target=draw, args=(running, 9, 1))
        first.start()
        running.until(lambda: switches.begun.value == begun + 1)
        others = threading.Thread(
            target=lambda: found.extend(together([partial(draw, running, seed) for seed in range(4)]))
        )
        others.start()
        running.until(lambda: running.service.dispatcher.running == 5)
        time.sleep(0.2)  # until the engine has read all four; it does no harm if it has not
        switches.sick.value = 4
    finally:
        switches.open()
    for one in (first, others):
        one.join()
    sick = [i for i, picture in enumerate(found) if picture == (500, "numerics")]
    assert len(sick) == 1
    assert [pixels(picture) for i, picture in enumerate(found) if i not in sick] == [
        one for i, one in enumerate(expected) if i not in sick
    ]


def test_a_deadline_that_passes_in_the_queue_costs_no_step(running, switches):
    running.idle()
    switches.close()
    begun = switches.begun.value
    try:
        busy = threading.Thread(target=draw, args=(running, 1, 1), kwargs={"n": 8})
        busy.start()
        running.until(lambda: switches.begun.value == begun + 1)
        assert draw(running, 2, 4, stylefast={"deadline": 0.05}) == (504, "deadline_exceeded")
    finally:
        switches.open()
    busy.join()
    running.idle()
    assert switches.begun.value == begun + 1


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_bodies_with_mistakes_are_refused_and_never_fail_otherwise(running, count):
    running.idle()
    stream = BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 199)).save(stream, "PNG")
    wrong, slow = [], []
    lines = iter(bodies(11 + count, count, stream.getvalue()))
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                line = next(lines, None)
            if line is None:
                return
            route, headers, body = line
            began = time.monotonic()
            status, kinds, reply = running.call("POST", route, body, {**headers, "x-stylefast-deadline": "500"})
            # a body may have a short deadline of its own
            failed = status >= 500 and b'"deadline_exceeded"' not in reply
            if failed or b"Traceback" in reply or (status >= 400 and set(json.loads(reply)) != {"error"}):
                wrong.append((status, route, body[:2000], reply[:500]))
            if status >= 400:
                slow.append(time.monotonic() - began)

    together([work] * 4)
    assert wrong == []
    if count == 10_000:  # the figure, on an idle machine
        assert max(slow) < 1


def test_an_engine_that_is_killed_is_replaced_and_the_service_keeps_nothing_of_it():
    own = Switches()
    with bench(lambda tell: EngineProcess(own.load(), False, tell), max_running=1) as running:

        def held():
            names = [one for one in threading.enumerate() if one.name.startswith("stylefast-engine")]
            return len(names), len(os.listdir("/proc/self/fd"))

        before = held()
        own.shut.value = 1
        found: list = []
        drawing = [threading.Thread(target=lambda seed=seed: found.append(draw(running, seed, 2))) for seed in (1, 2)]
        drawing[0].start()
        running.until(lambda: own.begun.value == 1)
        drawing[1].start()
        running.until(lambda: running.service.dispatcher.waiting == 1)
        os.kill(running.engine.pid, signal.SIGKILL)
        drawing[0].join()
        assert found == [(503, "engine_lost")] and running.call("GET", "/readyz")[0] == 503
        own.shut.value = 0
        drawing[1].join()
        assert len(found[1]) > 100 and running.metric("engine_restarts") == 1
        running.until(lambda: held()[0] == before[0] and held()[1] <= before[1])
