"""Pictures that requests begin with, as clients of both interfaces send them, and the masks in their conventions."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

import stylefast as sf
from stylefast.models.checkpoint import TINY
from stylefast.record import from_record
from stylefast.serving import media
from stylefast.serving.starts import size_near
from tests.serving.test_a1111 import api, post  # noqa: F401

PICTURE = TINY / "references" / "neon.png"
SIZE = (64, 64)
INSIDE = (20, 20, 44, 44)
FAR = 10  # pixels from the mask's edge, more than the margin
OURS = {"seed": 7, "steps": 4, "size": SIZE, "spacing": "linspace", "prompt_syntax": "a1111"}  # what BODY says
BODY = {"prompt": "a cat", "seed": 7, "steps": 4, "width": 64, "height": 64, "cfg_scale": 5}
BODY |= {"sampler_name": "Euler", "scheduler": "Automatic"}


def picture():
    return Image.open(PICTURE).convert("RGB").resize(SIZE)


def in_text(image):
    return base64.b64encode(png(image)).decode()


def png(image):
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def white_square():
    mask = Image.new("L", SIZE, 0)
    ImageDraw.Draw(mask).rectangle(INSIDE, fill=255)
    return mask


def clear_square():
    """A mask as OpenAI's: what is transparent changes."""
    mask = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle(INSIDE, fill=(0, 0, 0, 0))
    return mask


def assert_repainted(made, inverted=False):
    made, before = np.array(made.convert("RGB")), np.array(picture())
    changed = (made != before).any(-1)
    left, top, right, bottom = INSIDE
    outside = np.ones(SIZE, dtype=bool)
    outside[top - FAR : bottom + FAR + 1, left - FAR : right + FAR + 1] = False
    inside = np.zeros(SIZE, dtype=bool)
    inside[top + FAR : bottom - FAR, left + FAR : right - FAR] = True
    kept, drawn = (inside, outside) if inverted else (outside, inside)
    assert not changed[kept].any() and changed[drawn].mean() > 0.8


@pytest.fixture(scope="module")
def engine():
    with sf.Engine.from_pretrained("tiny", device="cpu") as engine:
        yield engine


def test_img2img_by_the_client_is_the_engines_image_to_image(api, engine):  # noqa: F811
    found = api.img2img(images=[picture()], denoising_strength=0.5, **BODY)
    request = sf.Request("a cat", image=picture(), strength=0.5, **OURS)
    assert found.image.tobytes() == engine.generate(request).images[0].tobytes()
    assert "Denoising strength: 0.5" in found.image.info["parameters"]
    record = json.loads(found.image.info["stylefast"])["call"]
    assert engine.generate(from_record(record)).images[0].tobytes() == found.image.tobytes()


def test_img2img_repaints_what_is_white(api, server):  # noqa: F811
    found = api.img2img(images=[picture()], mask_image=white_square(), mask_blur=0, denoising_strength=1.0, **BODY)
    assert_repainted(found.image)
    assert any("inpaint_full_res" in warning for warning in found.info["warnings"])
    body = {**BODY, "init_images": [in_text(picture())], "mask": in_text(white_square()), "denoising_strength": 1}
    more = {"mask_blur": 0, "inpainting_mask_invert": 1, "inpaint_full_res": False, "include_init_images": True}
    status, reply = post(server, "/sdapi/v1/img2img", {**body, **more})
    assert status == 200 and json.loads(reply["info"])["warnings"] == []
    assert reply["init_images"] == body["init_images"] and "init_images" not in reply["parameters"]
    assert_repainted(Image.open(BytesIO(base64.b64decode(reply["images"][0]))), inverted=True)


def test_pictures_of_another_shape_are_stretched_or_cropped(server, engine):
    wide = Image.open(PICTURE).convert("RGB").resize((128, 64))
    body = {**BODY, "init_images": [in_text(wide)], "denoising_strength": 0.5}
    drawn = {}
    for mode, expected in ((0, wide.resize(SIZE, Image.Resampling.LANCZOS)), (1, wide)):
        status, reply = post(server, "/sdapi/v1/img2img", {**body, "resize_mode": mode})
        drawn[mode] = Image.open(BytesIO(base64.b64decode(reply["images"][0])))
        request = sf.Request("a cat", image=expected, strength=0.5, **OURS)
        assert drawn[mode].tobytes() == engine.generate(request).images[0].tobytes()
    assert drawn[0].tobytes() != drawn[1].tobytes()


def test_noise_is_varied_by_a1111s_subseed(api, engine):  # noqa: F811
    found = api.txt2img(subseed=9, subseed_strength=0.5, **BODY)
    varied = {"variation_seed": 9, "variation_strength": 0.5}
    request = sf.Request("a cat", **OURS, **varied)
    assert found.image.tobytes() == engine.generate(request).images[0].tobytes()
    assert (found.info["subseed"], found.info["subseed_strength"]) == (9, 0.5)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"init_images": []}, "init_images"),
        ({"init_images": "eA=="}, "init_images"),
        ({"init_images": ["eA==", "eA=="]}, "init_images"),
        ({"init_images": ["eA=="]}, "init_images"),
        ({"mask": "no base64"}, "mask"),
        ({"resize_mode": 2}, "resize_mode"),
        ({"latent_mask": "eA=="}, "latent_mask"),
        ({"inpainting_fill": 2}, "inpainting_fill"),
        ({"denoising_strength": "much"}, "denoising_strength"),
        ({"denoising_strength": 0}, None),
        ({"upside_down": True}, "upside_down"),
    ],
)
def test_what_img2img_can_not_do_is_refused_by_name(server, more, param):
    body = {**BODY, "init_images": [in_text(picture())], **more}
    status, reply = post(server, "/sdapi/v1/img2img", body)
    assert status == 400 and (param is None or reply["error"]["param"] == param), reply


def test_an_edit_with_a_mask_changes_what_is_transparent(client):
    found = client.images.edit(
        model="tiny",
        image=("a.png", png(picture())),
        mask=("m.png", png(clear_square())),
        prompt="a cat",
        quality="low",
    )
    assert_repainted(Image.open(BytesIO(base64.b64decode(found.data[0].b64_json))))


def test_an_edit_with_a_strength_begins_with_its_first_picture_and_takes_style_from_the_others(client, engine):
    given = {"seed": 3, "steps": 4, "strength": 0.5, "method": "aligned"}
    files = [("a.png", png(picture())), ("b.png", png(Image.open(TINY / "references" / "woodcut.png")))]
    found = client.images.edit(model="tiny", image=files, prompt="a cat", extra_body={"stylefast": given})
    style = sf.StyleAligned(Image.open(TINY / "references" / "woodcut.png"), scale=0.8)
    request = sf.Request("a cat", seed=3, steps=4, size=SIZE, image=picture(), strength=0.5, style=style)
    made = Image.open(BytesIO(base64.b64decode(found.data[0].b64_json)))
    assert made.tobytes() == engine.generate(request).images[0].tobytes()


def test_the_size_of_an_edit_is_of_its_pictures_shape_and_the_models_area():
    def size(width, height, orientation=None):
        image, stream = Image.new("RGB", (width, height)), BytesIO()
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        image.save(stream, "JPEG", exif=exif)
        return size_near(media.upload(stream.getvalue(), "image"), (1024, 1024))

    assert size(4000, 3000) == (1184, 888) and size(4000, 3000, orientation=6) == (888, 1184)
    assert size(640, 480) == (640, 480) and size(1000, 40) == (1000, 40)


def test_edits_and_generations_refuse_what_has_no_picture_or_no_hole(server):
    url = "/v1/images/edits"
    status, reply = post(server, url, {"prompt": "a", "image": in_text(picture()), "mask": in_text(white_square())})
    assert status == 400 and reply["error"]["param"] == "mask" and "transparent" in reply["error"]["message"]
    status, reply = post(server, url, {"prompt": "a", "mask": in_text(clear_square())})
    assert status == 400 and reply["error"]["code"] == "missing_image"
    status, reply = post(server, "/v1/images/generations", {"prompt": "a", "stylefast": {"strength": 0.5}})
    assert status == 400 and reply["error"]["code"] == "no_image"
    status, reply = post(server, "/v1/images/generations", {"prompt": "a", "mask": in_text(clear_square())})
    assert status == 400 and reply["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize("window", ["64x64", [64, 64]])
def test_a_panorama_is_drawn_in_windows(server, engine, window):
    given = {"seed": 3, "steps": 4, "window": window, "window_stride": 32, "wrap": True}
    status, reply = post(
        server, "/v1/images/generations", {"prompt": "a cat", "size": "128x64", "stylefast": given | {"style": "neon"}}
    )
    assert status == 200, reply
    made = Image.open(BytesIO(base64.b64decode(reply["data"][0]["b64_json"])))
    assert made.size == (128, 64)
    status, reply = post(server, "/v1/images/generations", {"prompt": "a", "stylefast": {"window": window}})
    assert status == 400 and "must then be given as size" in reply["error"]["message"]
    status, reply = post(server, "/v1/images/generations", {"prompt": "a", "stylefast": {"window": "wide"}})
    assert status == 400 and "window is 'wide'" in reply["error"]["message"]
