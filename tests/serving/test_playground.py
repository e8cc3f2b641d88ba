"""The playground: its files over HTTP, and the page in a headless Chromium where one is installed."""

import base64
import http.client
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from PIL import Image

from stylefast.models.checkpoint import TINY
from stylefast.serving import playground
from tests.serving.conftest import WAIT, serving
from tests.support.browser import browser, chromium

WOODCUT = TINY / "references" / "woodcut.png"
KEY = "0123456789abcdef"
KEYS = {"STYLEFAST_SERVE_API_KEYS": f"alice:{KEY}"}
TYPES = {
    "/": "text/html; charset=utf-8",
    "/playground/style.css": "text/css; charset=utf-8",
    "/playground/main.js": "text/javascript; charset=utf-8",
    "/playground/service.js": "text/javascript; charset=utf-8",
    "/playground/code.js": "text/javascript; charset=utf-8",
    "/playground/icon.svg": "image/svg+xml",
}


def get(url, path, method="GET"):
    """Return status, headers and body of a request whose path is sent as it is."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=WAIT)
    try:
        connection.request(method, path)
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def locked():
    """Run a server that wants a key."""
    with serving(env=KEYS) as running:
        yield running


# without a browser


@pytest.mark.parametrize("path", TYPES)
def test_its_files_are_served_without_a_key(locked, path):
    status, headers, body = get(locked.url, path)
    assert status == 200 and headers["content-type"] == TYPES[path] and len(body) > 100
    assert headers["content-security-policy"] == playground.POLICY and headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer" and KEY not in body.decode()
    status, headers, nothing = get(locked.url, path, "HEAD")
    assert status == 200 and int(headers["content-length"]) == len(body) and nothing == b""


def test_what_needs_no_key_is_the_page_alone(locked, server):
    assert set(playground.PATHS) == set(TYPES)
    for path in ("/playground", "/playground/", "/playground/index.html", "/playground/other.js", "//", "/v1/models"):
        assert get(locked.url, path)[0] == 401, path
    assert get(server.url, "/playground/other.js")[0] == 404 and get(server.url, "/", "POST")[0] == 405


@pytest.mark.parametrize(
    "name",
    [
        "__init__.py",
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "%2e%2e%2f%2e%2e%2ferrors.py",
        "..%5capp.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "main.js/../../app.py",
        "main.js%00",
        "MAIN.JS",
        "main.js%2f..%2f__init__.py",
    ],
)
def test_no_path_leads_out_of_the_page(server, name):
    status, _, body = get(server.url, "/playground/" + name)
    assert status == 404 and set(json.loads(body)) == {"error"}


def test_the_page_loads_nothing_from_elsewhere_and_has_no_script_inside(checkout):
    folder = checkout / "stylefast" / "serving" / "playground"
    page = (folder / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|\sstyle=|<style|javascript:", page)
    for path in folder.glob("*.*"):
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|(src|href)=\"//", text), path.name
    assert "'unsafe" not in playground.POLICY and "script-src 'self'" in playground.POLICY


def test_every_field_has_a_label_and_every_reference_leads_somewhere(checkout):
    page = (checkout / "stylefast" / "serving" / "playground" / "index.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    for name in ("for", "aria-labelledby", "aria-describedby"):
        assert set(re.findall(rf'\s{name}="([^"]+)"', page)) <= set(ids)
    for tag in re.findall(r"<(?:input|select|textarea)[^>]*>", page):
        inside = re.search(r'type="(radio|checkbox|file)"', tag)
        name = re.search(r'\sid="([^"]+)"', tag)
        assert inside or "aria-label=" in tag or f'for="{name[1]}"' in page, tag
    script = (checkout / "stylefast" / "serving" / "playground" / "main.js").read_text()
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= set(ids)


def test_models_tell_the_page_what_there_is_to_choose_from(client):
    model, *styled = client.models.list().data
    assert model.model_extra["stylefast"] == {"style": None, "size": "64x64", "methods": ["instant", "aligned"]}
    assert {one.id: one.model_extra["stylefast"]["style"] for one in styled}["tiny/neon"] == "neon"
    assert client.models.retrieve("tiny/neon") == next(one for one in styled if one.id == "tiny/neon")


# in a browser

PROGRAM = chromium()
in_a_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(PROGRAM, tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(window, server):
    """Return the page, freshly loaded, with the model's name in it."""
    window.problems.clear()
    window.size(1280, 900)
    window.run("sessionStorage.clear()") if window.run("location.protocol") == "http:" else None
    window.open(server.url + "/")
    window.wait("document.querySelector('#model').dataset.state === 'ready'")
    return window


def quick(page, prompt="a fish", steps=3, seed="7"):
    """Fill in a prompt and few steps."""
    page.fill("#prompt", prompt)
    page.fill("#quality", "own")
    page.fill("#steps", str(steps))
    page.fill("#seed", seed)


def drawn(page, count):
    """Wait until the gallery has so many pictures."""
    page.wait(f"document.querySelectorAll('#gallery li').length === {count}")
    page.wait("document.querySelector('#cancel').hidden")


def shown(page, number=0):
    """Return a picture among those that were drawn last."""
    content = page.run(
        f"fetch_picture = async () => {{ const image = document.querySelectorAll('.tile img')[{number}];"
        "await image.decode();"
        "const canvas = document.createElement('canvas');"
        "[canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];"
        "canvas.getContext('2d').drawImage(image, 0, 0); return canvas.toDataURL('image/png'); }; fetch_picture()"
    )
    return Image.open(BytesIO(base64.b64decode(content.partition(",")[2]))).convert("RGB")


def expected(client, **arguments):
    """Return the picture that OpenAI's client gets for the same request."""
    reply = client.images.generate(prompt="a fish", **arguments)
    return Image.open(BytesIO(base64.b64decode(reply.data[0].b64_json))).convert("RGB")


@in_a_browser
def test_a_picture_comes_in_step_by_step_and_is_the_services(page, client):
    quick(page, steps=8)
    page.run(
        "window.seen = new Set(); new MutationObserver(() => { const image = document.querySelector('.tile img');"
        " if (image) seen.add(image.src); }).observe(document.querySelector('#pictures'),"
        " {subtree: true, childList: true, attributes: true})"
    )
    page.click("#draw")
    page.wait("document.querySelector('#status').textContent === 'Drawing 1 picture.'")
    drawn(page, 1)
    # up to three previews, some of which a busy machine skips, and the picture
    assert 2 <= page.run("seen.size") <= 4
    picture = expected(client, extra_body={"stylefast": {"steps": 8, "seed": 7}})
    assert shown(page).tobytes() == picture.tobytes()
    assert page.run("document.querySelector('.tile img').alt") == "a fish, no style, seed 7"
    assert page.text("#status") == "1 picture of 1 done." and page.problems == []


@in_a_browser
def test_several_pictures_are_compared_with_those_without_the_style(page, client):
    quick(page)
    page.click("[name=method][value=registered]")
    page.fill("#style", "neon")
    page.fill("#count", "2")
    page.click("#compare")
    page.press("Enter", modifiers=2)
    drawn(page, 4)
    captions = page.run("[...document.querySelectorAll('figcaption span:first-child')].map(one => one.textContent)")
    assert captions == ["Seed 7, with style", "Seed 7, without", "Seed 8, with style", "Seed 8, without"]
    for number, (model, seed) in enumerate([("tiny/neon", 7), ("tiny", 7), ("tiny/neon", 8), ("tiny", 8)]):
        picture = expected(client, model=model, extra_body={"stylefast": {"steps": 3, "seed": seed}})
        assert shown(page, number).tobytes() == picture.tobytes(), captions[number]
    assert page.problems == []


GIVEN = {
    "drop": "new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: transfer})",
    "paste": "new ClipboardEvent('paste', {bubbles: true, cancelable: true, clipboardData: transfer})",
}


@in_a_browser
@pytest.mark.parametrize("how, method", [("drop", "instant"), ("paste", "aligned")])
def test_a_picture_that_is_dropped_or_pasted_is_the_style(page, client, how, method):
    quick(page)
    content = base64.b64encode(WOODCUT.read_bytes()).decode()
    page.run(
        f"(() => {{ const bytes = Uint8Array.from(atob('{content}'), one => one.charCodeAt(0));"
        "const transfer = new DataTransfer();"
        "transfer.items.add(new File([bytes], 'wood cut.png', {type: 'image/png'}));"
        f"document.body.dispatchEvent({GIVEN[how]}); }})()"
    )
    assert page.run("document.querySelector('[name=method]:checked').value") == "picture"
    assert "wood cut.png" in page.text("#drop")
    page.fill("#reference", method)
    page.click("#draw")
    drawn(page, 1)
    with WOODCUT.open("rb") as image:
        extra = {"stylefast": {"steps": 3, "seed": 7, "method": method}}
        reply = client.images.edit(image=image, prompt="a fish", extra_body=extra)
    picture = Image.open(BytesIO(base64.b64decode(reply.data[0].b64_json))).convert("RGB")
    assert shown(page).tobytes() == picture.tobytes() and page.problems == []


@in_a_browser
@pytest.mark.parametrize(
    "field, value, words",
    [
        ("#prompt", "", "The prompt is empty"),
        ("#steps", "5000", "Steps is 5000; it must be a whole number from 1 to 1000."),
        ("#guidance", "900", "Guidance is 900; it must be a number from 0 to 100."),
        ("#seed", "-7", "This must be from 0 to"),
        ("#seed", "seven", "This must be a whole number."),
        ("#width", "65", "Size is '65x64'"),
    ],
)
def test_an_error_stands_next_to_its_field(page, field, value, words):
    quick(page)
    page.fill("#size", "own")
    page.fill(field, value)
    page.click("#draw")
    page.wait(f"document.querySelector('{field}').getAttribute('aria-invalid') === 'true'")
    name = page.run(f"document.querySelector('{field}').getAttribute('aria-describedby')")
    assert page.text(f"#{name}").startswith(words)
    assert page.run(f"document.activeElement.id === '{field[1:]}' && document.querySelector('#alert').hidden")
    assert page.run("document.querySelector('#gallery-section').hidden")
    page.fill(field, {"#prompt": "a cat", "#width": "64"}.get(field, "1"))
    assert page.run(f"document.querySelector('{field}').getAttribute('aria-invalid')") is None


@in_a_browser
def test_files_that_are_no_pictures_are_refused_at_their_field(page, tmp_path):
    quick(page)
    page.click("[name=method][value=picture]")
    page.click("#draw")
    page.wait("document.querySelector('#image-error')")
    assert page.text("#image-error") == "Choose a picture first."
    (tmp_path / "a.png").write_bytes(b"nothing that is a picture")
    page.choose_file("#image", tmp_path / "a.png")
    page.wait("document.querySelector('#dropped').innerText.startsWith('a.png')")
    page.click("#draw")
    page.wait("document.querySelector('#image-error')")
    assert "PNG, JPEG" in page.text("#image-error")


@in_a_browser
def test_escape_cancels_and_what_was_there_comes_back(page, server):
    quick(page)
    page.click("#draw")
    drawn(page, 1)
    before = shown(page).tobytes()
    quick(page, steps=900)
    page.run("window.sent = []; const real = fetch; fetch = (...all) => { sent.push(all); return real(...all); }; 0")
    page.click("#draw")
    page.wait("/step [1-9]/.test(document.querySelector('#progress').textContent)")
    number = page.run("sent[0][1].headers['x-request-id']")
    rows = "[...document.querySelectorAll('.controls .actions button')].map(one => one.getBoundingClientRect().top)"
    assert len(set(page.run(rows))) == 1  # Cancel moves no other button
    page.press("Escape")
    page.wait("document.querySelector('#cancel').hidden")
    assert page.text("#status") == "Cancelled." and shown(page).tobytes() == before
    state = json.loads(server.get(f"/v1/images/{number}")[1])
    assert state["status"] == "cancelled" and state["step"] < 900
    assert page.run("sent.some(one => one[1]?.method === 'DELETE')") and page.problems == []


@in_a_browser
def test_settings_are_taken_again_from_the_gallery_and_the_picture_is_kept(page):
    quick(page, seed="")
    page.fill("#negative", "a cat")
    page.fill("#guidance", "4")
    page.fill("#size", "72x56")
    page.click("#draw")
    drawn(page, 1)
    first = shown(page)
    quick(page, prompt="a house", steps=2)
    page.fill("#negative", "")
    page.fill("#size", "auto")
    page.click("#gallery button")
    assert page.run("document.querySelector('#detail').open") and page.text("#detail-title") == "a fish"
    assert "72 × 56" in page.text("#detail-facts") and "a cat" in page.text("#detail-facts")
    assert page.run("document.querySelector('#detail-save').download").startswith("a-fish-")
    size = page.run(
        "fetch_size = new Promise(done => { const image = document.querySelector('#detail-image');"
        "image.decode().then(() => done([image.naturalWidth, image.naturalHeight])); })"
    )
    assert size == list(first.size) == [72, 56]
    page.click("#detail-use")
    page.click("#draw")
    drawn(page, 2)
    assert shown(page).tobytes() == first.tobytes() and page.problems == []


@in_a_browser
@pytest.mark.parametrize("pictured", [False, True], ids=["prompt", "picture"])
def test_the_copied_code_draws_the_same(page, tmp_path, pictured):
    prompt = 'a fish, "it\'s" $HOME \\ `x`'
    quick(page, prompt=prompt)
    if pictured:
        page.click("[name=method][value=picture]")
        page.choose_file("#image", WOODCUT)
        (tmp_path / WOODCUT.name).write_bytes(WOODCUT.read_bytes())
    page.click("#draw")
    drawn(page, 1)
    page.click("#show-code")
    shell = page.run("document.querySelector('#code-text').textContent")
    page.click("[name=language][value=python]")
    program = page.run("document.querySelector('#code-text').textContent")
    page.press("Escape")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=WAIT)
    assert Image.open(tmp_path / "picture-0.png").convert("RGB").tobytes() == shown(page).tobytes()
    if shutil.which("curl") is None:
        return
    subprocess.run(["sh", "-c", shell], cwd=tmp_path, check=True, timeout=WAIT, capture_output=True)
    reply = json.loads((tmp_path / "reply.json").read_text())
    assert base64.b64decode(reply["data"][0]["b64_json"]) == (tmp_path / "picture-0.png").read_bytes()


@in_a_browser
def test_a_key_is_asked_for_once_and_stays_in_the_tab(window, locked):
    window.problems.clear()
    window.open(locked.url + "/")
    window.run("sessionStorage.clear()")
    window.open(locked.url + "/?again")
    window.wait("document.querySelector('#key').open")
    window.fill("#key-text", "fedcba9876543210")
    window.click("#key-form [type=submit]")
    window.wait("document.querySelector('#key').open && !document.querySelector('#key-error').hidden")
    assert window.text("#key-error") == "The key is not known here."
    window.fill("#key-text", KEY)
    window.press("Enter", text="\r")
    window.wait("document.querySelector('#model').dataset.state === 'ready'")
    window.fill("#count", "2")
    quick(window)
    window.click("#draw")
    drawn(window, 2)
    window.click("#show-code")
    assert "$OPENAI_API_KEY" in window.text("#code-text") and KEY not in window.run("document.body.innerText")
    window.open(locked.url + "/?more")
    window.wait("document.querySelector('#model').dataset.state === 'ready'")
    assert not window.run("document.querySelector('#key').open") and window.run("localStorage.length") == 0
    assert [one for one in window.problems if "401" not in one] == []


@in_a_browser
def test_a_key_that_is_not_given_is_asked_for_when_it_is_needed(window, locked):
    window.open(locked.url + "/")
    window.run("sessionStorage.clear()")
    window.open(locked.url + "/?once")
    window.wait("document.querySelector('#key').open")
    window.press("Escape")
    window.wait("document.querySelector('#model').innerText === 'No key'")
    quick(window)
    window.click("#draw")
    window.wait("document.querySelector('#key').open")
    window.fill("#key-text", KEY)
    window.click("#key-form [type=submit]")
    drawn(window, 1)


@in_a_browser
@pytest.mark.parametrize("width, columns", [(390, 1), (640, 1), (700, 2), (1280, 2)])
def test_it_fits_the_window(page, width, columns):
    page.size(width, 844)
    page.click("[name=method][value=picture]")
    assert page.run("document.documentElement.scrollWidth") <= width
    found = page.run("getComputedStyle(document.querySelector('main')).gridTemplateColumns")
    assert len(found.split()) == columns


@in_a_browser
def test_all_of_it_can_be_reached_with_the_keyboard(page):
    seen = []
    page.run("document.querySelector('#prompt').focus()")
    for _ in range(12):
        seen.append(page.run("document.activeElement.id || document.activeElement.name"))
        page.press("Tab")
    wanted = ["prompt", "negative", "method", "size", "quality", "count", "seed", "guidance", "draw", "show-code"]
    assert seen[: len(wanted)] == wanted


@in_a_browser
def test_its_colours_follow_the_system_and_can_be_read(page):
    def contrast(selector):
        colours = page.run(
            f"[getComputedStyle(document.querySelector('{selector}')).color,"
            "getComputedStyle(document.querySelector('.controls')).backgroundColor]"
        )
        light, dark = sorted((luminance(one) for one in colours), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    def luminance(colour):
        parts = [int(one) / 255 for one in re.findall(r"\d+", colour)[:3]]
        parts = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    page.fill("#prompt", "")
    page.click("#draw")
    page.wait("document.querySelector('.error')")
    backgrounds = []
    for dark in (False, True):
        page.dark(dark)
        backgrounds.append(page.run("getComputedStyle(document.documentElement).backgroundColor"))
        for selector in (".controls label", ".hint", ".error", ".title h2", ".keys", "#model", "#show-code"):
            assert contrast(selector) >= 4.5, (selector, dark)
    page.dark(False)
    assert luminance(backgrounds[0]) > 0.8 and luminance(backgrounds[1]) < 0.05


@in_a_browser
def test_it_works_behind_a_path_of_a_proxy(window, server):
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            inside = self.path.removeprefix("/tools/draw")
            status, headers, body = get(server.url, inside) if inside != self.path else (404, {}, b"")
            self.send_response(status)
            for name in ("content-type", "content-security-policy"):
                self.send_header(name, headers.get(name, "text/plain"))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    window.problems.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        window.open(f"http://127.0.0.1:{proxy.server_port}/tools/draw/")
        window.wait("document.querySelector('#model').dataset.state === 'ready'")
        quick(window)
        window.click("#show-code")
        assert f":{proxy.server_port}/tools/draw/v1/images/generations'" in window.text("#code-text")
        window.open("about:blank")
        proxy.shutdown()
    assert window.problems == []


@in_a_browser
def test_it_waits_for_the_model_and_says_when_the_server_is_busy_or_gone(window, server):
    stub = """
        const real = window.fetch;
        const refusal = (status, seconds, message, code) => new Response(
            JSON.stringify({error: {message, type: "server_error", param: null, code}}),
            {status, headers: {"retry-after": seconds}});
        window.loading = true;
        window.draws = [
            () => refusal(429, 7, "64 requests are waiting", "queue_full"),
            () => { throw new TypeError(); },
        ];
        window.fetch = async (path, ...rest) => {
            if (path === "v1/models" && loading) return refusal(503, 1, "the model is being loaded", "starting");
            if (path === "v1/images/generations") return draws.shift()();
            return real(path, ...rest);
        };
    """
    script = window.call("Page.addScriptToEvaluateOnNewDocument", source=stub)["identifier"]
    try:
        window.open(server.url + "/?busy")
        window.wait("document.querySelector('#model').innerText === 'The model is being loaded …'")
        quick(window)
        window.click("#draw")
        window.wait("document.querySelector('#alert').innerText.startsWith('The model is not ready yet')")
        window.run("loading = false")
        window.wait("document.querySelector('#model').dataset.state === 'ready'")
        window.click("#draw")
        window.wait("document.querySelector('#alert').innerText.includes('waiting')")
        assert window.text("#alert") == "64 requests are waiting. You may try again in 7 seconds."
        window.click("#draw")
        window.wait("document.querySelector('#alert').innerText.includes('reached')")
        assert window.text("#alert") == "The server can't be reached."
        assert window.run("document.querySelector('.empty') !== null")  # what was there before
    finally:
        window.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


@in_a_browser
def test_replies_of_others_and_blocked_storage_are_lived_with(window, server):
    stub = """
        Object.defineProperty(window, "sessionStorage", {
            get() { throw new DOMException("blocked", "SecurityError"); },
        });
        const real = window.fetch;
        window.draws = [
            () => new Response('{"error": "bad gateway"}', {status: 502}),
            () => new Response('{"error": {"code": 7}}', {status: 400}),
            () => new Response('null', {status: 500}),
            () => new Response('data: <html>\\n\\n'),
            () => new Response('data: null\\n\\n'),
        ];
        window.fetch = async (path, ...rest) => path.endsWith("generations") ? draws.shift()() : real(path, ...rest);
    """
    said = [*(f"The server answered with status {status}." for status in (502, 400, 500))]
    said += ["The server's reply can't be read; draw it again."] * 2
    script = window.call("Page.addScriptToEvaluateOnNewDocument", source=stub)["identifier"]
    try:
        window.open(server.url + "/?odd")
        window.wait("document.querySelector('#model').dataset.state === 'ready'")
        quick(window)
        for words in said:
            window.click("#draw")
            window.wait("!document.querySelector('#alert').hidden && document.querySelector('#cancel').hidden")
            assert window.text("#alert") == words
    finally:
        window.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)
        window.open("about:blank")


@in_a_browser
def test_keys_that_compose_text_do_not_cancel_and_pasted_text_stays_text(page):
    quick(page, steps=900)
    page.click("#draw")
    page.wait("!document.querySelector('#cancel').hidden")
    event = "new KeyboardEvent('keydown', {key: 'Escape', bubbles: true%s})"
    press = f"document.querySelector('#prompt').dispatchEvent({event})"
    page.run(press % ", isComposing: true")
    assert page.text("#progress") != "Cancelling …"
    page.run(press % "")
    page.wait("document.querySelector('#cancel').hidden")
    assert page.text("#status") == "Cancelled."

    def paste(selector):
        return page.run(
            "(() => { const transfer = new DataTransfer();"
            "transfer.items.add(new File([new Uint8Array(9)], 'text.png', {type: 'image/png'}));"
            "transfer.setData('text/plain', 'a boat');"
            f"return document.querySelector('{selector}').dispatchEvent({GIVEN['paste']}); }})()"
        )

    assert paste("#prompt") and page.run("document.querySelector('[name=method]:checked').value") == "none"
    assert not paste("h1") and page.run("document.querySelector('[name=method]:checked').value") == "picture"


def test_the_page_has_the_projects_name():
    page = playground._FILES[playground.PAGE].decode()
    assert "<title>stylefast playground</title>" in page and "StyleFast" not in page
