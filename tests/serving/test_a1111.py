"""A1111's routes, by a client package of its users, unmodified, and by what Open WebUI and SillyTavern send."""

import json
import urllib.request
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
import webuiapi

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


def test_several_pictures(server):
    status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, "batch_size": 2, "n_iter": 2, "seed": 3})
    assert status == 200 and len(reply["images"]) == 4 and json.loads(reply["info"])["all_seeds"] == [3, 4, 5, 6]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"enable_hr": True}, "enable_hr"),
        ({"restore_faces": True}, "restore_faces"),
        ({"alwayson_scripts": {"controlnet": {}}}, "alwayson_scripts"),
        ({"subseed_strength": 0.5}, "subseed_strength"),
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
    status, reply = post(server, "/sdapi/v1/img2img", {"init_images": []})
    assert status == 400 and "not supported" in reply["error"]["message"]
