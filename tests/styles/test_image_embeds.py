"""Embeddings that were computed before stand in for pictures, in every form in which diffusers' users keep them."""

import pytest
import torch
from safetensors.torch import save_file

from stylefast.errors import AdapterError, StyleError
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.record import from_record, to_record
from stylefast.runtime.plan.request import Request
from stylefast.styles.instant_style import InstantStyle
from tests.support.fp64 import close, measured
from tests.support.small_adapter import (
    CROSS_DIM,
    global_adapter,
    plus_adapter,
    small_layout,
    small_picture,
    small_vision_model,
)

PICTURES = [small_picture(seed) for seed in (1, 2)]
TEXT_DIM = 48  # of the second text encoder, as wide as the global adapter's pictures
MASKS = [torch.zeros(16, 16), torch.ones(16, 16)]


@pytest.fixture(scope="module")
def encoder():
    return ImageEncoder(small_vision_model())


@pytest.fixture(scope="module")
def adapters():
    makers = {"global": global_adapter, "plus": plus_adapter}
    return {kind: IPAdapter.load(make(small_layout()), small_layout(), CROSS_DIM) for kind, make in makers.items()}


def projected(adapter, features):
    return adapter.tokens(features).flatten(0, 1)


def forms(features, blank):
    """The same features as people hand them in."""
    return {
        "bare": features,
        "in a list": [features],
        "without guidance": features[None],
        "with guidance": torch.stack([blank.expand_as(features), features]),
        "in half precision": features.half(),
    }


@pytest.mark.parametrize("kind", ["global", "plus"])
@pytest.mark.parametrize("form", ["bare", "in a list", "without guidance", "with guidance", "in half precision"])
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_give_the_tokens_of_their_pictures(adapters, encoder, kind, form, masked):
    adapter = adapters[kind]
    features = adapter.features(encoder, PICTURES)
    blank = torch.zeros_like(features[:1]) if kind == "global" else encoder.blank_patches()
    masks = {"mask": MASKS} if masked else {}
    got = InstantStyle(image_embeds=forms(features, blank)[form], **masks).tokens(adapter, encoder)
    if "half" in form:
        features = features.half().float()
    else:
        shown = InstantStyle(PICTURES, **masks).tokens(adapter, encoder)
        close(torch.cat(shown.image), measured(projected, adapter, features))
    assert len(got.image) == (2 if masked else 1)
    close(torch.cat(got.image), measured(projected, adapter, features))
    close(got.negative, measured(projected, adapter, blank))


def test_one_picture_needs_no_axis_of_its_own(adapters, encoder):
    for adapter in adapters.values():
        features = adapter.features(encoder, PICTURES[:1])
        style = InstantStyle(image_embeds=features[0])
        assert torch.equal(
            style.tokens(adapter, encoder).image[0], InstantStyle(PICTURES[:1]).tokens(adapter, encoder).image[0]
        )


def test_negative_embeddings_that_differ_are_all_seen(adapters, encoder):
    adapter = adapters["global"]
    features = adapter.features(encoder, PICTURES)
    style = InstantStyle(image_embeds=torch.stack([features.flip(0), features]))
    assert torch.equal(style.tokens(adapter, encoder).negative, adapter.tokens(features.flip(0)).flatten(0, 1))


def test_words_are_subtracted_from_embeddings_too(adapters, encoder):
    adapter, words = adapters["global"], torch.linspace(-1, 1, 48)
    features = adapter.features(encoder, PICTURES)
    got = InstantStyle(image_embeds=features, content=words).tokens(adapter, encoder)
    assert torch.equal(got.image[0], InstantStyle(PICTURES, content=words).tokens(adapter, encoder).image[0])


@pytest.mark.parametrize("name", ["embeds.safetensors", "embeds.pt", "image_embeds.ipadpt", "embeds.bin"])
@pytest.mark.parametrize("listed", [False, True])
def test_files_are_read_by_their_content_and_a_record_makes_the_style_again(tmp_path, name, listed):
    embeds = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file({"embeds": embeds}, path)
    else:
        torch.save([embeds] if listed else embeds, path)
    style = InstantStyle(image_embeds=path)
    assert torch.equal(style.image_embeds, embeds)
    record = to_record([Request("a", style=style)])
    assert record["styles"][0]["image_embeds"]["path"] == str(path)
    (again,) = from_record(record)[0].style
    assert torch.equal(again.image_embeds, embeds)
    written = {"prompt": "a", "style": {"kind": "InstantStyle", "image_embeds": name}}
    (by_hand,) = from_record([written], tmp_path)[0].style
    assert torch.equal(by_hand.image_embeds, embeds)
    torch.save(embeds + 1, path)
    with pytest.raises(StyleError, match="differ from those recorded with the call"):
        from_record(record)


def test_embeddings_from_memory_are_kept_in_the_record():
    embeds = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    style = InstantStyle(image_embeds=embeds)
    (again,) = from_record(to_record([Request("a", style=style)]))[0].style
    assert torch.equal(again.image_embeds, embeds)
    kept = style.image_embeds.clone()
    embeds += 1
    assert torch.equal(style.image_embeds, kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_embeds": torch.zeros(1, 8), "image": "a.png"}, "one of them"),
        ({"image_embeds": torch.zeros(1, 8), "crop": "pad"}, "crop='pad'"),
        ({"image_embeds": [torch.zeros(1, 8)] * 2}, "list of 2"),
        ({"image_embeds": []}, "list of 0"),
        ({"image_embeds": torch.zeros(1, 8, dtype=torch.long)}, "int64"),
        ({"image_embeds": 3}, "image_embeds is 3"),
        ({"image_embeds": torch.tensor(1.0)}, "shape"),
        ({"image_embeds": torch.zeros(0, 8)}, "shape"),
        ({"image_embeds": torch.zeros(1, 1, 1, 1, 8)}, "shape"),
        ({"image_embeds": torch.full((1, 8), float("nan"))}, "NaN"),
        ({"image_embeds": "absent.pt"}, "no file of image embeddings found"),
        ({"image_embeds": torch.zeros(2, 8), "scale": [1.0, 2.0]}, "one scale per picture needs one mask"),
        ({}, "image= or image_embeds="),
    ],
)
def test_what_can_be_no_embeddings_is_refused_at_once(options, message):
    with pytest.raises(StyleError, match=message):
        InstantStyle(**options)


@pytest.mark.parametrize(
    ("kind", "shape", "options", "message"),
    [
        ("global", (3, 2, 48), {}, "or two of these stacked"),
        ("global", (2, 2, 17, 40), {}, "or two of these stacked"),
        ("plus", (40,), {}, "or two of these stacked"),
        ("global", (2, 47), {}, "reads features"),
        ("plus", (2, 17, 48), {}, "reads features"),
        ("global", (3, 48), {"mask": MASKS}, "2 masks for 3 pictures"),
        ("global", (2, 1, 48), {"negative_image": PICTURES[0]}, "leave one of them out"),
        ("plus", (2, 17, 40), {"content": "a fox"}, "can't be subtracted"),
    ],
)
def test_embeddings_of_another_adapter_are_refused_before_anything_is_encoded(adapters, kind, shape, options, message):
    with pytest.raises((StyleError, AdapterError), match=message):
        InstantStyle(image_embeds=torch.zeros(shape), **options).check_adapter(adapters[kind], TEXT_DIM)


def test_files_that_hold_something_else_are_refused(tmp_path):
    save_file({"a": torch.zeros(1, 8), "b": torch.zeros(1, 8)}, tmp_path / "two.safetensors")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    torch.save({"run": print}, tmp_path / "code.pt")
    messages = {"two.safetensors": "holds 2 tensors", "page.pt": "can't read", "code.pt": "contains code"}
    for name, message in messages.items():
        with pytest.raises(StyleError, match=message):
            InstantStyle(image_embeds=tmp_path / name)
