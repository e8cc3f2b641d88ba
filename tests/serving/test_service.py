"""The service around the pictures: keys, limits, health, signals, and an engine that dies."""

import base64
import http.client
import json
import os
import signal
import socket
import threading
import time
from urllib.parse import urlsplit

import openai
import pytest

from stylefast import cli
from tests.serving.conftest import WAIT, Server, serving

KEYS = {"STYLEFAST_SERVE_API_KEYS": "alice:0123456789abcdef,bob:fedcba9876543210"}
KEYS |= {"STYLEFAST_SERVE_ADMIN_KEYS": "root:0000111122223333"}
OPEN = {"/livez", "/readyz", "/health", "/version"}


def call(server, method, path, body=None, headers=None):
    """Return status, headers and body of a request."""
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=WAIT)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def error_of(body):
    """Return the error in an envelope, which must be whole."""
    found = json.loads(body)
    assert set(found) == {"error"} and set(found["error"]) == {"message", "type", "param", "code"}, found
    return found["error"]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/images/generations", 405),
        ("DELETE", "/v1/images/unknown", 404),
        ("GET", "/v1/images/unknown", 404),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/v1/models/other", 404),
    ],
)
def test_the_frameworks_own_errors_have_the_envelope(server, method, path, status):
    found, _, body = call(server, method, path)
    assert found == status and error_of(body)["message"]


@pytest.mark.parametrize(
    "body, headers, status, code",
    [
        (b"{", {}, 400, "invalid_json"),
        (b"[1]", {}, 400, "invalid_json"),
        (b'{"prompt": NaN}', {}, 400, "invalid_json"),
        (b'{"prompt": "a", "prompt": "b"}', {}, 400, "invalid_json"),
        (b"\xff\xfe", {}, 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', {}, 400, "invalid_request"),
        (b"[" * 200_000, {}, 400, "invalid_json"),
        (b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b"{}", {"content-encoding": "gzip"}, 415, "unsupported_encoding"),
        (b"{}", {"x-stylefast-deadline": "soon"}, 400, "invalid_request"),
        (b'{"prompt": "a"}', {"x-request-id": "a b"}, 400, "invalid_request"),
    ],
)
def test_bodies_and_headers_that_are_wrong(server, body, headers, status, code):
    headers = {"content-type": "application/json", **headers}
    found, _, reply = call(server, "POST", "/v1/images/generations", body, headers)
    if code == "invalid_request" and body == b"{}":
        body = b'{"prompt": "a fish"}'
        found, _, reply = call(server, "POST", "/v1/images/generations", body, headers)
    assert found == status and error_of(reply)["code"] == code, reply


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", "/v1/images/generations", "POST"),
        ("DELETE", "/v1/images/edits", "POST"),
        ("OPTIONS", "/v1/images/edits", "POST"),
        ("PUT", "/v1/models", "GET"),
        ("PUT", "/v1/images/mine", "GET, DELETE"),
        ("PUT", "/sdapi/v1/options", "GET, POST"),
        ("PUT", "/v1/styles", "GET, POST"),
        ("POST", "/", "GET, HEAD"),
    ],
)
def test_a_wrong_method_says_which_are_right(server, method, path, allowed):
    status, headers, body = call(server, method, path)
    assert status == 405 and error_of(body)["code"] == "method_not_allowed" and headers["allow"] == allowed


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_an_idempotency_key_is_neither_empty_nor_cut(server, key):
    headers = {"content-type": "application/json", "idempotency-key": key}
    status, _, body = call(server, "POST", "/v1/images/generations", b'{"prompt": "a fish"}', headers)
    assert status == 400 and error_of(body)["param"] == "idempotency-key"


def test_json_with_pictures_may_be_as_large_as_any_body_but_not_consist_of_brackets(server):
    headers = {"content-type": "application/json"}
    text = base64.b64encode(bytes(17 * 2**20)).decode()
    body = json.dumps({"prompt": "a fish", "image": text})
    status, _, reply = call(server, "POST", "/v1/images/edits", body, headers)
    assert status == 400 and error_of(reply)["code"] == "invalid_image"
    for inside in ("[]," * 600_000, '{"a":{}},' * 300_000):
        body = f'{{"prompt": "a fish", "stylefast": [{inside}0]}}'
        status, _, reply = call(server, "POST", "/v1/images/generations", body, headers)
        assert status == 400 and "commas and brackets" in error_of(reply)["message"]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/images/generations", '{"prompt": "a fish", "user": "\\ud83d"}'),
        ("/sdapi/v1/txt2img", '{"prompt": "a fish", "force_task_id": "\\uDE00"}'),
        ("/v1/images/generations", '{"prompt": "a fish", "n": 1, "moderation": null, "\\ud800": 1}'),
    ],
)
def test_half_of_a_character_is_refused_wherever_it_stands(server, path, body):
    status, _, reply = call(server, "POST", path, body, {"content-type": "application/json"})
    assert status == 400 and "half of a character" in error_of(reply)["message"]


def test_both_halves_of_a_character_are_one(server):
    body = '{"prompt": "a fish", "user": "\\ud83d\\ude00", "stylefast": {"steps": 1}}'
    status, _, reply = call(server, "POST", "/v1/images/generations", body, {"content-type": "application/json"})
    assert status == 200 and json.loads(reply)["safety_identifier"] == "\U0001f600"


@pytest.mark.parametrize(
    "path, own, param",
    [
        ("/v1/images/generations", {"stylefast": {"style": ["neon"] * 17}}, "style"),
        ("/v1/images/generations", {"model": "tiny/neon", "stylefast": {"style": ["neon"] * 16}}, "style"),
        ("/sdapi/v1/txt2img", {"styles": ["neon"] * 17}, "styles"),
        ("/v1/images/generations", {"steps": 2, "num_inference_steps": 3}, "num_inference_steps"),
    ],
)
def test_too_many_styles_and_two_names_for_one_thing_are_refused(server, path, own, param):
    body = json.dumps({"prompt": "a fish", **own})
    status, _, reply = call(server, "POST", path, body, {"content-type": "application/json"})
    assert status == 400 and error_of(reply)["param"] == param


def test_an_error_about_pictures_of_the_model_names_no_path_of_the_server(server):
    style = {"kind": "InstantStyle", "image": ["neon"] * 2000}
    body = json.dumps({"prompt": "a fish", "stylefast": {"style": style}})
    status, _, reply = call(server, "POST", "/v1/images/generations", body, {"content-type": "application/json"})
    assert status == 400 and "2000 pictures" in error_of(reply)["message"] and "/references" not in str(reply)


def form(*parts, charset=""):
    """Return the headers and the body of a form, of pairs of bytes."""
    lines = [b'--x\r\ncontent-disposition: form-data; name="%s"\r\n\r\n%s\r\n' % part for part in parts]
    return {"content-type": f"multipart/form-data; boundary=x{charset}"}, b"".join(lines) + b"--x--\r\n"


def test_texts_of_a_form_are_utf8(server):
    for parts in ([(b"prompt", b"a caf\xe9")], [(b"pr\xe9", b"a fish")]):
        headers, body = form(*parts)
        status, _, reply = call(server, "POST", "/v1/images/edits", body, headers)
        assert status == 400 and "not UTF-8" in error_of(reply)["message"]
    headers, body = form((b"quality", "\u00e9".encode()), (b"prompt", b"a fish"), charset="; charset=UTF-8")
    status, _, reply = call(server, "POST", "/v1/images/edits", body, headers)
    assert status == 400 and error_of(reply)["code"] == "missing_image"


def test_no_charset_of_a_form_holds_the_server_up(server):
    """Python takes two minutes for a megabyte in punycode, which a text in a form may have."""
    for charset in ("punycode", '"punycode"', "utf-16", "idna"):
        headers, body = form((b"prompt", b"a-" + b"b" * 200_000), charset=f"; charset={charset}")
        began = time.monotonic()
        status, _, reply = call(server, "POST", "/v1/images/edits", body, headers)
        assert status == 415 and error_of(reply)["code"] == "unsupported_media_type"
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "headers, code",
    [
        ({"origin": "https://elsewhere.example"}, "origin_not_allowed"),
        ({"origin": "null"}, "origin_not_allowed"),
        ({"host": "elsewhere.example"}, "host_not_allowed"),
        ({"host": "elsewhere.example:8000", "origin": "http://elsewhere.example:8000"}, "host_not_allowed"),
        ({"host": "[::1"}, "host_not_allowed"),
    ],
)
def test_pages_of_other_sites_do_not_reach_a_server_without_keys(server, headers, code):
    for method, path in (("POST", "/v1/images/edits"), ("GET", "/v1/models"), ("POST", "/sdapi/v1/interrupt")):
        status, _, reply = call(server, method, path, headers=headers)
        assert status == 403 and error_of(reply)["code"] == code, reply
    own = urlsplit(server.url).netloc
    assert call(server, "GET", "/v1/models", headers={"origin": f"http://{own}"})[0] == 200
    assert call(server, "GET", "/livez", headers=headers)[0] == 200


def test_a_stream_tells_proxies_not_to_hold_it_back(server):
    body = json.dumps({"prompt": "a fish", "stream": True, "stylefast": {"steps": 1}})
    headers = {"content-type": "application/json"}
    status, found, _ = call(server, "POST", "/v1/images/generations", body, headers)
    assert status == 200 and found["cache-control"] == "no-cache" and found["x-accel-buffering"] == "no"


def test_damaged_forms_and_files(server):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for body in (b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--"):
        status, _, reply = call(server, "POST", "/v1/images/edits", body, headers)
        assert status == 400 and error_of(reply)
    part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nnothing\r\n--x--\r\n'
    status, _, reply = call(server, "POST", "/v1/images/edits", part, headers)
    assert status == 400 and error_of(reply)["code"] == "invalid_image"


def test_health_metrics_and_the_document(server):
    assert call(server, "GET", "/livez")[0] == call(server, "GET", "/readyz")[0] == 200
    assert json.loads(call(server, "GET", "/version")[2])["version"]
    page = call(server, "GET", "/metrics")[2].decode()
    assert "stylefast:num_requests_waiting 0.0" in page and "stylefast:requests_total" in page
    paths = json.loads(call(server, "GET", "/openapi.json")[2])["paths"]
    assert "/v1/images/generations" in paths and "/v1/images/edits" in paths


def test_metrics_have_no_labels_of_what_requests_say(server):
    def count():
        return call(server, "GET", "/metrics")[2].count(b"\n")

    call(server, "GET", "/nothing/0")
    call(
        server, "POST", "/v1/images/generations", b'{"prompt": "a", "model": "m"}', {"content-type": "application/json"}
    )
    before = count()
    for i in range(50):
        call(server, "GET", f"/nothing/{i}")
        body = json.dumps({"prompt": "a", "model": f"m{i}", "style": f"s{i}"})
        call(server, "POST", "/v1/images/generations", body, {"content-type": "application/json"})
    assert count() == before


def test_a_client_that_leaves_cancels_its_request(server):
    place, body = urlsplit(server.url), json.dumps({"prompt": "a fish", "stylefast": {"steps": 900}}).encode()
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = ["POST /v1/images/generations HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        head += ["X-Request-Id: gone", f"Content-Length: {len(body)}", "", ""]
        connection.sendall("\r\n".join(head).encode() + body)
        while not json.loads(server.get("/v1/images/gone")[1]).get("step"):
            time.sleep(0.01)
    for _ in range(WAIT * 100):
        if (shown := json.loads(server.get("/v1/images/gone")[1]))["status"] == "cancelled":
            break
        time.sleep(0.01)
    assert shown["status"] == "cancelled" and shown["step"] < 900


def test_a_deadline_of_the_clients_library_ends_a_request(client):
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(
            prompt="a fish", extra_body={"stylefast": {"steps": 900}}, extra_headers={"x-stylefast-deadline": "1"}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")


def test_prompts_stay_out_of_the_log(server, client):
    client.images.generate(prompt="a secret fish", extra_body={"steps": 1, "user": "someone"})
    assert "secret" not in server.log and "someone" not in server.log and "/v1/images/generations" in server.log


def test_wrong_settings_are_refused_before_anything_starts(capsys, tmp_path, monkeypatch):
    def refusal(*words):
        assert cli.main(["serve", *words]) == 2
        return capsys.readouterr().err

    assert "there are no API keys" in refusal("--host", "0.0.0.0")
    assert "max_running" in refusal("--max-running", "0")
    (tmp_path / "x.toml").write_text("prot = 1\n")
    assert "did you mean 'port'" in refusal("--config", str(tmp_path / "x.toml"))
    monkeypatch.setenv("STYLEFAST_SERVE_API_KEYS", "short")
    assert "fewer than 16 characters" in refusal() and "short" not in refusal()
    monkeypatch.delenv("STYLEFAST_SERVE_API_KEYS")
    monkeypatch.setenv("STYLEFAST_SERVE_PROT", "1")
    assert "STYLEFAST_SERVE_PROT is no setting" in refusal()


def test_a_model_that_is_not_there_ends_the_server_with_its_message():
    server = Server("--model", "no/such-model-here")
    try:
        assert server.process.wait(WAIT) == 1
        server._reader.join(WAIT)
        assert "no/such-model-here" in server.log and "Traceback" not in server.log
    finally:
        server.kill()


def test_every_route_but_the_open_ones_needs_a_key():
    with serving(env=KEYS) as server:
        paths = json.loads(
            call(server, "GET", "/openapi.json", headers={"authorization": "Bearer 0123456789abcdef"})[2]
        )["paths"]
        wanted = [(method.upper(), path) for path, methods in paths.items() for method in methods]
        wanted += [("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/nothing"), ("PUT", "/v1/models")]
        wrong = ("", "Bearer", "Bearer ", "Bearer 0123456789abcde", "Bearer 0123456789ABCDEF", "Basic eDp5", "Digest x")
        for method, path in wanted:
            for header in wrong:
                status, headers, body = call(server, method, path, headers={"authorization": header} if header else {})
                assert status == 401 and error_of(body)["code"] == "invalid_api_key", (method, path, header)
                assert headers["www-authenticate"] == "Bearer"
        for path in OPEN:
            assert call(server, "GET", path)[0] == 200
        alice = openai.OpenAI(base_url=server.url + "/v1", api_key="0123456789abcdef", max_retries=0)
        bob = openai.OpenAI(base_url=server.url + "/v1", api_key="fedcba9876543210", max_retries=0)
        reply = alice.images.generate(prompt="a fish", extra_body={"steps": 1})
        assert alice.get(f"/images/{reply._request_id}", cast_to=object)["status"] == "completed"
        with pytest.raises(openai.NotFoundError):
            bob.get(f"/images/{reply._request_id}", cast_to=object)
        assert "0123456789abcdef" not in server.log and "alice" in server.log


def test_draining_at_sigterm():
    with serving("--grace", "3000") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        replies, started = [], threading.Semaphore(0)

        def draw(i):
            started.release()
            try:
                replies.append(
                    client.images.generate(
                        prompt="a fish", extra_body={"steps": 60}, extra_headers={"x-request-id": f"r{i}"}
                    )
                )
            except openai.APIError as error:
                replies.append(error)

        drawing = [threading.Thread(target=draw, args=(i,)) for i in range(10)]
        for thread in drawing:
            thread.start()
        while not all(server.get(f"/v1/images/r{i}")[0] == 200 for i in range(10)):
            time.sleep(0.01)
        engine = server.engine()
        server.process.send_signal(signal.SIGTERM)
        for _ in range(WAIT * 100):
            if server.get("/readyz")[0] == 503:
                break
            time.sleep(0.01)
        assert server.get("/livez")[0] == 200
        with pytest.raises(openai.InternalServerError) as caught:
            client.images.generate(prompt="a cat")
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        for thread in drawing:
            thread.join()
        assert [getattr(reply, "data", reply) for reply in replies if isinstance(reply, Exception)] == []
        assert server.process.wait(WAIT) == 0 and "Traceback" not in server.log
        assert not os.path.exists(f"/proc/{engine}")


def test_a_killed_engine_is_started_again_and_those_that_wait_are_kept():
    with serving("--max-running", "1") as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        ended = {}

        def draw(name, steps):
            try:
                ended[name] = client.images.generate(
                    prompt="a fish", extra_body={"steps": steps, "seed": 1}, extra_headers={"x-request-id": name}
                )
            except openai.APIError as error:
                ended[name] = error

        first = threading.Thread(target=draw, args=("first", 900))
        first.start()
        while not json.loads(server.get("/v1/images/first")[1]).get("step"):
            time.sleep(0.01)
        second = threading.Thread(target=draw, args=("second", 2))
        second.start()
        while server.get("/v1/images/second")[0] != 200:
            time.sleep(0.01)
        os.kill(server.engine(), signal.SIGKILL)
        first.join()
        assert (ended["first"].status_code, ended["first"].code) == (503, "engine_lost")
        second.join()
        assert ended["second"].data[0].b64_json
        server.ready()
        assert "stylefast:engine_restarts 1.0" in server.get("/metrics")[1].decode()


def test_an_engine_that_is_killed_three_times_ends_the_server():
    with serving() as server:
        killed: set[int] = set()
        for _ in range(WAIT * 20):
            if server.process.poll() is not None:
                break
            try:
                pid = server.engine()
                if pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            except (AssertionError, OSError):  # between two engines, or after the last one
                pass
            time.sleep(0.05)
        assert server.process.poll() == 1 and len(killed) == 3
        assert "died 3 times" in server.log
