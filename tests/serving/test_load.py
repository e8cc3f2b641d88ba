"""The service under load and under clients that misbehave, on a stand-in for the engine."""

import json
import logging
import random
import resource
import socket
import threading
import time
from contextlib import ExitStack
from functools import partial
from statistics import median

import openai
import pytest

from stylefast.serving import http
from tests.serving.bench import bench, together
from tests.serving.conftest import WAIT

HEAD = "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIMIT = 64 * 2**10


@pytest.fixture(scope="module")
def small():
    """A service for one picture at a time, with a queue of eight and a limit of 64 KB for bodies."""
    with bench(max_running=1, max_waiting=8, body_limit=LIMIT) as running:
        yield running


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def percentile(values, share):
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def test_nine_of_sixty_four_are_drawn_and_the_others_refused_while_nothing_is(small):
    small.engine.shut()
    found, lock = [], threading.Lock()

    def draw():
        reply = small.draw()
        with lock:
            found.append(reply)

    drawing = [threading.Thread(target=draw) for _ in range(64)]
    for thread in drawing:
        thread.start()
    # the engine stands still: no refusal waits for it
    small.until(lambda: len(found) == 55)
    small.engine.go()
    for thread in drawing:
        thread.join()
    assert sorted(status for status, _, _ in found) == [200] * 9 + [429] * 55
    for status, headers, body in found:
        if status == 429:
            assert 1 <= int(headers["retry-after"]) <= 60 and json.loads(body)["error"]["code"] == "queue_full"


@pytest.mark.soak
def test_refusals_are_quick(small):
    """The figure itself, on an idle machine: 99 of 100 refusals within 50 ms."""
    small.engine.shut()
    waiting = [threading.Thread(target=small.draw) for _ in range(9)]
    for thread in waiting:
        thread.start()
    small.until(lambda: small.service.dispatcher.waiting == 8)
    times = []
    for _ in range(500):
        began = time.perf_counter()
        assert small.draw()[0] == 429
        times.append(time.perf_counter() - began)
    small.engine.go()
    for thread in waiting:
        thread.join()
    assert percentile(times, 0.99) < 0.05


def test_openais_client_comes_again_by_itself_when_the_queue_is_full(small):
    for _ in range(10):  # so that pictures are expected to take no time
        assert small.draw()[0] == 200
    before = refused(small)
    small.engine.shut()
    waiting = [threading.Thread(target=small.draw) for _ in range(9)]
    for thread in waiting:
        thread.start()
    small.until(lambda: small.service.dispatcher.waiting == 8)
    client, found = openai.OpenAI(base_url=small.url + "/v1", api_key="none", timeout=WAIT), []
    thread = threading.Thread(target=lambda: found.append(client.images.generate(prompt="a fish")))
    thread.start()
    small.until(lambda: refused(small) > before)
    small.engine.go()
    for one in (thread, *waiting):
        one.join()
    assert found[0].data[0].b64_json and refused(small) - before <= 2


def refused(running, status="429"):
    page = running.service.metrics.page()[0].decode()
    lines = [line for line in page.splitlines() if "http_replies_total" in line and f'status="{status}"' in line]
    return sum(float(line.split()[-1]) for line in lines)


# bodies


def padded(size):
    body = b'{"prompt": "a fish"}'
    return body + b" " * (size - len(body))


def raw(address, *pieces, hang_up=False):
    """Send pieces, perhaps close our half, and return the status of the first reply and all that comes."""
    with socket.create_connection(address, timeout=WAIT) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            if hang_up:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass
        found = b""
        try:
            while more := connection.recv(65536):
                found += more
        except ConnectionResetError:
            pass
    return int(found.split(b" ")[1]) if found else None, found


@pytest.mark.parametrize("size, status", [(LIMIT, 200), (LIMIT + 1, 413)])
def test_a_body_of_the_limit_is_taken_and_one_byte_more_is_not(small, size, status):
    body = padded(size)
    assert small.call("POST", "/v1/images/generations", body, {"content-type": "application/json"})[0] == status
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, size, 999))
    head = (HEAD + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n").encode()
    assert raw(small.address, head, chunks + b"0\r\n\r\n")[0] == status


def test_a_body_in_crumbs_is_given_up_and_leaves_nothing(small):
    head, crumbs = (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode(), b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"
    before, arrived = resident(), refused(small, "413") + refused(small, "499")
    raw(small.address, head, crumbs)  # whether the reply can be read depends on how much was sent before
    small.until(lambda: refused(small, "413") + refused(small, "499") == arrived + 1)
    status, reply = raw(small.address, head, b"1\r\nx\r\n" * (http.MOST_CRUMBS + 1))
    assert status in (400, None) and (status is None or b"invalid_http" in reply)
    assert small.draw()[0] == 200 and resident() - before < 5 * 2**20


def test_bad_parts_of_a_body_end_it_without_a_trace_in_the_log(small, caplog):
    for status, pieces in ((400, [b"z\r\n"]), (None, [b"3\r\nab"])):
        found = raw(small.address, (HEAD + "Transfer-Encoding: chunked\r\n\r\n").encode(), *pieces, hang_up=not status)
        assert found[0] == status or found[0] is None
    # after the reply to a head alone, too
    head = HEAD.replace("application/json", "text/plain") + "Transfer-Encoding: chunked\r\n\r\n"
    raw(small.address, head.encode(), b"1\r\nx\r\n" * 10, b"z\r\n")
    small.idle()
    assert small.draw()[0] == 200 and not [record for record in caplog.records if record.exc_info]


def test_a_length_that_lies_harms_nobody(small):
    body = b'{"prompt": "a fish"}'
    more = raw(small.address, (HEAD + f"Content-Length: {len(body)}\r\n\r\n").encode(), body, b"and more\r\n\r\n")
    assert more[0] == 200 and b"HTTP/1.1 400" in more[1] and b"invalid_http" in more[1]
    for length in ("-1", "1e3", "0x10", "9" * 30, "1, 2"):
        status, reply = raw(
            small.address, (HEAD + f"Connection: close\r\nContent-Length: {length}\r\n\r\n").encode(), body
        )
        assert status in (400, 413) and b'"error"' in reply, length
    running = small.service.dispatcher.running
    status, _ = raw(small.address, (HEAD + "Content-Length: 100\r\n\r\n").encode(), body, hang_up=True)
    assert status is None or status >= 400
    assert small.service.dispatcher.running == running and small.draw()[0] == 200


def test_packed_bodies_are_not_unpacked(small):
    for name in ("gzip", "deflate", "br", "gzip, gzip"):
        status, _, body = small.call(
            "POST",
            "/v1/images/generations",
            bytes(1000),
            {"content-type": "application/json", "content-encoding": name},
        )
        assert status == 415 and json.loads(body)["error"]["code"] == "unsupported_encoding"


# connections


@pytest.mark.soak
def test_a_hundred_slow_clients_do_not_slow_down_the_others(small):
    """Half of them are slow with their head, half with their body; all are closed within half a minute."""

    def usual():
        times = []
        for _ in range(50):
            began = time.perf_counter()
            assert small.draw()[0] == 200
            times.append(time.perf_counter() - began)
        return median(times)

    alone, began = usual(), time.monotonic()
    with ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(small.address)) for _ in range(100)]
        for i, one in enumerate(slow):
            one.sendall((HEAD + "Content-Length: 1000\r\n\r\n").encode() if i % 2 else b"POST ")
        times, closed = [], set()
        while len(closed) < len(slow) and time.monotonic() - began < 60:
            for one in slow:
                try:
                    one.sendall(b"x")
                    one.setblocking(False)
                    while one.recv(1000):
                        pass  # the reply, 408
                    closed.add(one)
                except BlockingIOError:
                    pass
                except OSError:
                    closed.add(one)
                finally:
                    one.setblocking(True)
            if not closed:
                times.append(usual())
            time.sleep(1)
        assert len(closed) == len(slow) and time.monotonic() - began < 35
    assert median(times) < 2 * alone


@pytest.mark.soak
def test_ten_thousand_silent_connections(small):
    count, (soft, hard) = 10_000, resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(count, (hard - 500) // 2)  # both ends are in this process
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        before = resident()
        with ExitStack() as stack:
            for i in range(count):
                stack.enter_context(socket.create_connection(small.address))
                if i % 500 == 0:
                    assert small.draw()[0] == 200
            assert small.draw()[0] == 200
            print(f"{(resident() - before) / count / 2**10:.0f} KB for each of {count} connections")
        small.until(lambda: small.draw()[0] == 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_silent_connections_take_nothing_from_the_others(small):
    with ExitStack() as stack:
        for _ in range(500):
            stack.enter_context(socket.create_connection(small.address))
        assert small.draw()[0] == 200


# clients that leave


def leave(running, body, number, when=lambda: True):
    """Send a request, and leave once `when` is true."""
    body = json.dumps({"prompt": "a fish", **body}).encode()
    with socket.create_connection(running.address, timeout=WAIT) as connection:
        head = HEAD + f"X-Request-Id: {number}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        running.until(when)


def state(running, number):
    status, _, body = running.call("GET", f"/v1/images/{number}")
    return json.loads(body)["status"] if status == 200 else None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_gives_its_place_to_the_next(small, stream, begun):
    small.idle()
    small.engine.shut()
    number = f"left-{stream}-{begun}"
    if begun:
        leave(small, {"stream": stream}, number, lambda: small.service.dispatcher.running == 1)
    else:
        leave(small, {"stream": stream}, number)
    small.until(lambda: state(small, number) == "cancelled" or (not begun and state(small, number) is None))
    small.engine.go()
    small.idle()
    assert small.draw()[0] == 200


def test_a_client_that_leaves_does_not_end_the_one_that_repeats_it(small):
    """The first connection breaks, and the client's library sends the request again before the server has noticed."""
    small.idle()
    small.engine.shut()
    headers, found = {"idempotency-key": "repeated"}, []
    again = threading.Thread(target=lambda: found.append(small.draw(headers)))
    body = json.dumps({"prompt": "a fish"}).encode()
    with socket.create_connection(small.address, timeout=WAIT) as connection:
        head = HEAD + f"X-Request-Id: first\r\nIdempotency-Key: repeated\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        small.until(lambda: small.service.dispatcher.running == 1)
        again.start()
        ticket = small.service.register.find("first", None)
        small.until(lambda: ticket.askers == 2)
    small.until(lambda: ticket.askers == 1)
    small.engine.go()
    again.join()
    assert found[0][0] == 200 and small.engine.runs and state(small, "first") == "completed"


def test_pictures_are_gone_once_they_were_sent(small):
    for number, body in (("plain", {}), ("streamed", {"stream": True, "partial_images": 1})):
        assert small.draw({"x-request-id": number}, **body)[0] == 200
        ticket = small.service.register.find(number, None)
        small.until(lambda ticket=ticket: not ticket.askers)
        assert ticket.status == "completed" and not ticket.pictures and not ticket.call
    small.engine.shut()
    own = {"stylefast": {"on_disconnect": "continue"}, "stream": True}
    leave(small, own, "stays", lambda: small.service.dispatcher.running == 1)
    ticket = small.service.register.find("stays", None)
    small.until(lambda: not ticket.askers)
    small.engine.go()
    small.until(lambda: ticket.over)
    assert ticket.status == "completed" and not ticket.pictures


def test_many_pictures_at_once_reach_their_clients_whatever_is_kept_for_repeats(monkeypatch):
    """What is being sent is not what is kept, which has a limit."""
    with bench(max_running=64) as running:
        running.service.register._most_bytes = 1
        replies = together([partial(running.draw, n=4) for _ in range(8)])
        assert [len(json.loads(body)["data"]) for _, _, body in replies] == [4] * 8


# counting


def test_all_that_was_accepted_is_accounted_for():
    draw, statuses, ids = random.Random(3), [], []
    with bench(max_running=4, max_waiting=10) as running:
        dispatcher = running.service.dispatcher

        def one(number, body):
            statuses.append(running.draw({"x-request-id": number}, **body)[0])

        for block in range(50):
            running.engine.shut()
            threads, before = [], len(statuses)
            for i in range(20):
                own = {"steps": draw.choice((1, 2, 5)), **({"deadline": 0.01} if draw.random() < 0.1 else {})}
                body = {"n": draw.choice((1, 1, 2)), "stylefast": own}
                if draw.random() < 0.05:
                    body["prompt"] = 1
                ids.append(f"r{block}-{i}")
                threads.append(threading.Thread(target=one, args=(ids[-1], body)))
                threads[-1].start()
            running.until(lambda before=before: len(statuses) - before + dispatcher.running + dispatcher.waiting >= 20)
            for number in draw.sample(ids[-20:], 3):
                running.call("DELETE", f"/v1/images/{number}")
            running.engine.go()
            for thread in threads:
                thread.join()
        running.idle()
        ended = {
            name: running.metric(f'requests_total{{status="{name}"}}') for name in ("completed", "failed", "cancelled")
        }
        assert len(statuses) == 1000 and set(statuses) == {200, 400, 429, 499, 504}
        assert ended["completed"] == statuses.count(200) and ended["cancelled"] == statuses.count(499)
        assert ended["failed"] == statuses.count(504)
        for name, count in ended.items():
            assert running.metric(f'request_latency_seconds_count{{status="{name}"}}') == count
        assert running.metric("num_requests_running") == running.metric("num_requests_waiting") == 0
        assert running.metric("queue_time_seconds_count") == running.engine.runs


def test_nothing_secret_is_written(caplog):
    key, prompt, picture = "k" * 20, "a secret fish", "iVBORw0KGgo" + "A" * 500
    caplog.set_level(logging.INFO)
    with bench(api_keys=[f"alice:{key}"], admin_keys=["root:" + "a" * 20]) as running:
        who = {"authorization": f"Bearer {key}", "x-request-id": "number-7"}
        assert running.draw(who, user="someone")[0] == 200
        assert running.draw({**who, "x-request-id": "number-8"}, prompt=prompt, stylefast={"style": picture})[0] == 400
        body = json.dumps({"prompt": prompt, "image": picture})
        reply = running.call("POST", "/v1/images/edits", body, {**who, "content-type": "application/json"})
        assert reply[0] == 400
        assert running.call("GET", f"/v1/models?key={key}&prompt={prompt.replace(' ', '+')}", headers=who)[0] == 200
        assert running.call("GET", f"/{key}", headers=who)[0] == 404
        page = running.call("GET", "/metrics", headers=who)[2].decode()
    log = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("stylefast"))
    assert "number-7" in log and "number-8" in log and "alice" in log
    for secret in (key, "secret", "someone", "AAAA"):
        assert secret not in log and secret not in page
