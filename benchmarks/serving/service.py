"""A server in a process of its own, and a client that takes the time of what it sends."""

import base64
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}
OURS = (sys.executable, "-m", "stylefast.cli", "serve", "--port", "0", "--max-waiting", "1000")
PEER = (sys.executable, "-m", "benchmarks.serving.published")
PATIENCE = 300.0  # seconds for one reply
PAGE_BYTES = 4096


class RefusedError(Exception):
    """An error that a server sent. status: of HTTP, also for errors inside a stream where the event has none."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(f"{status} {code}: {message}")
        self.status, self.code = status, code


@dataclass
class Reply:
    """A finished stream. Seconds from the request to the first preview, if one came, and to the picture."""

    first: float | None
    last: float
    content: bytes = field(repr=False)

    @property
    def image(self) -> Image.Image:
        """Return the picture."""
        return Image.open(BytesIO(self.content))


@dataclass
class Service:
    """A running server. seconds: from its start until it was ready."""

    address: str
    process: subprocess.Popen[str]
    seconds: float = 0.0

    def connect(self) -> http.client.HTTPConnection:
        """Return a new connection."""
        return http.client.HTTPConnection(self.address, timeout=PATIENCE)

    def get(self, path: str) -> tuple[int, bytes]:
        """Return status and body of a GET."""
        connection = self.connect()
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def ready(self) -> bool:
        """Return whether it is ready for requests."""
        return self.get("/readyz")[0] == 200

    def metrics(self) -> dict[str, float]:
        """Return its metrics, by name and labels."""
        lines = [line for line in self.get("/metrics")[1].decode().splitlines() if line[:1] not in ("", "#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def engine(self) -> int | None:
        """Return the id of the engine's process, if there is one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        return found[0] if found else None

    def megabytes(self) -> float:
        """Return the resident memory of the server and its engine, in units of 10^6 bytes."""
        pids = [self.process.pid, self.engine()]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids if pid is not None]
        return sum(pages) * PAGE_BYTES / 1e6


@contextmanager
def running(command: tuple[str, ...], *options: str) -> Iterator[Service]:
    """Run a server (`OURS` or `PEER`), and yield it once it is ready."""
    start = time.monotonic()
    environment = {**os.environ, "STYLEFAST_SERVE_LOG_FORMAT": "text"}
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines: list[str] = []
    address = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"serving on http://(\S+)", line):
            address = found[1]
            break
    if address is None:
        raise SystemExit(f"{' '.join(command)} does not start:\n{''.join(lines)}")
    threading.Thread(target=process.stderr.read, daemon=True).start()
    service = Service(address, process)
    try:
        while not service.ready():
            time.sleep(0.05)
        service.seconds = time.monotonic() - start
        yield service
    finally:
        process.terminate()
        process.wait()


def stream(service: Service, body: Mapping[str, Any], headers: Mapping[str, str] = JSON) -> Reply:
    """Send a request that streams, and wait for its end.

    Raises RefusedError for an error, and RuntimeError for a stream with no end, with two, or without a picture in it.
    """
    connection, start = service.connect(), time.monotonic()
    try:
        connection.request("POST", PATH, json.dumps(body), dict(headers))
        return read_stream(connection.getresponse(), start)
    finally:
        connection.close()


def read_stream(reply: http.client.HTTPResponse, start: float) -> Reply:
    """Read a reply to its end; see `stream`."""
    if reply.status != 200:
        raise refusal(reply.status, reply.read())
    first, ends = None, []
    for line in reply:
        if not line.startswith(b"data:"):
            continue
        now, event = time.monotonic() - start, json.loads(line[5:])
        if event["type"].endswith("partial_image"):
            first = first or now
        else:
            ends.append((now, event))
    if len(ends) != 1:
        raise RuntimeError(f"a stream has {len(ends)} ends; it must have one")
    last, event = ends[0]
    if "error" in event:
        raise RefusedError(reply.status, event["error"]["code"], event["error"]["message"])
    return Reply(first, last, base64.b64decode(event["b64_json"], validate=True))


def refusal(status: int, content: bytes) -> RefusedError:
    """Return the error in a body, which must be an envelope."""
    error = json.loads(content)["error"]
    return RefusedError(status, error["code"], error["message"])
