"""Registered styles over HTTP: created, listed, drawn with, baked and deleted, with a server as users start it."""

import base64
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from io import BytesIO

import httpx
import openai
import pytest
from PIL import Image

from stylefast import cli
from stylefast.models.checkpoint import TINY
from stylefast.serving.fields import Served, model_and_style
from stylefast.serving.messages import BakeStyle, Cancel, Failed
from stylefast.serving.registry import StyleRegistry
from stylefast.serving.style_files import Manifest
from tests.serving.bench import StandIn, bench
from tests.serving.conftest import WAIT, Server, serving

USER, ADMIN = "0123456789abcdef", "0000111122223333"
KEYS = {"STYLEFAST_SERVE_API_KEYS": USER, "STYLEFAST_SERVE_ADMIN_KEYS": ADMIN}
PICTURE = (TINY / "references" / "glass.png").read_bytes()
IMAGE = {"image": ("x.png", PICTURE)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("styles")


@pytest.fixture(scope="module")
def server(folder):
    with serving("--styles", folder, "--max-running", 2, env=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def admin(server):
    with httpx.Client(base_url=server.url, timeout=WAIT, headers={"authorization": f"Bearer {ADMIN}"}) as client:
        yield client


@pytest.fixture(scope="module")
def user(server):
    with httpx.Client(base_url=server.url, timeout=WAIT, headers={"authorization": f"Bearer {USER}"}) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=USER, timeout=WAIT, max_retries=0)


@pytest.fixture(autouse=True)
def clean(folder):
    yield
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def create(admin, name="ours", files=IMAGE, **fields):
    reply = post(admin, {"name": name, **fields}, files)
    assert reply.status_code == 201, reply.text
    return reply.json()


def post(admin, fields, files):
    """Send a form, which is multipart also without files."""
    return admin.post("/v1/styles", files={**{name: (None, text) for name, text in fields.items()}, **files})


def add(folder, name="ours", files=None, **fields):
    """Register a style without the server."""
    registry = StyleRegistry(folder)
    with registry.draft() as draft:
        for file, content in (files or {"reference.png": PICTURE}).items():
            draft.add(file, content)
        styles = fields.pop("styles", [{"kind": "StyleAligned", "reference": "reference.png"}])
        return draft.publish(name, Manifest(styles, {}, **fields))


def baked(user, name="ours"):
    """Return the state of a bake that has ended, and all states before it."""
    seen = []
    while not seen or seen[-1]["status"] in ("queued", "in_progress"):
        time.sleep(0.01)
        seen.append(user.get(f"/v1/styles/{name}").json()["bake"])
    return seen[-1], seen[:-1]


def draw(client, model="tiny/ours", number=None, **own):
    """Return a picture and its record."""
    headers = {"x-request-id": number} if number else None
    own = {"stylefast": {"seed": 7, **own}}
    reply = client.images.generate(prompt="a fish", model=model, extra_body=own, extra_headers=headers)
    image = Image.open(BytesIO(base64.b64decode(reply.data[0].b64_json)))
    return image.tobytes(), json.loads(image.text["stylefast"])


def refused(reply, status, code):
    """Check an error's envelope, and return its message."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == code, error
    return error["message"]


def test_a_style_is_created_drawn_with_and_deleted(admin, user, client, folder, capsys):
    made = create(admin, method="instant", licence="CC0-1.0", **{"options[scale]": "0.6", "defaults[steps]": "2"})
    assert (made["id"], made["model"], made["licence"], made["kinds"]) == (
        "ours",
        "tiny/ours",
        "CC0-1.0",
        ["InstantStyle"],
    )
    assert "tiny/ours" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny/ours").id == "tiny/ours"
    assert {"neon", "ours"} <= {style["id"] for style in user.get("/v1/styles").json()["data"]}
    pixels, record = draw(client)
    (style,), (request,) = record["call"]["styles"], record["call"]["requests"]
    assert style["scale"] == 0.6 and style["image"][0]["path"] == "ours/reference.png" and request["steps"] == 2
    assert str(folder) not in json.dumps(record)
    reply = client.images.generate(prompt="a fish", model="tiny/ours", extra_body={"stylefast": {"seed": 7}})
    (folder / "x.png").write_bytes(base64.b64decode(reply.data[0].b64_json))
    code = cli.main(["generate", "--from", str(folder / "x.png"), "--out", str(folder / "ours" / "y.png")])
    assert code == 0 and "same pixels" in capsys.readouterr().err
    (folder / "x.png").unlink()
    same = draw(client, "tiny", style={"kind": "InstantStyle", "image": "glass", "scale": 0.6}, steps=2)[0]
    assert pixels == same != draw(client, "tiny", steps=2)[0]
    reply = user.post("/sdapi/v1/txt2img", json={"prompt": "a fish", "styles": ["ours"], "width": 64, "height": 64})
    assert json.loads(reply.json()["info"])["steps"] == 2
    assert admin.delete("/v1/styles/ours").json()["deleted"] and os.listdir(folder) == []
    refused(admin.delete("/v1/styles/ours"), 404, "not_found")
    with pytest.raises(openai.NotFoundError):
        draw(client)


def test_a_style_of_a_prompt_is_baked_and_drawn_from_its_bank(admin, user, client, folder):
    create(admin, files={}, prompt="a star in neon style", method="aligned")
    _, plain = draw(client, steps=3)
    assert plain["call"]["styles"][0]["prompt"] == "a star in neon style"
    reply = admin.post("/v1/styles/ours/bake", json={"steps": 5})
    assert reply.status_code == 202 and reply.json()["bake"]["steps"] == 5
    refused(admin.post("/v1/styles/ours/bake", json={"steps": 5}), 409, "bake_in_progress")
    beside = draw(client, "tiny/neon", steps=2)[0]
    last, before = baked(user)
    assert last["status"] == "completed" and last["progress"] == 1.0
    steps = [state["step"] for state in before]
    assert steps == sorted(steps) and set(steps) & set(range(1, 6))
    assert user.get("/v1/styles/ours").json()["defaults"] == {
        "steps": 5,
        "scheduler": "euler",
        "size": [64, 64],
        "guidance": 5.0,
    }
    pixels, record = draw(client)
    assert record["call"]["styles"][0]["reference"]["bank"]["steps"] == 5
    assert record["call"]["styles"][0]["reference"]["path"].startswith("ours/bank-")
    written_out = {"kind": "StyleAligned", "prompt": "a star in neon style"}
    assert pixels == draw(client, "tiny", style=written_out, steps=5)[0]
    # other settings than the bank's take the reference itself
    again, record = draw(client, steps=3)
    assert (
        "bank" not in json.dumps(record["call"]["styles"])
        and again == draw(client, "tiny", style=written_out, steps=3)[0]
    )
    assert beside == draw(client, "tiny/neon", steps=2)[0]
    assert len([name for name in os.listdir(folder / "ours") if name.endswith(".bank")]) == 1
    assert os.listdir(folder) == ["ours"]


def test_deleting_a_style_ends_its_bake_and_leaves_nothing(admin, user, folder):
    create(admin, bake=json.dumps({"steps": 900}))
    while not user.get("/v1/styles/ours").json()["bake"]["step"]:
        time.sleep(0.01)
    assert admin.delete("/v1/styles/ours").json()["deleted"]
    assert os.listdir(folder) == []
    refused(user.get("/v1/styles/ours"), 404, "not_found")


def test_a_style_in_use_that_is_deleted_is_there_for_those_that_have_it(admin, user, client):
    create(admin)
    wanted, ended = draw(client, steps=12)[0], {}

    def run(name, model, steps):
        ended[name] = draw(client, model, name, steps=steps)[0]

    # one that runs, beside another, and one that waits
    calls = [("first", "tiny/ours", 12), ("other", "tiny", 60), ("waits", "tiny/ours", 12)]
    threads = [threading.Thread(target=run, args=call) for call in calls]
    for thread, (name, *_) in zip(threads, calls, strict=True):
        thread.start()
        while user.get(f"/v1/images/{name}").status_code != 200:
            time.sleep(0.01)
    admin.delete("/v1/styles/ours").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        draw(client)
    for thread in threads:
        thread.join()
    assert ended["first"] == ended["waits"] == wanted != ended["other"]


def test_what_changes_styles_needs_an_admin_key(admin, user, folder):
    create(admin)
    for reply in (
        user.post("/v1/styles", data={"name": "mine"}, files=IMAGE),
        user.post("/v1/styles/ours/bake", json={}),
        user.delete("/v1/styles/ours"),
        user.delete("/v1/styles/unknown"),
    ):
        refused(reply, 403, "admin_key_required")
    for method, path in (("GET", "/v1/styles"), ("POST", "/v1/styles"), ("DELETE", "/v1/styles/ours")):
        refused(httpx.request(method, str(user.base_url) + path), 401, "invalid_api_key")
    assert os.listdir(folder) == ["ours"] and user.get("/v1/styles/ours").json()["bake"] is None


@pytest.mark.parametrize(
    "fields, files, status, code",
    [
        ({"name": "../evil"}, IMAGE, 400, "invalid_style_name"),
        ({"name": "%2e%2e"}, IMAGE, 400, "invalid_style_name"),
        ({"name": "a\0b"}, IMAGE, 400, "invalid_style_name"),
        ({"name": "a" * 10_000}, IMAGE, 400, "invalid_style_name"),
        ({"name": "ne\u043en"}, IMAGE, 400, "invalid_style_name"),
        ({"name": "com1"}, IMAGE, 400, "invalid_style_name"),
        ({}, IMAGE, 400, "invalid_style_name"),
        ({"name": "Neon"}, IMAGE, 409, "style_exists"),
        ({"name": "mine", "method": "magic"}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "colour": "red"}, IMAGE, 400, "unknown_parameter"),
        ({"name": "mine"}, {}, 400, "missing_image"),
        ({"name": "mine", "method": "instant", "prompt": "a star"}, IMAGE, 400, "unsupported_parameter"),
        ({"name": "mine"}, {"image": ("x.png", b"nothing")}, 400, "invalid_image"),
        ({"name": "mine", "options": '{"scale": "much"}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "options": '{"scal": 1}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "options": '{"mask": "/etc/passwd"}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "options": '{"mask": {"path": "/etc/passwd"}}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "options": '{"image": "/etc/passwd"}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "defaults": '{"prompt": "x"}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "defaults": '{"steps": "many"}'}, IMAGE, 400, "invalid_style"),
        ({"name": "mine", "defaults": '{"scheduler": "quick"}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "bake": '{"store": "disk"}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "bake": '{"size": "many"}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "bake": '{"scheduler": "quick"}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "licence": "x" * 3000}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "bake": '{"steps": 0}'}, IMAGE, 400, "invalid_request"),
        ({"name": "mine", "bake": '{"step": 5}'}, IMAGE, 400, "unknown_parameter"),
        ({"name": "mine", "bake": "true", "method": "instant"}, IMAGE, 400, "invalid_style"),
    ],
)
def test_what_cannot_be_a_style_is_refused_and_leaves_nothing(admin, folder, fields, files, status, code):
    message = refused(post(admin, fields, files), status, code)
    assert len(message) < 800 and str(folder) not in message and os.listdir(folder) == []


@pytest.mark.parametrize(
    "body",
    [{"name": {}}, {"method": []}, {"prompt": 5}, {"options": []}, {"defaults": 1}, {"image": {"a": 1}}, {"bake": []}]
    + [
        {"bake": {"size": {}}},
        {"bake": {"store": []}},
        {"options": {"scale": {}}},
        {"options": {"seed": [1]}},
        {"image": 7},
    ]
    + [{"defaults": {"size": "64x64"}}, {"licence": {}}, {"image": ["https://example.org/x.png"]}],
)
def test_bodies_in_json_are_checked_as_forms_are(admin, folder, body):
    body = {"name": "mine", "prompt": "a star", **body}
    reply = admin.post("/v1/styles", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["code"], reply.text
    assert os.listdir(folder) == []


@pytest.mark.parametrize("path", ["..", "%2e%2e", "%2e%2e%2fetc", "a%00b", "a" * 10_000, "ne%D0%BEn", "nul", ".new-0"])
def test_paths_that_are_no_name_find_nothing(admin, path, server):
    for method in ("GET", "DELETE"):
        reply = admin.send(httpx.Request(method, f"{server.url}/v1/styles/{path}", headers=admin.headers))
        assert reply.status_code in (404, 405) and reply.json()["error"]["code"]


def test_styles_of_the_model_stay_as_they_are(admin):
    assert admin.get("/v1/styles/neon").json()["source"] == "model"
    refused(admin.delete("/v1/styles/neon"), 409, "style_of_model")
    refused(admin.post("/v1/styles/neon/bake", json={}), 409, "style_of_model")


def test_styles_that_others_put_there_are_noticed_and_damaged_ones_refused(client, user, folder):
    lora = (TINY / "loras" / "gold.safetensors").read_bytes()
    files = {"reference.png": PICTURE, "ink.safetensors": lora}
    add(folder, files=files, loras={"ink.safetensors": 0.5}, defaults={"steps": 2, "size": [96, 64]})
    add(folder, "second")
    assert {"tiny/ours", "tiny/second"} <= {model.id for model in client.models.list()}
    reply = client.images.generate(prompt="a fish", model="tiny/ours", extra_body={"stylefast": {"seed": 7}})
    assert reply.size == "96x64"
    pixels, record = draw(client)
    assert [file["path"] for file in record["lora_files"].values()] == ["ours/ink.safetensors"]
    written_out = {"style": {"kind": "StyleAligned", "reference": "glass"}, "loras": {"gold": 0.5}, "steps": 2}
    wanted = client.images.generate(
        prompt="a fish", model="tiny", size="96x64", extra_body={"stylefast": {"seed": 7, **written_out}}
    )
    assert pixels == Image.open(BytesIO(base64.b64decode(wanted.data[0].b64_json))).tobytes()
    (folder / "ours" / "reference.png").write_bytes(PICTURE[:-1])
    found = {style["id"]: style for style in user.get("/v1/styles").json()["data"]}
    assert "altered" in found["ours"]["fault"] and found["second"]["fault"] is None
    assert "tiny/ours" not in {model.id for model in client.models.list()}
    for arguments in ({"model": "tiny/ours"}, {"style": "ours"}, {"extra_body": {"stylefast": {"style": "ours"}}}):
        with pytest.raises(openai.BadRequestError, match="'ours' can't be used") as caught:
            client.images.generate(prompt="a fish", **arguments)
        assert caught.value.code == "style_damaged"
    assert draw(client, "tiny/second", steps=2)


@pytest.mark.parametrize("name", ["some/model/ours", "some/model:ours"])
def test_a_model_whose_own_name_has_a_slash_has_aliases_too(name):
    served = Served("some/model", ["ours"], (64, 64))
    assert model_and_style(name, served) == (name, "ours")
    assert model_and_style("some/model", served) == ("some/model", None)


def test_a_name_that_the_model_has_ends_the_server_at_its_start(tmp_path):
    add(tmp_path, "Neon")
    server = Server("--styles", tmp_path)
    try:
        assert server.process.wait(WAIT) == 1
        server._reader.join(WAIT)
        assert "'neon' comes with the model" in server.log and str(tmp_path / "Neon") in server.log
    finally:
        server.kill()


def test_a_bake_ends_with_its_engine_and_with_the_server(tmp_path):
    add(tmp_path)
    with serving("--styles", tmp_path) as server, httpx.Client(base_url=server.url, timeout=WAIT) as client:

        def bake():
            assert client.post("/v1/styles/ours/bake", json={"steps": 900}).status_code == 202
            while not client.get("/v1/styles/ours").json()["bake"]["step"]:
                time.sleep(0.01)
            assert len(os.listdir(tmp_path)) == 2

        bake()
        os.kill(server.engine(), signal.SIGKILL)
        while (reply := client.get("/v1/styles/ours")).status_code == 503 or not reply.json()["bake"]["error"]:
            time.sleep(0.05)
        assert reply.json()["bake"]["error"]["code"] == "engine_lost"
        server.ready()
        assert os.listdir(tmp_path) == ["ours"]
        bake()
        assert server.stop(signal.SIGTERM) == 0 and "Traceback" not in server.log
    assert os.listdir(tmp_path) == ["ours"] and sorted(os.listdir(tmp_path / "ours")) == ["reference.png", "style.json"]


class Baker(StandIn):
    """An engine whose bakes go on until they are cancelled."""

    def send(self, message):
        if isinstance(message, Cancel):
            self._loop.call_soon(self._tell, Failed(message.ticket, "JobCancelled", ""))
        elif not isinstance(message, BakeStyle):
            super().send(message)


def test_deleting_a_style_ends_a_bake_that_the_engine_does_not_have_yet(tmp_path):
    add(tmp_path)
    with bench(Baker, styles_dir=str(tmp_path)) as running:
        held = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # as another server that writes
        ended = {}

        def ask(method, path):
            ended[method] = running.call(method, path)[0]

        asking = [
            threading.Thread(target=ask, args=("POST", "/v1/styles/ours/bake"), daemon=True),
            threading.Thread(target=ask, args=("DELETE", "/v1/styles/ours"), daemon=True),
        ]
        asking[0].start()
        running.until(lambda: running.service.bakes)
        asking[1].start()
        asking[1].join(0.5)
        os.close(held)
        for one in asking:
            one.join(WAIT / 4)
        assert ended == {"POST": 499, "DELETE": 200}


def test_a_folder_of_styles_that_is_gone_is_no_error_of_the_service(tmp_path):
    folder = tmp_path / "styles"
    folder.mkdir()
    with bench(styles_dir=str(folder)) as running:
        folder.rmdir()
        body = json.dumps({"name": "ours", "image": base64.b64encode(PICTURE).decode()})
        status, _, reply = running.call("POST", "/v1/styles", body, {"content-type": "application/json"})
        assert status == 409 and json.loads(reply)["error"]["code"] == "styles_read_only", reply
        assert running.call("GET", "/v1/styles")[0] == running.draw()[0] == 200
