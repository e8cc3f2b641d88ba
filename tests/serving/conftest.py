"""A server as users start it, and clients."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from urllib.error import HTTPError

import pytest

WAIT = 120  # seconds for what takes a few on an idle machine


class Server:
    """A running `stylefast serve`. module, words: what runs it, and what that wants first."""

    module = "stylefast.cli"

    def __init__(self, *options, env=None, words=("serve",)):
        command = [sys.executable, "-m", self.module, *words, "--port", "0", *map(str, options)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, start_new_session=True
        )
        self.lines, self._listening, self.url = [], threading.Event(), ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._listening.wait(WAIT):
            self.kill()
            raise AssertionError("the server does not listen:\n" + "".join(self.lines))

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving on (http://\S+)", line):
                self.url = found[1]
                self._listening.set()
        self._listening.set()

    def get(self, path):
        """Return the status and the body of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=WAIT) as reply:
                return reply.status, reply.read()
        except HTTPError as error:
            return error.code, error.read()

    def ready(self):
        """Wait until it is ready."""
        for _ in range(WAIT * 20):
            if self.process.poll() is not None:
                break
            if self.get("/readyz")[0] == 200:
                return self
            time.sleep(0.05)
        raise AssertionError("the server is not ready:\n" + "".join(self.lines))

    def engine(self):
        """Return the id of the engine's process."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        with open(children) as stream:
            for pid in stream.read().split():
                with open(f"/proc/{pid}/cmdline") as words:
                    if "spawn_main" in words.read():
                        return int(pid)
        raise AssertionError("there is no engine's process")

    def stop(self, number=signal.SIGTERM):
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(WAIT)

    def kill(self):
        """End it with all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join(WAIT)
        self.process.stderr.close()

    @property
    def log(self):
        """Return what it has written so far."""
        return "".join(self.lines)


@contextmanager
def serving(*options, env=None):
    """Run a server until it is no longer needed."""
    server = Server(*options, env=env)
    try:
        yield server.ready()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def server():
    with serving() as running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=server.url + "/v1", api_key="none", timeout=WAIT, max_retries=0)
