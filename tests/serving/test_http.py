"""Connections that say nothing, too little, or no HTTP."""

import json
import socket
import threading
import time

import pytest
import uvicorn

from stylefast.serving import http
from tests.serving.conftest import WAIT


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.2)

    async def app(scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    config = uvicorn.Config(app, port=0, http=http.Protocol, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def talk(address, *pieces, pause=0.0):
    """Send pieces, and return what comes until the connection is closed."""
    with socket.create_connection(address, timeout=WAIT) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        found = b""
        try:
            while more := connection.recv(65536):
                found += more
        except ConnectionResetError:  # the rest of what was sent stays unread
            pass
        return found


def test_a_silent_connection_is_closed(address):
    assert talk(address) == b""


def test_half_a_head_is_not_waited_for(address):
    assert talk(address, b"GET / HTTP/1.1\r\nHost") == b""


def test_neither_is_the_second_request_of_a_connection(address):
    reply = talk(address, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTT")
    assert reply.startswith(b"HTTP/1.1 200") and reply.count(b"HTTP/1.1") == 1


def test_a_body_may_take_longer_than_a_head(address):
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"
    assert talk(address, head, b"ab", b"cd", pause=0.3).endswith(b"\r\n\r\nabcd")


def test_what_is_no_http_gets_the_envelope(address):
    reply = talk(address, b"\x16\x03\x01 hello\r\n\r\n")
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"


def test_a_huge_head_is_not_read_to_its_end(address):
    reply = talk(address, b"GET / HTTP/1.1\r\nHost: x\r\n", b"X: " + b"a" * 200_000)
    assert reply == b"" or (reply.startswith(b"HTTP/1.1 400") and b"invalid_http" in reply)
