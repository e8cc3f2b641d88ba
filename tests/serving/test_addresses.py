"""Pictures by address: off by default, and where they are on, nothing but the open internet is asked."""

import asyncio
import base64
import io
import json
import random
import socket
import sys
import threading
from functools import cache
from types import SimpleNamespace

import pytest
from PIL import Image

from stylefast.errors import InvalidRequest
from stylefast.serving import addresses, app, fields, media
from stylefast.serving.addresses import Fetcher, is_public, parse
from stylefast.serving.replies import ApiError
from stylefast.serving.settings import ServeSettings
from tests.serving.test_service import call, error_of

PUBLIC = "93.184.216.34"


def png(size=(40, 30)):
    stream = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(stream, "PNG")
    return stream.getvalue()


def listening_apart():
    """Return a listening socket on a port that no other server had, whose late clients might come."""
    for port in random.sample(range(20_000, 32_000), 50):
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            continue
    raise AssertionError("no free port")


_connections: list[tuple[int, int]] = []  # (thread, port) of each connection that this process asked for


@cache
def _watch_connections() -> None:
    def note(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            _connections.append((threading.get_ident(), arguments[1][1]))

    sys.addaudithook(note)


@pytest.fixture
def listener():
    """The port of a listening socket on loopback, and a function that tells whether this thread has asked for it.

    Some tests name it as the proxy, which clients in other threads, left by other tests, may then ask too.
    """
    _watch_connections()
    with listening_apart() as listening:
        port, before = listening.getsockname()[1], len(_connections)
        yield port, lambda: (threading.get_ident(), port) in _connections[before:]


def test_a_connection_of_this_thread_is_noticed_and_one_of_another_is_not(listener):
    port, asked = listener
    client = threading.Thread(target=lambda: socket.create_connection(("127.0.0.1", port)).close())
    client.start()
    client.join()
    assert not asked()

    async def connect():
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()

    asyncio.run(connect())
    assert asked()


# with {port} of a listener on loopback
_FORBIDDEN = """
http://127.0.0.1:{port}/a.png http://127.0.0.1/a.png https://127.0.0.1:{port}/ http://localhost:{port}/a.png
http://localhost./a.png http://LOCALHOST:{port}/ http://127.1:{port}/ http://127.0.1:{port}/ http://0:{port}/
http://0.0.0.0:{port}/ http://2130706433:{port}/ http://0x7f000001:{port}/ http://0x7f.0.0.1:{port}/
http://0177.0.0.1:{port}/ http://017700000001:{port}/ http://127.0.0.1.:{port}/ http://[::1]:{port}/ http://[::]:{port}/
http://[::ffff:127.0.0.1]:{port}/ http://[::ffff:7f00:1]:{port}/ http://[::127.0.0.1]:{port}/ http://[fe80::1%25lo]:{port}/
http://[64:ff9b::7f00:1]/ http://[2002:7f00:1::]/ http://[2001:0:7f00:1::]/ http://[fec0::1]/ http://[fd00::1]/
http://169.254.169.254/latest/meta-data/ http://[fd00:ec2::254]/ http://10.0.0.1/ http://172.16.0.1/ http://192.168.0.1/
http://100.64.0.1/ http://224.0.0.1/ http://255.255.255.255/ http://198.18.0.1/ http://240.0.0.1/
http://93.184.216.34@127.0.0.1:{port}/ http://user:pass@127.0.0.1:{port}/ http://127.0.0.1:{port}@93.184.216.34/
http://127.0.0.1%2f@93.184.216.34/ http://%31%32%37.0.0.1:{port}/ http://127.0.0.1%00.example.com:{port}/
http://93.184.216.34:{port}/ http://93.184.216.34:22/ http://93.184.216.34:0/ http://93.184.216.34:99999/
http://127.0.0.1:{port}\\@93.184.216.34/ http:\\\\127.0.0.1:{port}/ http:/127.0.0.1:{port}/ http:127.0.0.1:{port}
http://rebound.example/ http://inside.example/ http://nowhere.example/ http://１２７.0.0.1/ http://127。0。0。1/
file:///etc/passwd gopher://127.0.0.1:{port}/ ftp://127.0.0.1:{port}/ dict://127.0.0.1:{port}/ ldap://127.0.0.1/
javascript:alert(1) jar:http://127.0.0.1:{port}!/ unix:/tmp/x HTTP+UNIX://%2Ftmp%2Fx/ http:// http:///a.png http://[::1/
"""
FORBIDDEN = _FORBIDDEN.split()


def fake(names):
    """Return a resolver of these names, each with its answers one after another."""
    left = {name: list(answers) for name, answers in names.items()}

    async def found(host, port):
        if host == "localhost":
            return ["127.0.0.1", "::1"]
        if host not in left:
            raise socket.gaierror("no such name")
        return left[host].pop(0) if len(left[host]) > 1 else left[host][0]

    return found


def service(fetcher=None, limit=2**20):
    return SimpleNamespace(fetcher=fetcher, settings=SimpleNamespace(body_limit=limit))


def refusal(fetcher, image, limit=2**20):
    """Return the error of a body with a picture by its address."""

    async def ask():
        await app.images_in_json(service(fetcher, limit), {"prompt": "a", "image": image})

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    return caught.value


def test_there_are_enough_forbidden_addresses():
    assert len(FORBIDDEN) >= 60 and len(set(FORBIDDEN)) == len(FORBIDDEN)


@pytest.mark.parametrize("address", FORBIDDEN)
def test_nothing_inside_is_ever_asked(address, listener, monkeypatch):
    port, asked = listener
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    # a name that is private at once, one that is private among others, and one that has none
    names = {"inside.example": [["10.1.2.3"]], "rebound.example": [[PUBLIC, "127.0.0.1"]]}
    for image in (address.format(port=port), {"image_url": address.format(port=port)}):
        error = refusal(Fetcher(resolving=fake(names)), image)
        assert error.status == 400 and error.code == "url_not_allowed" and error.param == "image", error
        assert len(error.message) < 500
    assert not asked()


def test_a_name_that_moves_after_the_check_is_not_followed(listener, monkeypatch):
    port, asked = listener
    connected, names = [], {"rebound.example": [[PUBLIC], ["127.0.0.1"]]}

    async def refuse(host, port, **options):
        connected.append((host, port))
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio, "open_connection", refuse)
    resolving = fake(names)
    error = refusal(Fetcher(resolving=resolving), "http://rebound.example/a.png")
    assert error.code == "url_failed" and connected == [(PUBLIC, 80)]
    error = refusal(Fetcher(resolving=resolving), "http://rebound.example/a.png")
    assert error.code == "url_not_allowed" and connected == [(PUBLIC, 80)]
    assert not asked()


def test_who_answers_is_checked_and_not_only_who_was_asked(listener, monkeypatch):
    port, _ = listener
    really = asyncio.open_connection

    async def elsewhere(host, _, **options):
        assert host == PUBLIC
        return await really("127.0.0.1", port, **options)

    monkeypatch.setattr(asyncio, "open_connection", elsewhere)
    error = refusal(Fetcher(resolving=fake({"moved.example": [[PUBLIC]]})), "http://moved.example/")
    assert error.code == "url_not_allowed"


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822"])
def test_public_addresses(address):
    assert is_public(address)


def test_addresses_have_one_meaning():
    place = parse("HTTPS://Example.COM/a%20b.png?x=1#part")
    assert (place.scheme, place.host, place.port, place.target) == ("https", "example.com", 443, "/a%20b.png?x=1")
    assert parse("http://example.com:443").authority == "example.com:443" and parse("http://example.com").target == "/"
    assert parse("http://[2606:2800:220:1:0:0:0:1]/").authority == "[2606:2800:220:1::1]"


# a server that is reached, since the test declares loopback public


def served(reply, image="http://pictures.example:{port}/a.png", hosts=("pictures.example:{port}",), limit=2**20):
    """Ask for an address of a server that gives these replies by path; return the picture and the requests."""
    requests = []

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        requests.append(head.decode())
        found = reply(head.split()[1].decode()) if callable(reply) else reply
        writer.write(found)
        await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        fetcher = Fetcher(
            [host.format(port=port) for host in hosts],
            resolving=fake(
                {
                    "pictures.example": [["127.0.0.1"]],
                    "inside.example": [["127.0.0.2"]],
                    "two.example": [["127.0.0.3", "127.0.0.3", "127.0.0.1"]],  # nobody listens at the first
                }
            ),
            public=lambda address: address in ("127.0.0.1", "127.0.0.3"),
        )
        async with server:
            return await app.images_in_json(service(fetcher, limit), {"image": [image.format(port=port)]})

    try:
        _, files = asyncio.run(run())
        (found,) = files["image"]
    except ApiError as error:
        return error, requests
    return found, requests


def ok(content, *more):
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(content), *more, b"", content])


def test_a_picture_is_fetched_and_judged_by_its_content():
    found, (head,) = served(ok(png(), b"Content-Type: text/html"))
    assert (found.kind, found.width, found.height) == ("png", 40, 30)
    lines = head.lower().splitlines()
    assert lines[0] == "get /a.png http/1.1" and lines[1].startswith("host: pictures.example:")
    assert not [line for line in lines if line.startswith(("authorization", "cookie", "referer", "x-"))]
    error, _ = served(ok(b"<html>", b"Content-Type: image/png"))
    assert error.code == "invalid_image"


def test_another_address_of_the_host_is_tried_if_the_first_does_not_answer():
    found, _ = served(ok(png()), image="http://two.example:{port}/a.png", hosts=("two.example:{port}",))
    assert found.width == 40


def test_pieces_of_unknown_length_are_counted():
    def chunks(*parts):
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body

    content = png()
    assert served(chunks(content[:50], content[50:]))[0].width == 40
    error, _ = served(chunks(*[bytes(50_000)] * 20), limit=100_000)
    assert error.code == "url_failed" and "more than 100000 bytes" in error.message


@pytest.mark.parametrize(
    "reply, said",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "99999999 bytes, and the limit is"),
        (ok(b"x", b"Content-Encoding: gzip"), "compressed"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "status 404"),
        (b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc", "none that is HTTP"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "none that is HTTP"),
        (b"nonsense\r\n\r\n", "none that is HTTP"),
        (b"", "none that is HTTP"),
    ],
)
def test_replies_that_are_no_picture(reply, said):
    error, _ = served(reply)
    assert error.status == 400 and error.code == "url_failed" and said in error.message, error.message


def test_redirects_are_followed_and_each_is_checked():
    def moves(to, status=b"302 Found"):
        return b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nLocation: " + to + b"\r\n\r\n"

    found, requests = served(lambda path: moves(b"/b.png") if path == "/a.png" else ok(png()))
    assert found.width == 40 and len(requests) == 2
    error, requests = served(lambda path: moves(b"/again" + path[-3:].encode()))
    assert error.code == "url_failed" and len(requests) == addresses.MOST_REDIRECTS + 1
    for to in (
        b"http://inside.example/",
        b"http://127.0.0.2/",
        b"//inside.example/",
        b"file:///etc/passwd",
        b"http://[::1",
    ):
        error, requests = served(moves(to), hosts=("pictures.example:{port}", "inside.example", "127.0.0.2"))
        assert error.code == "url_not_allowed" and len(requests) == 1, (to, error)


def test_only_listed_hosts_are_asked():
    error, requests = served(ok(png()), hosts=("elsewhere.example",))
    assert error.code == "url_not_allowed" and "image_url_hosts" in error.message and not requests
    error, _ = served(ok(png()), hosts=("pictures.example",))
    assert "80 and 443" in error.message
    assert served(ok(png()), hosts=("*.example:{port}",))[0].width == 40
    error, _ = served(ok(png()), hosts=("*.pictures.example:{port}",))
    assert error.code == "url_not_allowed"


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS", 0.2)

    async def run():
        async def silent(reader, writer):
            await reader.read()
            writer.close()

        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        fetcher = Fetcher([f"a.example:{port}"], resolving=fake({"a.example": [["127.0.0.1"]]}), public=bool)
        async with server:
            await fetcher.picture(f"http://a.example:{port}/", "image")

    with pytest.raises(ApiError, match="no reply in time"):
        asyncio.run(run())


def test_a_name_that_takes_long_is_given_up_soon(monkeypatch):
    """Long before the time for the whole picture is over, which never passes here."""
    assert addresses.CONNECT_SECONDS < addresses.SECONDS / 2
    monkeypatch.setattr(addresses, "CONNECT_SECONDS", 0.01)
    monkeypatch.setattr(addresses, "SECONDS", None)

    async def slow(host, port):
        await asyncio.Event().wait()

    assert refusal(Fetcher(resolving=slow), "http://slow.example/").code == "url_failed"


# what bodies say


def test_a_server_that_fetches_nothing_says_so_by_name():
    for image in ("http://example.com/a.png", {"image_url": "https://example.com/a.png"}, {"url": "file:///a"}):
        error = refusal(None, image)
        assert (error.status, error.param, error.code) == (400, "image", "url_not_allowed")
        assert "in base64" in error.message


def test_pictures_in_json_have_several_spellings():
    text = base64.b64encode(png()).decode()
    for entry in (text, f"data:image/png;base64,{text}", {"b64_json": text}, {"url": f"data:,{text}"}):
        assert isinstance(fields.content_of(entry, "image"), media.Upload)
    for entry in (
        "http://a/b",
        {"url": "http://a/b"},
        {"image_url": "http://a/b"},
        {"image_url": {"url": "http://a/b"}},
    ):
        assert fields.content_of(entry, "image") == "http://a/b"
    for entry in ({"file_id": "file-1"}, {}, {"url": "http://a/b", "b64_json": text}, {"url": 7}, {"image_url": {}}, 7):
        with pytest.raises(ApiError):
            fields.content_of(entry, "image")


def test_settings_of_addresses():
    settings = ServeSettings.of({"allow_image_urls": True, "image_url_hosts": "a.example, *.b.example:8080"}, {})
    assert settings.image_url_hosts == ("a.example", "*.b.example:8080")
    found = {"STYLEFAST_SERVE_ALLOW_IMAGE_URLS": "1", "STYLEFAST_SERVE_IMAGE_URL_HOSTS": "a.example"}
    assert ServeSettings.of({}, found).image_url_hosts == ("a.example",)
    for hosts in ("http://a.example", "a.*", "a.example:x", "a b"):
        with pytest.raises(InvalidRequest, match="image_url_hosts has"):
            ServeSettings.of({"allow_image_urls": True, "image_url_hosts": hosts}, {})
    with pytest.raises(InvalidRequest, match="--allow-image-urls too"):
        ServeSettings.of({"image_url_hosts": "a.example"}, {})


def test_a_running_server_refuses_addresses(server):
    body = json.dumps({"prompt": "a", "image": {"image_url": f"{server.url}/a.png"}})
    status, _, reply = call(server, "POST", "/v1/images/edits", body, {"content-type": "application/json"})
    assert status == 400 and error_of(reply)["code"] == "url_not_allowed"
