"""The examples of what stands in front: their limits are those of the settings, and nginx passes what it should."""

import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from contextlib import closing
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
import uvicorn

from stylefast.serving.settings import ServeSettings
from tests.serving.conftest import WAIT, serving

SETTINGS = ServeSettings()
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
KEY = "0123456789abcdef"
TRUSTING = ssl.create_default_context()
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE
KINDS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")  # of nginx's temporary files


@pytest.mark.parametrize(
    "name, limit, timeout, idle",
    [
        (
            "nginx.conf",
            r"client_max_body_size (\d+)m;",
            r"proxy_read_timeout (\d+)s;",
            r"\n\s+keepalive_timeout (\d+)s;",
        ),
        ("Caddyfile", r"max_size (\d+)MiB", r"response_header_timeout (\d+)s", r"keepalive (\d+)s"),
    ],
)
def test_limits_are_those_of_the_settings(checkout, name, limit, timeout, idle):
    text = (checkout / "deploy" / name).read_text()
    assert int(re.search(limit, text)[1]) * 2**20 == SETTINGS.body_limit
    assert SETTINGS.deadline < float(re.search(timeout, text)[1])
    # a connection that the server closes at the moment of a request costs the client a 502
    assert float(re.search(idle, text)[1]) < uvicorn.Config(None).timeout_keep_alive
    assert f":{SETTINGS.port}" in text and text.count("{") == text.count("}")


def free_port():
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def proxied(checkout, tmp_path_factory):
    """A server behind nginx, and the address of nginx."""
    if NGINX is None or shutil.which("openssl") is None:
        pytest.skip("needs nginx and openssl: apt-get install nginx-light openssl")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    certificate = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *certificate], check=True)
    with serving("--model", "tiny", env={"STYLEFAST_SERVE_API_KEYS": f"alice:{KEY}"}) as server:
        text = (checkout / "deploy" / "nginx.conf").read_text()
        for old, new in (
            ("/run/nginx.pid", f"{folder}/pid"),
            ("/var/log/nginx/error.log", f"{folder}/error.log"),
            ("/var/log/nginx/access.log", f"{folder}/access.log"),
            ("/etc/ssl/certs/images.example.org.pem", f"{folder}/cert.pem"),
            ("/etc/ssl/private/images.example.org.key", f"{folder}/key.pem"),
            ("127.0.0.1:8000", urlsplit(server.url).netloc),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
            ("worker_processes auto;", "worker_processes 1;" + (" user root;" if os.geteuid() == 0 else "")),
            ("http {\n", "http {\n" + "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in KINDS)),
        ):
            assert old in text, old
            text = text.replace(old, new)
        (folder / "nginx.conf").write_text(text)
        command = [NGINX, "-c", folder / "nginx.conf", "-e", folder / "error.log", "-g", "daemon off;"]
        running = subprocess.Popen(command)
        try:
            yield f"https://localhost:{port}", folder
        finally:
            running.terminate()
            running.wait()


def ask(address, path, body=None, method=None, **headers):
    """Return the reply of a request; errors too."""
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json", **headers}
    for _ in range(100):
        try:
            return urllib.request.urlopen(
                urllib.request.Request(address + path, body, headers, method=method), timeout=WAIT, context=TRUSTING
            )
        except HTTPError as error:
            return error
        except urllib.error.URLError:  # nginx does not listen yet
            time.sleep(0.1)
    raise AssertionError("nginx does not listen")


def test_nginx_passes_a_stream_on_as_it_comes(proxied):
    address, _ = proxied
    body = {"prompt": "a fish", "stream": True, "partial_images": 3, "stylefast": {"steps": 400}}
    reply = ask(address, "/v1/images/generations", json.dumps(body).encode(), **{"x-request-id": "streamed"})
    assert reply.status == 200
    events = (line.strip().rpartition(b".")[2] for line in reply if line.startswith(b"event: "))
    assert next(events) == b"partial_image"
    # kept back, the first event would come with the last, when there is nothing left to cancel
    assert ask(address, "/v1/images/streamed", method="DELETE").status == 200
    assert b"completed" not in list(events)


def test_nginx_refuses_what_is_too_large_and_hides_metrics(proxied):
    address, folder = proxied
    connection = http.client.HTTPSConnection(urlsplit(address).netloc, context=TRUSTING, timeout=WAIT)
    connection.request("POST", "/v1/images/edits", headers={"content-length": str(SETTINGS.body_limit + 1)})
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(address, "/v1/models?key=secret", authorization="Bearer wrong").status == 401
    assert ask(address, "/readyz?key=secret").status == 200 and ask(address, "/metrics").status == 404
    log = (folder / "access.log").read_text()
    assert " GET /readyz 200 " in log and "secret" not in log and "wrong" not in log
