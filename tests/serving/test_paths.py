"""Names in requests lead to no file outside of the folder of styles, whatever they look like."""

import json
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.serving.bench import bench

NAMES = [
    "../secret",
    "..",
    ".",
    "../../etc/passwd",
    "..\\secret",
    "%2e%2e/secret",
    "%2e%2e%2fsecret",
    "%252e%252e%252fsecret",
    "/etc/passwd",
    "//etc/passwd",
    "neon/../../secret",
    "neon\0",
    "\0",
    "ne\non",
    " neon",
    "neon ",
    "neon.",
    "a" * 10_000,
    "ｎｅｏｎ",
    "nеon",  # with a Cyrillic letter
    "..／secret",
    "‮noen",
    "nul",
    "CON",
    "com1.txt",
    "neon:stream",
    "C:\\secret",
    "\\\\server\\share",
    "~/secret",
    "$HOME",
    "-rf",
    "$(id)",
]
_opened: list[str] | None = None


def _audit(event, arguments):
    if _opened is not None and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename", "os.remove"):
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    root = tmp_path_factory.mktemp("place")
    (root / "styles").mkdir()
    (root / "secret").mkdir()
    (root / "secret" / "style.json").write_text("{}")
    with bench(styles_dir=str(root / "styles")) as found:
        found.root = root
        yield found


def requests(running, name):
    """Yield the status of requests that name a style, in all places where one is named."""
    place, kind = quote(name, safe=""), {"content-type": "application/json"}
    yield running.call("GET", f"/v1/styles/{place}")[0]
    yield running.call("DELETE", f"/v1/styles/{place}")[0]
    yield running.call("POST", f"/v1/styles/{place}/bake", "{}", kind)[0]
    yield running.call("GET", f"/v1/models/tiny/{place}")[0]
    yield running.draw(model=f"tiny/{name}")[0]
    yield running.draw(style=name)[0]
    yield running.draw(stylefast={"style": name})[0]
    body = {"name": name, "prompt": "a fish", "method": "aligned"}
    yield running.call("POST", "/v1/styles", json.dumps(body), kind)[0] if name != "neon" else 400
    yield running.call("POST", "/sdapi/v1/txt2img", json.dumps({"styles": [name]}), kind)[0]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:30] for name in NAMES])
def test_no_name_opens_anything_outside(running, name):
    global _opened
    list(requests(running, "first"))  # what is imported at the first time
    _opened = []
    try:
        statuses = list(requests(running, name))
    finally:
        opened, _opened = _opened, None
    assert set(statuses) <= {400, 404, 405, 409}, statuses
    inside = str(running.root / "styles")
    outside = [path for path in opened if not path.startswith(inside) and Path(path).suffix not in (".py", ".pyc")]
    outside = [path for path in outside if path.startswith("/") or "secret" in path or ".." in path]
    assert [path for path in outside if not path.startswith("/dev/")] == []


def test_the_watch_sees_what_is_opened(running):
    global _opened
    _opened = []
    try:
        (running.root / "secret" / "style.json").read_text()
    finally:
        opened, _opened = _opened, None
    assert str(running.root / "secret" / "style.json") in opened


sys.addaudithook(_audit)
