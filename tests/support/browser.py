"""A headless Chromium, driven through the pipe of its DevTools protocol: no driver, no package, no port."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 60  # seconds for what takes one on an idle machine

# gives the program the pipe's ends as the descriptors that it reads from and writes to
_START = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def chromium():
    """Return the path of an installed Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page in its browser."""

    def __init__(self, reading, writing):
        self._reading, self._writing, self._number = reading, os.fdopen(writing, "wb", 0), 0
        self._rest, self._messages = b"", deque()
        self.problems = []  # errors and warnings of the console, exceptions, refusals by the page's policy
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self._writing.write(json.dumps(message).encode() + b"\0")
        while True:
            found = self._receive()
            if found.get("id") == self._number:
                assert "error" not in found, (method, found["error"])
                return found["result"]

    def _receive(self):
        while not self._messages:
            piece = os.read(self._reading, 2**20)
            assert piece, "the browser is gone"
            *whole, self._rest = (self._rest + piece).split(b"\0")
            self._messages.extend(map(json.loads, whole))
        found = self._messages.popleft()
        self._note(found)
        return found

    def _note(self, message):
        what, content = message.get("method"), message.get("params")
        if what == "Runtime.exceptionThrown":
            self.problems.append(content["exceptionDetails"].get("exception", {}).get("description"))
        elif what == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{content['entry']['text']} {content['entry'].get('url', '')}")
        elif what == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.problems.append(str(content["args"]))

    def open(self, url):
        """Load a page."""
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script):
        """Return the value of an expression in the page; promises are waited for."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, script, seconds=WAIT):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"{script} is not true after {seconds} seconds"
            time.sleep(0.02)

    def text(self, selector):
        """Return the text of an element as it is shown."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def click(self, selector):
        """Click an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def fill(self, selector, value):
        """Put a value into a field, as typing it would."""
        self.run(
            f"(() => {{ const field = document.querySelector({json.dumps(selector)}); "
            f"field.value = {json.dumps(value)}; "
            "for (const name of ['input', 'change']) field.dispatchEvent(new Event(name, {bubbles: true})); })()"
        )

    def choose_file(self, selector, path):
        """Choose a file in a field for files."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def press(self, key, modifiers=0, text=""):
        """Press a key; modifiers: 1 Alt, 2 Ctrl, 4 Meta, 8 Shift, added up."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}
        event = {"key": key, "code": key, "modifiers": modifiers, "windowsVirtualKeyCode": codes.get(key, 0)}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def size(self, width, height, scale=1, phone=False):
        """Give the window a size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def dark(self, is_dark):
        """Prefer dark or light."""
        value = "dark" if is_dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path, whole=False):
        """Write what is seen, or the whole page, to a PNG file."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser(program, folder):
    """Run a browser, and yield its page. folder: for its profile."""
    ours, theirs = os.pipe(), os.pipe()  # to the browser, from the browser
    # above the two numbers that they shall get
    given = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (ours[0], theirs[1])]
    options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
    options += ["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"]
    options += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # which Chromium refuses to run as root with
    with open(folder / "browser.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _START, *map(str, given), program, *options, "about:blank"],
            pass_fds=given,
            stdout=log,
            stderr=log,
        )
    for fd in (ours[0], theirs[1], *given):
        os.close(fd)
    try:
        yield Page(theirs[0], ours[1])
    finally:
        process.terminate()
        try:
            process.wait(WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(theirs[0])
