"""Control pictures over HTTP, in our words and in those of A1111's extension for ControlNet."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

import stylefast as sf
from stylefast.models.checkpoint import TINY
from tests.serving.test_a1111 import OPEN_WEBUI, api, post  # noqa: F401
from tests.support.small_control import edges

LINES = edges(3, (64, 64))
EDGES = TINY / "control" / "edges"


def in_text(picture) -> str:
    stream = BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def opened(text: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(text)))


@pytest.fixture(scope="module")
def engine():
    engine = sf.Engine.from_pretrained("tiny", device="cpu", dtype="float32")
    engine.controls.add(EDGES, "edges")
    yield engine
    engine.close()


def generated(server, control, **more):
    body = {"prompt": "a cat", "size": "64x64", "response_format": "b64_json"}
    own = {"seed": 7, "steps": 3, "control": control} | more
    return post(server, "/v1/images/generations", body | {"stylefast": own})


def test_control_pictures_of_a_request_steer_its_picture_and_are_in_its_record(server, engine):
    control = {"image": in_text(LINES), "network": "edges", "weight": 1.5, "window": [0, 0.8]}
    status, reply = generated(server, control)
    assert status == 200, reply
    picture = opened(reply["data"][0]["b64_json"])
    ours = sf.Control(LINES, "edges", weight=1.5, window=(0, 0.8))
    expected = engine.generate("a cat", seed=7, steps=3, control=ours).images[0]
    assert np.abs(np.array(picture.convert("RGB"), dtype=int) - np.array(expected, dtype=int)).max() <= 1
    record = json.loads(picture.text["stylefast"])
    (written,) = record["call"]["requests"][0]["control"]
    assert written["network"] == "edges" and "png" in written["image"] and "edges" in record["control_nets"]
    again = [{"image": f"data:image/png;base64,{in_text(LINES)}", "reference": "same"}]
    status, reply = generated(server, again, style={"kind": "StyleAligned", "prompt": "a star"})
    assert status == 200, reply


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"image": "/etc/passwd"}, "is not base64"),
        ({"image": {"path": "/etc/passwd"}}, "can't name files of the server"),
        ({"network": "edges"}, "a picture in base64"),
        ("x", "a picture in base64"),
        ({"image": in_text(LINES), "network": "edge"}, "did you mean 'edges'"),
        ({"image": in_text(LINES), "weight": 99}, "weight is 99"),
        ({"image": in_text(LINES), "window": [0.4, 0.5]}, "none of the 3 steps"),
        ({"image": in_text(LINES), "guess_mode": True}, "guess_mode is for ControlNets"),
        ({"image": in_text(LINES), "other": True}, "other"),
        ({"image": in_text(LINES), "reference": "same"}, "no style that reads a reference"),
        ([{"image": in_text(LINES)}] * 40, "control has 40 pictures"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(server, control, message):
    status, reply = generated(server, control)
    assert status == 400 and message in reply["error"]["message"], reply


def unit(**changes):
    own = {"enabled": True, "module": "none", "model": "edges [a1b2c3d4]", "weight": 1.2, "image": in_text(LINES)}
    return {"alwayson_scripts": {"controlnet": {"args": [own | {"resize_mode": 1, "pixel_perfect": True} | changes]}}}


def test_a_unit_of_controlnet_is_a_control_picture(server):
    def drawn(change):
        status, reply = post(server, "/sdapi/v1/txt2img", {**OPEN_WEBUI, "seed": 7} | change)
        assert status == 200, reply
        return opened(reply["images"][0]).tobytes()

    same = unit(module="None", model="edges", union_control_type="Unknown")
    assert drawn(unit()) == drawn(same) != drawn({})
    assert drawn(unit()) != drawn(unit(guidance_end=0.5)) != drawn(unit(weight=0.3))
    wide = unit(image=in_text(edges(3, (96, 64))))
    assert drawn(unit(image=in_text(edges(3, (96, 64))), resize_mode="Just Resize")) != drawn(wide)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "depth"}, "has the model 'depth'; there are edges"),
        ({"module": "canny"}, "has the module 'canny'"),
        ({"control_mode": "My prompt is more important"}, "has the control_mode"),
        ({"resize_mode": 2}, "has the resize_mode 2"),
        (
            {"union_control_type": "Fog"},
            "has the union_control_type 'Fog'; it must be one of openpose, depth, soft edge",
        ),
        ({"union_control_type": "Hard Edge"}, "has mode=3, but the network 'edges' reads pictures of one type"),
        ({"image": "x"}, "not base64"),
    ],
)
def test_units_that_can_not_be_done_are_refused(server, change, words):
    status, reply = post(server, "/sdapi/v1/txt2img", OPEN_WEBUI | unit(**change))
    assert status == 400 and words in reply["error"]["message"], reply
