"""OpenAI's client library, unmodified, against a server as users start it."""

import base64
import json
import threading
from io import BytesIO

import openai
import pytest
from PIL import Image

from stylefast import cli
from stylefast.models.checkpoint import TINY

NEON = TINY / "references" / "neon.png"


def picture(item):
    return Image.open(BytesIO(base64.b64decode(item.b64_json)))


def few(**more):
    """Return few steps, and a seed."""
    return {"stylefast": {"steps": 2, "seed": 7, **more}}


def test_a_picture_is_drawn(client):
    reply = client.images.generate(prompt="a fish", model="tiny", extra_body=few())
    (item,) = reply.data
    image = picture(item)
    assert image.format == "PNG" and image.size == (64, 64) and reply.size == "64x64"
    assert reply.output_format == "png" and reply.background == "opaque" and reply._request_id.startswith("req_")
    assert reply.usage.output_tokens == 16 and reply.usage.input_tokens_details.text_tokens == 4
    assert reply.model_extra["stylefast"]["seeds"] == [7] and reply.model_extra["stylefast"]["warnings"] == []


def test_the_picture_is_the_engines_and_is_made_again_from_its_file(client, tmp_path, capsys):
    reply = client.images.generate(prompt="a fish", model="tiny/neon", extra_body=few(loras={"gold": 0.5}))
    (tmp_path / "x.png").write_bytes(base64.b64decode(reply.data[0].b64_json))
    assert cli.main(["generate", "--from", str(tmp_path / "x.png"), "--out", str(tmp_path / "y.png")]) == 0
    assert "same pixels" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_lossy_pictures_have_their_record_too(client, tmp_path, form):
    reply = client.images.generate(prompt="a fish", output_format=form, extra_body=few())
    exact = client.images.generate(prompt="a fish", extra_body=few())
    (tmp_path / f"x.{form}").write_bytes(base64.b64decode(reply.data[0].b64_json))
    assert cli.main(["generate", "--from", str(tmp_path / f"x.{form}"), "--out", str(tmp_path / "y.png")]) == 0
    assert Image.open(tmp_path / "y.png").tobytes() == picture(exact.data[0]).tobytes()


def test_several_pictures_have_seeds_one_after_the_other(client):
    both = client.images.generate(prompt="a fish", n=2, extra_body=few())
    second = client.images.generate(prompt="a fish", extra_body=few(seed=8))
    assert both.model_extra["stylefast"]["seeds"] == [7, 8]
    assert picture(both.data[1]).tobytes() == picture(second.data[0]).tobytes()
    assert picture(both.data[0]).tobytes() != picture(both.data[1]).tobytes()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_formats_and_sizes(client, form):
    reply = client.images.generate(
        prompt="a fish", size="96x64", output_format=form, output_compression=80, extra_body=few()
    )
    image = picture(reply.data[0])
    assert image.format == form.upper() and image.size == (96, 64)


def test_pictures_sent_along_are_style_references(client):
    plain = client.images.generate(prompt="a fish", extra_body=few())
    one = client.images.edit(image=NEON, prompt="a fish", extra_body=few())
    raw = client.images.edit(image=NEON.read_bytes(), prompt="a fish", extra_body=few())
    two = client.images.edit(
        image=[NEON.open("rb"), (TINY / "references" / "glass.png").open("rb")],
        prompt="a fish",
        input_fidelity="high",
        extra_body=few(method="aligned"),
    )
    found = [picture(reply.data[0]).tobytes() for reply in (plain, one, two)]
    assert len(set(found)) == 3 and picture(raw.data[0]).tobytes() == found[1]
    assert one.usage.input_tokens_details.image_tokens == 256


def test_a_named_style_in_its_three_places(client):
    in_model = client.images.generate(prompt="a fish", model="tiny/chalk", extra_body=few())
    as_style = client.images.generate(prompt="a fish", style="chalk", extra_body=few())
    inside = client.images.generate(prompt="a fish", extra_body=few(style="chalk"))
    assert len({picture(reply.data[0]).tobytes() for reply in (in_model, as_style, inside)}) == 1


def test_a_stream_has_previews_and_the_picture(client):
    events = list(
        client.images.generate(prompt="a fish", stream=True, partial_images=2, extra_body={"stylefast": {"steps": 9}})
    )
    *partial, last = events
    # a busy machine may skip one
    assert 1 <= len(partial) <= 2 and {event.type for event in partial} == {"image_generation.partial_image"}
    assert [event.partial_image_index for event in partial] == [0, 1][: len(partial)]
    assert last.type == "image_generation.completed"
    assert all(picture(event).size == (64, 64) for event in events)
    assert events[-1].usage.total_tokens > 0 and events[-1].size == "64x64"


def test_an_error_inside_a_stream_is_raised_by_the_client(client):
    with pytest.raises(openai.APIError) as caught:
        list(client.images.generate(prompt="a fish", stream=True, extra_body={"stylefast": {"spacing": "odd"}}))
    assert caught.value.code == "invalid_request" and "spacing" in str(caught.value)


@pytest.mark.parametrize(
    "arguments, error, param, code",
    [
        ({"prompt": ""}, openai.BadRequestError, "prompt", "invalid_prompt"),
        ({"model": "dall-e-2"}, openai.NotFoundError, "model", "model_not_found"),
        ({"model": "tiny/neom"}, openai.NotFoundError, "model", "model_not_found"),
        ({"size": "1000x1000x"}, openai.BadRequestError, "size", "invalid_request"),
        ({"size": "8x8"}, openai.BadRequestError, "size", "invalid_request"),
        ({"n": 11}, openai.BadRequestError, "n", "invalid_request"),
        ({"quality": "ultra"}, openai.BadRequestError, "quality", "invalid_request"),
        ({"background": "transparent"}, openai.BadRequestError, "background", "unsupported_parameter"),
        ({"style": "neom"}, openai.BadRequestError, "style", "style_not_found"),
        ({"stream": True, "n": 2}, openai.BadRequestError, "n", "unsupported_parameter"),
        ({"extra_body": {"sed": 1}}, openai.BadRequestError, "sed", "unknown_parameter"),
        ({"extra_body": {"frame_count": 3}}, openai.BadRequestError, "frame_count", "unsupported_parameter"),
        ({"extra_body": few(stepz=1)}, openai.BadRequestError, "stylefast.stepz", "unknown_parameter"),
        ({"extra_body": few(loras={"gild": 1})}, openai.BadRequestError, None, "invalid_request"),
        ({"extra_body": few(scheduler=["euler"])}, openai.BadRequestError, "scheduler", "invalid_request"),
        ({"extra_body": few(scheduler={"a": 1})}, openai.BadRequestError, "scheduler", "invalid_request"),
        (
            {"extra_body": few(style={"kind": "InstantStyle", "image": "/etc/passwd"})},
            openai.BadRequestError,
            None,
            "invalid_image",
        ),
        (
            {"extra_body": few(style={"kind": "StyleAligned", "reference": {"path": "/etc/passwd"}})},
            openai.BadRequestError,
            None,
            "invalid_style",
        ),
        (
            {"extra_body": few(style={"kind": "StyleAligned", "reference": "/tmp/x.bank"})},
            openai.BadRequestError,
            None,
            "invalid_style",
        ),
        (
            {"extra_body": few(style={"kind": "InstantStyle", "image": {"upload": 3}})},
            openai.BadRequestError,
            None,
            "invalid_image",
        ),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, arguments, error, param, code):
    with pytest.raises(error) as caught:
        client.images.generate(**{"prompt": "a fish", **arguments})
    assert (caught.value.code, caught.value.param) == (code, param), caught.value
    assert len(str(caught.value)) < 1000 and "Traceback" not in str(caught.value)


def test_models_are_the_model_and_its_styles(client):
    names = [model.id for model in client.models.list()]
    assert {"tiny", "tiny/neon", "tiny/chalk"} <= set(names)
    assert client.models.retrieve("tiny/neon").id == "tiny/neon"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny/neom")


def test_progress_and_cancelling_by_id(client, server):
    def draw():
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.generate(
                prompt="a fish", extra_body={"stylefast": {"steps": 900}}, extra_headers={"x-request-id": "mine"}
            )
        ended.append(caught.value)

    ended: list = []
    drawing = threading.Thread(target=draw)
    drawing.start()
    while True:
        status, body = server.get("/v1/images/mine")
        if status == 200 and (shown := json.loads(body))["step"]:
            break
    assert shown["status"] == "in_progress" and shown["steps"] == 900 and 0 < shown["progress"] < 1
    first = client.delete("/images/mine", cast_to=object)
    again = client.delete("/images/mine", cast_to=object)
    drawing.join()
    assert first["cancelled"] and not again["cancelled"] and again["status"] == "cancelled"
    assert (ended[0].status_code, ended[0].code) == (499, "request_cancelled")


def test_a_repeated_request_with_an_idempotency_key_is_drawn_once(client):
    def draw(prompt):
        headers = {"Idempotency-Key": "k1"}
        return client.images.generate(prompt=prompt, extra_body={"steps": 2}, extra_headers=headers)

    first, second = draw("a fish"), draw("a fish")
    assert first.model_extra["stylefast"]["id"] == second.model_extra["stylefast"]["id"]
    assert first.data[0].b64_json == second.data[0].b64_json
    with pytest.raises(openai.ConflictError):
        draw("a cat")
