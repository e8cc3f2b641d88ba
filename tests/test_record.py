"""Calls as JSON: what goes in comes out, shared styles stay shared, and what can't be had again is said."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image

from stylefast.errors import ImageError, InvalidRequest, PromptError, StyleError
from stylefast.models.pictures import open_picture
from stylefast.record import from_record, parse_size, to_record
from stylefast.record_values import ORIGIN, Origin, vector_digest
from stylefast.runtime.plan.request import Request
from stylefast.sampling.guidance import StyleContextGuidance
from stylefast.styles.dream_styler import DreamStyler
from stylefast.styles.embeddings import StageEmbedding, save_embedding
from stylefast.styles.instant_style import InstantStyle
from stylefast.styles.style_aligned import StyleAligned
from tests.support.small_adapter import small_picture


def embedding(name="chalk", stages=3, seed=0, widths=(8, 12)):
    draw = torch.Generator().manual_seed(seed)
    return StageEmbedding(name, *(torch.randn(stages, 2, width, generator=draw) for width in widths))


def again(requests, **options):
    """Through text, as a file would hold it; strict JSON only."""
    return from_record(json.loads(json.dumps(to_record(requests), allow_nan=False)), **options)


def same(one, other) -> bool:
    """Whether two field values mean the same."""
    if isinstance(one, StageEmbedding):
        return one.name == other.name and vector_digest(one) == vector_digest(other)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (Image.Image, np.ndarray, bytes)):
        return open_picture(one).tobytes() == open_picture(other).tobytes()
    return one == other


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "brand.png"
    small_picture(1).save(path)
    return str(path)


@pytest.fixture
def learned(tmp_path):
    return str(save_embedding(embedding(), tmp_path / "chalk.safetensors"))


def styles(picture, learned):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 0.3
    return {
        "aligned": StyleAligned(
            picture,
            "a fox",
            adain={"q": 1.0, "k": 0.25},
            scale=0.5,
            shift=1.5,
            mode="swap",
            layers=["up_blocks"],
            only_self_level=0.25,
            share_group_norm=True,
            seed=4,
            share_styles=False,
            window=(0.1, 0.9),
        ),
        "aligned without sharing": StyleAligned(shift=-float("inf"), adain=()),
        "aligned by values": StyleAligned(adain=["v"]),
        "aligned to two pictures": StyleAligned([picture, small_picture(3)]),
        "instant": InstantStyle(
            picture,
            blocks={"up": {"block_0": [0.0, 1.0, 0.0]}},
            scale=0.5,
            content="a fox",
            content_scale=0.25,
            window=(0.0, 0.5),
            crop="pad",
            negative_image=small_picture(2),
        ),
        "instant from an array": InstantStyle(np.array(small_picture(4)), blocks=["up_blocks.0.attentions.1"]),
        "instant with masks": InstantStyle(
            [picture, small_picture(5)], mask=[small_picture(6), mask], scale=[1.0, 0.5]
        ),
        "instant with an embedding": InstantStyle(picture, content=torch.randn(7), composition_scale=0.5),
        "learned from a file": DreamStyler(
            learned, context="a moon", guidance=StyleContextGuidance(1.0, 2.0, 3.0, "paper")
        ),
        "learned from memory": DreamStyler(embedding("ink"), name="pen", template="{style} {prompt}"),
        "learned and mixed": DreamStyler(learned, stages={0: embedding("ink", seed=1), 2: embedding("one", 1, seed=2)}),
    }


@pytest.mark.parametrize("name", styles("x.png", embedding()).keys())
def test_every_style_comes_back_field_by_field(picture, learned, name):
    style = styles(picture, learned)[name]
    (request,) = again([Request("a cat", style=style)])
    (found,) = request.style
    assert type(found) is type(style)
    for f in fields(style):
        if f.name == "stages":
            for stage in style.stages:
                assert same(found.stage_vectors(stage)[0], style.stage_vectors(stage)[0])
                assert same(found.stage_vectors(stage)[1], style.stage_vectors(stage)[1])
        elif f.name == "window":
            assert tuple(found.window) == tuple(style.window)
        else:
            assert same(getattr(style, f.name), getattr(found, f.name)), f.name


def test_every_setting_of_a_request_comes_back():
    request = Request("a cat", "a dog", None, 7, 2.5, (64, 128), 2**40, "dpmpp_2m_karras", 0.25, (0.2, 0.8), "trailing")
    (found,) = again([request])
    for f in fields(Request):
        assert getattr(found, f.name) == getattr(request, f.name), f.name


def test_requests_that_shared_a_style_object_share_it_again_and_others_do_not():
    shared, twin = StyleAligned(shift=1.0), StyleAligned(shift=1.0)
    found = again([Request("a", style=shared), Request("b", style=[shared]), Request("c", style=twin), Request("d")])
    assert found[0].reader is found[1].reader
    assert found[2].reader is not found[0].reader
    assert found[3].style == ()


def test_a_picture_from_memory_is_kept_inside_while_it_is_small(picture):
    record = to_record([Request("a", style=InstantStyle(Image.open(picture).copy()))])
    assert "png" in record["styles"][0]["image"]
    assert len(json.dumps(record)) < 64_000


def test_a_picture_from_memory_with_an_origin_is_recorded_by_it(picture):
    entry = {"path": "ours/reference.png", "sha256": "0" * 64}
    known, claimed = open_picture(picture), open_picture(picture)
    known.info[ORIGIN], claimed.info[ORIGIN] = Origin(entry), str(entry)  # the second as from a file's own text
    (first,), (second,) = (
        to_record([Request("a fish", style=StyleAligned(one))])["styles"] for one in (known, claimed)
    )
    assert first["reference"] == entry and "png" in second["reference"]


def test_a_large_picture_from_memory_leaves_a_digest_and_says_what_to_pass_again():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    record = to_record([Request("a", style=InstantStyle(noise))])
    assert len(json.dumps(record)) < 2_000
    with pytest.raises(
        StyleError,
        match="style 0: .*a picture of 256x256 pixels from memory.*--style-image FILE, .*, or put the path here",
    ):
        from_record(record)


def test_many_small_pictures_together_stay_below_the_limit():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)
    record = to_record([Request("a", style=InstantStyle(list(noise)))])
    kinds = ["png" in entry for entry in record["styles"][0]["image"]]
    assert kinds[0] and not kinds[-1] and len(json.dumps(record)) < 64_000


def test_a_picture_that_changed_is_refused(picture):
    record = to_record([Request("a", style=StyleAligned(picture))])
    small_picture(9).save(picture)
    with pytest.raises(StyleError, match="brand.png has different pixels.*put the original back"):
        from_record(record)


def test_a_picture_saved_anew_without_loss_is_accepted(picture):
    record = to_record([Request("a", style=StyleAligned(picture))])
    Image.open(picture).save(picture, compress_level=0)
    assert from_record(record)[0].reader.reference == picture


def test_a_learned_style_that_changed_is_refused(learned):
    record = to_record([Request("a", style=DreamStyler(learned))])
    save_embedding(embedding(seed=5), learned)
    with pytest.raises(StyleError, match="'chalk'.*has different vectors.*put the original file back"):
        from_record(record)


def test_what_ships_with_a_model_is_stored_by_name_and_found_in_another_place(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        (folder / "references").mkdir(parents=True)
        (folder / "styles").mkdir()
        small_picture(1).save(folder / "references" / "blot.png")
        save_embedding(embedding(), folder / "styles" / "chalk.safetensors")
    style = [StyleAligned(here / "references" / "blot.png"), DreamStyler(here / "styles" / "chalk.safetensors")]
    record = to_record([Request("a", style=style)], here)
    assert str(tmp_path) not in json.dumps(record)
    (found,) = from_record(record, model_folder=there)
    assert found.style[0].reference == str(there / "references" / "blot.png")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", "gone.png"])
def test_a_shipped_file_lies_within_the_models_folder(tmp_path, path):
    small_picture(1).save(tmp_path / "secret.png")
    (tmp_path / "model").mkdir()
    call = [{"prompt": "a", "style": {"kind": "StyleAligned", "reference": {"shipped": path}}}]
    with pytest.raises(StyleError, match="does not come with the model"):
        from_record(call, model_folder=tmp_path / "model")


@pytest.mark.parametrize("kind", ["InstantStyle", "instant_style", "instantstyle", "instant-style"])
@pytest.mark.parametrize("key", ["kind", "type"])
def test_a_style_written_by_hand_may_be_spelled_in_several_ways(picture, kind, key):
    (request,) = from_record([{"prompt": "a", "style": {key: kind, "image": "brand.png"}}], picture.rpartition("/")[0])
    assert request.style[0].image == picture


def test_styles_are_referred_to_by_number_or_name(picture):
    style = {"kind": "StyleAligned", "reference": picture}
    named = from_record(
        {
            "styles": {"brand": style},
            "requests": [{"prompt": "a", "style": "brand"}, {"prompt": "b", "style": ["brand"]}],
        }
    )
    listed = from_record({"styles": [style], "requests": [{"prompt": "a", "style": 0, "size": "64x128"}]})
    assert named[0].reader is named[1].reader
    assert listed[0].reader.reference == picture and listed[0].size == (64, 128)


def styled(**style):
    """A call of one request with one style."""
    return [{"prompt": "a", "style": style}]


def aligned(**values):
    return styled(kind="StyleAligned", **values)


BAD_CALLS = {
    "text": ("a cat", InvalidRequest, "a call is a list of requests"),
    "no requests": ({"requests": []}, InvalidRequest, "at least one request"),
    "an unknown field at the top": ({"request": []}, InvalidRequest, "'request'; the known ones are format, styles"),
    "another format": ({"format": "x/2", "requests": [{}]}, InvalidRequest, "'x/2', not 'stylefast-call/1'"),
    "a request of text": (["a cat"], InvalidRequest, "request 0: a request is a dictionary"),
    "an unknown field": ([{"prompt": "a", "cfg": 3}], InvalidRequest, "'cfg'; the known ones are prompt"),
    "no prompt": ([{"steps": 3}], InvalidRequest, '"prompt" is missing'),
    "an empty prompt": ([{"prompt": ""}], PromptError, "request 0: the prompt is empty"),
    "steps as text": ([{"prompt": "a", "steps": "3"}], InvalidRequest, "steps is '3'"),
    "an unknown style": ([{"prompt": "a", "style": 3}], InvalidRequest, "style is 3"),
    "true as a style": (
        {"styles": [{"kind": "StyleAligned"}] * 2, "requests": [{"prompt": "a", "style": True}]},
        InvalidRequest,
        "style is True",
    ),
    "an unknown kind": (styled(kind="Cubism"), StyleError, "choose one of StyleAligned, InstantStyle"),
    "no kind": (styled(scale=1), StyleError, "style kind None is unknown"),
    "two kinds": (styled(kind="StyleAligned", type="StyleAligned"), InvalidRequest, "use only one"),
    "an unknown field of a style": (aligned(strength=1), InvalidRequest, "has the unknown field 'strength'"),
    "a style without its picture": (styled(kind="InstantStyle"), StyleError, "needs at least one picture; pass image="),
    "a switch as text": (aligned(share_group_norm="false"), StyleError, "is 'false'; it must be true or false"),
    "a number as text": (aligned(shift="1"), StyleError, "shift is '1'; it must be a number"),
    "a window of one": (aligned(window=[1]), StyleError, "window is [1]"),
    "a missing picture": (aligned(reference="gone.png"), ImageError, "request 0: no picture found at gone.png"),
    "a picture of two forms": (aligned(reference={"path": "x", "png": "y"}), ImageError, "give its path, or one of"),
    "a picture with a further field": (aligned(reference={"path": "x", "crop": 1}), ImageError, "unknown field 'crop'"),
    "a picture that is no base64": (aligned(reference={"png": "%"}), ImageError, "not base64"),
    "a missing learned style": (styled(kind="DreamStyler", embedding="x"), StyleError, "no learned style found at x"),
}


@pytest.mark.parametrize("call, error, message", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_bad_call_names_the_place_the_value_and_the_way_out(tmp_path, monkeypatch, call, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        from_record(call, model_folder=tmp_path)
    assert message in str(caught.value)


def test_unknown_guidance_is_refused(learned):
    style = {"kind": "DreamStyler", "path": learned, "guidance": {"style": 1, "contxt": 2}}
    with pytest.raises(InvalidRequest, match="guidance has the unknown field 'contxt'"):
        from_record([{"prompt": "a", "style": style}])


def test_a_value_that_json_can_not_hold_is_refused(picture):
    with pytest.raises(StyleError, match="adapter is b'ip-adapter' .bytes.; it must be a string"):
        to_record([Request("a", style=InstantStyle(picture, adapter=b"ip-adapter"))])


@pytest.mark.parametrize("text, size", [("64x128", (64, 128)), ("64X128", (64, 128)), (" 64 x 128 ", (64, 128))])
def test_a_size_is_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["64", "x64", "64x", "-8x8", "8x8x8", "", "8.5x8"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(InvalidRequest, match="WIDTHxHEIGHT"):
        parse_size(text)
