"""Replies with addresses in place of pictures: nobody guesses them, and they take a bounded room."""

import json
import re
import time
import urllib.request
from io import BytesIO
from urllib.parse import urlsplit

import openai
import pytest
from PIL import Image

from stylefast.errors import InvalidRequest
from stylefast.serving import links
from stylefast.serving.links import PATH, Links
from stylefast.serving.replies import ApiError
from stylefast.serving.settings import ServeSettings
from tests.serving.bench import bench
from tests.serving.conftest import WAIT, serving
from tests.serving.test_service import KEYS, call, error_of


def test_paths_are_long_random_and_those_that_need_no_key():
    kept = Links(60, 1000)
    paths = [path for _ in range(50) for path in kept.add([b"a", b"b"], "png")]
    assert len(set(paths)) == 100 and all(PATH.fullmatch(path) for path in paths)
    assert kept.find(paths[3]).content == b"b" and kept.find(paths[3]).form == "png"
    for path in (
        "/v1/images/img_short/0.png",
        "/v1/images/generations",
        paths[0] + "x",
        paths[0].replace("0.png", "0.svg"),
    ):
        assert not PATH.fullmatch(path)


def test_the_oldest_go_where_the_room_ends():
    kept = Links(60, 100)
    first, second = kept.add([bytes(40)], "png"), kept.add([bytes(40)], "png")
    (third,) = kept.add([bytes(40)], "jpeg")
    assert len(kept) == 2 and kept.find(third).form == "jpeg" and kept.find(second[0])
    with pytest.raises(ApiError) as caught:
        kept.find(first[0])
    assert caught.value.status == 404
    with pytest.raises(ApiError, match="101 bytes, and this server keeps 100"):
        kept.add([bytes(101)], "png")
    assert len(kept) == 2
    kept.add([bytes(100)], "png")
    assert len(kept) == 1


def test_they_expire(monkeypatch):
    kept = Links(60, 100)
    (path,) = kept.add([b"a"], "png")
    now = time.monotonic()
    monkeypatch.setattr(links.time, "monotonic", lambda: now + 61)
    with pytest.raises(ApiError, match="kept for 60 seconds"):
        kept.find(path)
    assert len(kept) == 0


def test_addresses_of_a_running_server():
    with serving("--public-url", "https://pictures.example.com/draw/", "--no-warm-up", env=KEYS) as server:
        alice = openai.OpenAI(base_url=server.url + "/v1", api_key="0123456789abcdef", timeout=WAIT, max_retries=0)
        reply = alice.images.generate(
            prompt="a fish", n=2, response_format="url", output_format="jpeg", extra_body={"steps": 1}
        )
        found = [one.url for one in reply.data]
        assert all(one.b64_json is None for one in reply.data) and len(set(found)) == 2
        for url in found:
            place = re.sub("^https://pictures.example.com/draw/", f"{server.url}/", url)
            with urllib.request.urlopen(place, timeout=WAIT) as answer:  # without a key
                assert Image.open(BytesIO(answer.read())).format == "JPEG"
                assert answer.headers["content-type"] == "image/jpeg"
                assert answer.headers["x-content-type-options"] == "nosniff"
            path = urlsplit(place).path
            status, headers, body = call(server, "HEAD", path)
            assert status == 200 and body == b"" and int(headers["content-length"]) > 100
            assert call(server, "DELETE", path)[0] == 401
        wrong = f"/v1/images/img_{'A' * 32}/0.png"
        status, _, body = call(server, "GET", wrong)
        assert status == 404 and error_of(body)["code"] == "not_found"
        assert call(server, "GET", wrong.replace("/0.png", "/0.svg"))[0] == 401
        assert path.split("/")[3] not in server.log


def test_the_usual_address_is_that_of_the_request_and_streams_have_none(server, client):
    reply = client.images.generate(prompt="a fish", response_format="url", extra_body={"steps": 1})
    assert reply.data[0].url.startswith(f"{server.url}/v1/images/img_")
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a fish", response_format="url", stream=True)
    assert caught.value.param == "response_format"


def test_the_public_address_must_be_one():
    for url in ("pictures.example.com", "ftp://a", "https://a/?x", "https://a b", "javascript:alert(1)"):
        with pytest.raises(InvalidRequest, match="public_url is"):
            ServeSettings.of({"public_url": url}, {})


def test_clients_that_name_an_old_model_get_addresses_unless_they_ask_otherwise():
    asked = (
        ({"model": "dall-e-2"}, "url"),
        ({"model": "dall-e-3", "response_format": "b64_json"}, "b64_json"),
        ({"model": "gpt-image-1"}, "b64_json"),
        ({}, "b64_json"),
    )
    with bench(accept_any_model=True) as running:
        for body, field in asked:
            (one,) = json.loads(running.draw(**body)[2])["data"]
            assert list(one) == [field]
        assert b'"b64_json"' in running.draw(model="dall-e-2", stream=True)[2]
