"""A1111's routes, by a client package of its users, unmodified, and by what Open WebUI and SillyTavern send."""

import base64
import json
import time
import urllib.request
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
import webuiapi
from PIL import Image

import stylefast
from stylefast.serving import a1111

OPEN_WEBUI = {  # as its image settings send it
    "prompt": "a fish",
    "negative_prompt": "",
    "batch_size": 1,
    "width": 64,
    "height": 64,
    "steps": 2,
    "cfg_scale": 5.0,
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
}


@pytest.fixture(scope="module")
def api(server):
    place = urlsplit(server.url)
    return webuiapi.WebUIApi(host=place.hostname, port=place.port)


def post(server, path, body):
    request = urllib.request.Request(
        server.url + path, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.loads(reply.read())
    except HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_picture_by_the_client(api):
    found = api.txt2img(prompt="a fish", seed=7, steps=2, width=64, height=64, sampler_name="Euler", cfg_scale=5)
    assert found.image.size == (64, 64) and found.info["seed"] == 7 and found.info["all_seeds"] == [7]
    assert found.image.info["parameters"].startswith("a fish\nSteps: 2, Sampler: Euler")
    assert found.info["infotexts"][0] == found.image.info["parameters"]


def test_tags_and_styles_are_those_of_the_engine(api, client):
    body = dict(seed=7, steps=2, width=64, height=64, cfg_scale=5, sampler_name="Euler", scheduler="Automatic")
    tagged = api.txt2img(prompt="a (fish:1.2) <lora:gold:0.5> <style:neon>", **body)
    named = api.txt2img(prompt="a (fish:1.2) <lora:gold:0.5>", styles=["neon"], **body)
    plain = api.txt2img(prompt="a (fish:1.2)", **body)
    assert tagged.image.tobytes() == named.image.tobytes() != plain.image.tobytes()


def test_lists_that_clients_ask_for(api):
    assert {"Euler", "Euler a", "DPM++ 2M", "UniPC"} <= {sampler["name"] for sampler in api.get_samplers()}
    assert "tiny" in api.util_get_model_names() and api.get_options()["sd_model_checkpoint"] == "tiny"
    assert api.get_progress()["progress"] == 0
    assert {lora["name"] for lora in api.get_loras()} >= {"gold", "pixel", "sunset"}


def test_open_webui(server):
    assert post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "tiny"}) == (200, {})
    status, reply = post(server, "/sdapi/v1/txt2img", OPEN_WEBUI)
    assert status == 200 and len(reply["images"]) == 1 and json.loads(reply["info"])["width"] == 64


# as SillyTavern's page makes it, and its server passes it on; what is undefined there is not in the JSON
SILLY_TAVERN = {
    "url": "http://localhost:8000",
    "auth": "user:a password",
    "prompt": "a fish",
    "negative_prompt": "",
    "sampler_name": "DDIM",
    "scheduler": "normal",
    "steps": 2,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": "Latent",
    "hr_scale": 1.0,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}


def test_silly_tavern(server):
    status, reply = post(server, "/sdapi/v1/txt2img", SILLY_TAVERN)
    assert status == 200 and len(reply["images"]) == 1, reply
    assert "a password" not in json.dumps(reply) and reply["parameters"]["steps"] == 2


def test_clip_skip_is_taken_where_the_overrides_say_nothing(server):
    body = {**OPEN_WEBUI, "seed": 1, "clip_skip": 3}
    for change, layers in (({}, 3), ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, 2)):
        status, reply = post(server, "/sdapi/v1/txt2img", body | change)
        assert status == 200 and json.loads(reply["info"])["clip_skip"] == layers


def test_a_model_that_is_chosen_among_the_options_is_used_until_another_is(server):
    """Open WebUI sends back all options that it was told, with another model."""

    def options():
        return json.loads(server.get("/sdapi/v1/options")[1])

    body = {**OPEN_WEBUI, "seed": 7}
    styled = post(server, "/sdapi/v1/txt2img", {**body, "styles": ["neon"]})[1]["images"]
    plain = post(server, "/sdapi/v1/txt2img", body)[1]["images"]
    try:
        assert post(server, "/sdapi/v1/options", options() | {"sd_model_checkpoint": "tiny/neon"}) == (200, {})
        assert options()["sd_model_checkpoint"] == "tiny/neon"
        assert post(server, "/sdapi/v1/txt2img", body)[1]["images"] == styled
        own = {"override_settings": {"sd_model_checkpoint": "tiny"}}
        assert post(server, "/sdapi/v1/txt2img", body | own)[1]["images"] == plain
        status, reply = post(server, "/sdapi/v1/options", {"sd_vae": "other"})
        assert status == 400 and reply["error"]["param"] == "sd_vae"
    finally:
        assert post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "tiny"}) == (200, {})
    assert post(server, "/sdapi/v1/txt2img", body)[1]["images"] == plain


def test_a_style_may_have_a_part_of_its_strength(server):
    body = {**OPEN_WEBUI, "seed": 7, "batch_size": 2}

    def drawn(prompt):
        status, reply = post(server, "/sdapi/v1/txt2img", {**body, "prompt": prompt})
        assert status == 200, reply
        return reply["images"]

    whole, half, none = (drawn(f"a fish <style:neon{text}>") for text in ("", ":0.5", ":0.0"))
    assert drawn("a fish <style:neon:1>") == whole and len({*whole, *half, *none}) == 6
    for prompt, words in (("a <style:neon:x>", "has the strength 'x'"), ("a <style:neon:2.5>", "from 0 to 2")):
        status, reply = post(server, "/sdapi/v1/txt2img", {**body, "prompt": prompt})
        assert status == 400 and reply["error"]["param"] == "prompt" and words in reply["error"]["message"]


@pytest.mark.parametrize(
    "text", [" " * 31_000 + "<style:", "<style:" * 4000, " <style" * 4000, "<style:" + "a" * 31_000, "\t " * 15_000]
)
def test_looking_for_tags_takes_no_longer_than_reading(text):
    began = time.process_time()
    a1111._style_tags(text)
    assert time.process_time() - began < 0.2


def test_tags_take_the_blanks_in_front_with_them():
    found = a1111._style_tags("a fish  <style:neon:0.5>, blue <style:chalk> sky<style:glass:>")
    assert found == ("a fish, blue sky", [("neon", 0.5), ("chalk", 1.0), ("glass", 1.0)])


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "sampler_name"])
def test_texts_have_a_limit(server, field):
    status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, field: "a" * 32_001})
    assert status == 400 and reply["error"]["param"] == field and "32001 characters" in reply["error"]["message"]


def unit(**changes):
    path = stylefast.Engine.from_pretrained("tiny").references()["neon"]
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    own = {"enabled": True, "module": "ip-adapter_clip_sdxl", "model": "any [1234]", "weight": 0.5, "image": picture}
    return {"alwayson_scripts": {"ControlNet": {"args": [own | changes, {"enabled": False}]}}}


def test_controlnets_ip_adapter_is_instant_style(server):
    body = {**OPEN_WEBUI, "seed": 7}

    def drawn(change):
        status, reply = post(server, "/sdapi/v1/txt2img", body | change)
        assert status == 200, reply
        return Image.open(BytesIO(base64.b64decode(reply["images"][0]))).tobytes()

    same = {"prompt": "a fish <style:neon:0.5>"}
    assert drawn(unit()) == drawn(same) != drawn({}) == drawn({"alwayson_scripts": {"ADetailer": {"args": []}}})
    assert drawn(unit()) != drawn(unit(guidance_end=0.4)) != drawn(unit(weight=1))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"module": "canny"}, "has the module 'canny'"),
        ({"module": None}, "has the model 'any [1234]'; there are edges"),
        ({"control_mode": 2}, "has the control_mode 2"),
        ({"advanced_weighting": [1]}, "has the advanced_weighting"),
        ({"image": None}, "picture in base64"),
        ({"image": {"image": "eA==", "mask": "eA=="}}, "picture in base64"),
        ({"weight": "much"}, "weight is 'much'"),
    ],
)
def test_other_units_of_controlnet_are_refused(server, change, words):
    status, reply = post(server, "/sdapi/v1/txt2img", OPEN_WEBUI | unit(**change))
    assert status == 400 and words in reply["error"]["message"], reply


def test_several_pictures(server):
    status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, "batch_size": 2, "n_iter": 2, "seed": 3})
    assert status == 200 and len(reply["images"]) == 4 and json.loads(reply["info"])["all_seeds"] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts"),
        ({"subseed_strength": "x"}, "subseed_strength"),
        ({"stepz": 5}, "stepz"),
        ({"steps": 0}, "steps"),
        ({"width": "64"}, "width"),
        ({"cfg_scale": "x"}, "cfg_scale"),
        ({"styles": ["neom"]}, "styles"),
        ({"batch_size": 16, "n_iter": 2}, "n_iter"),
        ({"override_settings": {"eta_noise_seed_delta": 3}}, "override_settings.eta_noise_seed_delta"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(server, change, param):
    status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, **change})
    assert status == 400 and reply["error"]["param"] == param, reply


def test_unknown_samplers_and_models_are_refused(server):
    status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, "sampler_name": "Heun"})
    assert status == 400 and "Heun" in reply["error"]["message"]
    status, reply = post(server, "/sdapi/v1/options", {"sd_model_checkpoint": "other"})
    assert status == 404 and reply["error"]["code"] == "model_not_found"
