"""Checks of the operator's own: they refuse, replace, fail and crash, and nothing passes without them."""

import asyncio
import base64
import json
import re
import threading
import urllib.request
from io import BytesIO

import openai
import pytest
from PIL import Image

from stylefast.errors import InvalidRequest
from stylefast.serving import safety
from stylefast.serving.media import Pixels
from stylefast.serving.replies import ApiError
from stylefast.serving.safety import Call, CheckFailed, Safety
from stylefast.serving.settings import ServeSettings
from tests.serving.conftest import WAIT, serving
from tests.serving.test_service import call, error_of

CHECKS = """
import os
import time

from PIL import Image

from stylefast.serving.safety import Refusal


class Checks:
    def check_request(self, call):
        prompt = call.requests[0]["prompt"]
        if "forbidden" in prompt:
            return Refusal(f"no {call.owner}, {len(call.uploads)} files", param="prompt")
        if "raise" in prompt:
            raise ValueError(prompt)
        if "crash" in prompt:
            os._exit(3)
        if "hang" in prompt:
            time.sleep(600)
        if "odd" in prompt:
            return "no"

    def check_picture(self, image, call):
        prompt = call.requests[call.index]["prompt"]
        if "previewed" in prompt and call.preview:
            return Refusal("the preview did not pass")
        if "ugly" in prompt and not call.preview:
            return Refusal("the picture did not pass")
        if "grey" in prompt:
            return Image.new("L", image.size, 128)
        if "small" in prompt:
            return Image.new("RGB", (8, 8))
        return image


made = Checks()
nothing = object()


class OnlyPictures:
    def check_picture(self, image, call):
        image.paste((1, 2, 3), (0, 0, 4, 4))
        return image


def broken():
    raise RuntimeError("secret text")
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """A folder with the module own_checks; servers are started there."""
    folder = tmp_path_factory.mktemp("checks")
    (folder / "own_checks.py").write_text(CHECKS)
    return folder


@pytest.fixture
def load(module, monkeypatch):
    monkeypatch.chdir(module)
    loaded = []

    def made(name):
        loaded.append(Safety(f"own_checks:{name}"))
        return loaded[-1]

    yield made
    for one in loaded:
        one.close()


def asked(prompt, **more):
    return Call([{"prompt": prompt}], "alice", **more)


def pixels():
    return Pixels(16, 16, bytes(16 * 16 * 3))


def test_requests_and_pictures_are_refused_replaced_or_passed(load):
    checks = load("Checks")

    async def run():
        await checks.check_request(asked("a fish"))
        with pytest.raises(ApiError) as caught:
            await checks.check_request(asked("forbidden", uploads=[b"a", b"b"]))
        error = caught.value
        assert error.body()["error"] == {
            "message": "no alice, 2 files",
            "type": "invalid_request_error",
            "param": "prompt",
            "code": "content_policy_violation",
        }
        plain = pixels()
        assert await checks.check_picture(plain, asked("a fish")) is plain
        assert (await checks.check_picture(plain, asked("grey"))).content == bytes([128]) * 768
        with pytest.raises(ApiError, match="the picture did not pass"):
            await checks.check_picture(plain, asked("ugly"))

    asyncio.run(run())


def test_errors_are_of_one_call_and_say_nothing_of_its_prompt(load):
    checks = load("made")

    async def run():
        for prompt, said in (("raise", "ValueError in"), ("odd", "TypeError in")):
            with pytest.raises(CheckFailed) as caught:
                await checks.check_request(asked(f"{prompt} hidden words"))
            assert said in str(caught.value) and "hidden" not in str(caught.value)
        with pytest.raises(CheckFailed, match="TypeError"):
            await checks.check_picture(pixels(), asked("small"))
        results = await asyncio.gather(
            *(checks.check_request(asked(prompt)) for prompt in ("a", "raise", "b", "forbidden", "c")),
            return_exceptions=True,
        )
        assert [type(one) for one in results] == [type(None), CheckFailed, type(None), ApiError, type(None)]

    asyncio.run(run())


def test_after_a_crash_or_a_hang_they_are_loaded_again(load, monkeypatch):
    checks = load("Checks")

    async def run():
        with pytest.raises(CheckFailed, match="its process died"):
            await checks.check_request(asked("crash"))
        await checks.check_request(asked("a fish"))
        monkeypatch.setattr(safety, "CHECK_SECONDS", 0.2)
        with pytest.raises(CheckFailed, match="no answer within 0.2 seconds"):
            await checks.check_request(asked("hang"))
        monkeypatch.setattr(safety, "CHECK_SECONDS", 60.0)
        with pytest.raises(ApiError):
            await checks.check_request(asked("forbidden"))

    asyncio.run(run())


def test_one_method_is_enough_and_a_picture_may_be_changed_in_place(load):
    checks = load("OnlyPictures")

    async def run():
        await checks.check_request(asked("forbidden"))
        assert (await checks.check_picture(pixels(), asked("a"))).content[:3] == bytes([1, 2, 3])

    asyncio.run(run())


@pytest.mark.parametrize(
    "name, said",
    [
        ("own_checks:nothing", "neither check_request nor check_picture"),
        ("own_checks:broken", "RuntimeError in"),
        ("own_checks:missing", "AttributeError"),
        ("no_such_module:x", "ModuleNotFoundError"),
        ("os:_exit", "TypeError|died"),
    ],
)
def test_what_can_not_be_loaded_is_refused_at_once(module, monkeypatch, name, said):
    monkeypatch.chdir(module)
    with pytest.raises(InvalidRequest, match=f"--safety '{name}': .*({said})") as caught:
        Safety(name)
    assert "secret text" not in str(caught.value)


def test_the_name_must_be_a_module_and_an_attribute():
    for name in ("checks", "a:b:c", "a b:c", "../x:y", ":x"):
        with pytest.raises(InvalidRequest, match="MODULE:ATTRIBUTE"):
            ServeSettings.of({"safety": name}, {})


# a running server


@pytest.fixture(scope="module")
def checked(module):
    import os

    path = os.pathsep.join([str(module), os.environ.get("PYTHONPATH", "")])
    styles = module / "styles"
    styles.mkdir()
    with serving("--safety", "own_checks:Checks", "--styles", styles, env={"PYTHONPATH": path}) as running:
        yield running


@pytest.fixture(scope="module")
def draw(checked):
    client = openai.OpenAI(base_url=checked.url + "/v1", api_key="none", timeout=WAIT, max_retries=0)

    def made(prompt, **more):
        return client.images.generate(prompt=prompt, extra_body={"stylefast": {"steps": 6}}, **more)

    return made


@pytest.mark.parametrize("prompt", ["forbidden", "ugly"])
def test_a_refusal_is_openais_error_also_in_a_stream(draw, prompt):
    with pytest.raises(openai.BadRequestError) as caught:
        draw(prompt)
    assert (caught.value.code, caught.value.type) == ("content_policy_violation", "invalid_request_error")
    with pytest.raises(openai.APIError) as caught:
        list(draw(prompt, stream=True, partial_images=1))
    assert caught.value.code == "content_policy_violation"
    assert draw("a fish").data[0].b64_json


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_picture_was_refused_says_so_afterwards(checked, draw, stream):
    number = f"refused-{stream}"
    with pytest.raises(openai.APIError):
        list(draw("ugly", stream=stream, extra_headers={"x-request-id": number}))
    shown = json.loads(checked.get(f"/v1/images/{number}")[1])
    assert shown["status"] == "failed" and shown["error"]["code"] == "content_policy_violation"


def test_a_refused_preview_ends_the_request(checked, draw):
    with pytest.raises(openai.APIError, match="the preview did not pass"):
        list(draw("previewed", stream=True, partial_images=3, extra_headers={"x-request-id": "previewed"}))
    shown = json.loads(checked.get("/v1/images/previewed")[1])
    assert shown["status"] in ("cancelled", "failed")  # the latter if the picture was done already


def test_a_replaced_picture_has_no_record_but_the_mark(draw):
    image = Image.open(BytesIO(base64.b64decode(draw("grey").data[0].b64_json)))
    assert image.convert("L").getextrema() == (128, 128)
    assert not {"stylefast", "parameters"} & set(image.text) and "XML:com.adobe.xmp" in image.text


def test_an_error_in_a_check_costs_no_other_request(checked, draw):
    ended = {}

    def ask(prompt):
        try:
            ended[prompt] = bool(draw(prompt).data[0].b64_json)
        except openai.APIError as error:
            ended[prompt] = error

    asking = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("a", "raise the veil", "b", "c")]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    failed = ended.pop("raise the veil")
    assert failed.status_code == 500 and failed.code == "internal_error" and ended == {"a": True, "b": True, "c": True}
    assert "the veil" not in checked.log and "ValueError in" in checked.log


def test_the_other_routes_are_checked_and_refusals_counted(checked):
    def count():
        page = checked.get("/metrics")[1].decode()
        return float(re.search(r'safety_refusals_total{check="request"} (\S+)', page)[1])

    before, headers = count(), {"content-type": "application/json"}
    body = json.dumps({"prompt": "forbidden", "steps": 1})
    status, _, reply = call(checked, "POST", "/sdapi/v1/txt2img", body, headers)
    assert status == 400 and error_of(reply)["code"] == "content_policy_violation"
    asked = urllib.request.Request(f"{checked.url}/sdapi/v1/txt2img", b'{"prompt": "grey", "steps": 1}', headers)
    with urllib.request.urlopen(asked, timeout=WAIT) as answer:
        found = json.load(answer)
    assert json.loads(found["info"])["infotexts"] == [""]
    body = json.dumps({"name": "ours", "method": "aligned", "prompt": "forbidden"})
    status, _, reply = call(checked, "POST", "/v1/styles", body, headers)
    assert status == 400 and error_of(reply)["code"] == "content_policy_violation"
    assert b"ours" not in checked.get("/v1/styles")[1]
    assert count() == before + 2


def test_a_style_takes_no_address_either_unless_that_is_allowed(checked):
    body = json.dumps({"name": "ours", "image": {"image_url": f"{checked.url}/a.png"}})
    status, _, reply = call(checked, "POST", "/v1/styles", body, {"content-type": "application/json"})
    assert status == 400 and error_of(reply)["code"] == "url_not_allowed"


def test_the_example_of_the_documentation(checkout, tmp_path, monkeypatch):
    page = (checkout / "docs" / "serving-http.md").read_text()
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "check_picture" in block]
    (tmp_path / "checks.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    checks = Safety(*re.findall(r"--safety (\S+:\S+)\n", page))

    async def run():
        await checks.check_request(asked("a fish"))
        with pytest.raises(ApiError, match="no weapons"):
            await checks.check_request(asked("Napalm at dawn"))
        with pytest.raises(ApiError, match="did not pass"):
            await checks.check_picture(pixels(), asked("a fish"))
        bright = Pixels(16, 16, bytes([200]) * 768)
        assert await checks.check_picture(bright, asked("a fish")) is bright

    try:
        asyncio.run(run())
    finally:
        checks.close()
