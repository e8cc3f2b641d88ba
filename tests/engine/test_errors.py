"""What can't be done is refused before the UNet runs, by an error that names the value, the limit and the way out."""

import pytest
import torch

import stylefast as sf
from stylefast.errors import (
    AdapterError,
    ImageError,
    InvalidRequest,
    NumericsError,
    OutOfMemory,
    PromptError,
    StyleError,
    StyleFastError,
)
from stylefast.runtime import memory
from stylefast.styles.embeddings import StageEmbedding
from tests.support.scene import SIZE, learned, sharp_pipeline, small_picture

PICTURE = small_picture(1)

ARGUMENTS = {
    "scheduler": (InvalidRequest, {"scheduler": "heun"}, "'heun'.*euler"),
    "karras": (InvalidRequest, {"scheduler": "lcm_karras"}, "lcm.*euler, dpmpp_2m, unipc"),
    "no_steps": (InvalidRequest, {"steps": 0}, "0.*1 to 1000"),
    "steps_in_words": (InvalidRequest, {"steps": "many"}, "'many'.*1 to 1000"),
    "too_many_lcm_steps": (InvalidRequest, {"scheduler": "lcm", "steps": 60}, "60.*50"),
    "negative_guidance": (InvalidRequest, {"guidance": -1.0}, "-1.*0 to 100"),
    "nan_guidance": (InvalidRequest, {"guidance": float("nan")}, "nan.*0 to 100"),
    "rescale": (InvalidRequest, {"guidance_rescale": 2.0}, "2.*0 to 1"),
    "seed": (InvalidRequest, {"seed": -3}, "-3.*0 to"),
    "size_not_divisible": (InvalidRequest, {"size": (100, 64)}, "width is 100.*divisible by 8.*try 96"),
    "size_too_small": (InvalidRequest, {"size": (64, 8)}, "height is 8.*16"),
    "size_of_three": (InvalidRequest, {"size": (64, 64, 3)}, "width, height"),
    "output": (InvalidRequest, {"output": "jpg"}, "'jpg'.*pil, np, latents"),
    "negative_prompt": (PromptError, {"negative_prompt": 7}, "negative_prompt is 7 .int.*string"),
    "style_by_name": (StyleError, {"style": "neon"}, "'neon'.*StyleAligned, InstantStyle, DreamStyler"),
    "no_such_picture": (ImageError, {"style": sf.StyleAligned(reference="nowhere.png")}, "nowhere.png.*path"),
    "no_such_style_picture": (ImageError, {"style": sf.InstantStyle("nowhere.png")}, "nowhere.png.*path"),
    "no_such_layer": (StyleError, {"style": sf.StyleAligned(layers="head")}, "'head'.*up_blocks.0.attentions.1"),
    "no_such_block": (StyleError, {"style": sf.InstantStyle(PICTURE, ["head"])}, "head.*up_blocks.0.attentions.1"),
    "no_such_adapter": (StyleError, {"style": sf.InstantStyle(PICTURE, adapter="c")}, "'c'.*loaded adapters: a"),
    "precise_without_guidance": (
        StyleError,
        {"style": sf.InstantStyle(PICTURE, "precise"), "guidance": 1.0},
        "'precise'.*guidance > 1.*'style'",
    ),
    "vectors_of_another_model": (
        StyleError,
        {"style": sf.DreamStyler(StageEmbedding("sks", torch.ones(1, 1, 8), torch.ones(1, 1, 9)))},
        "8 and 9.*32 and 32",
    ),
    "mask_of_another_size": (
        ImageError,
        {"style": sf.InstantStyle(PICTURE, mask=torch.ones(8, 8))},
        "8 x 8.*32 x 48.*picture",
    ),
    "content_of_another_width": (AdapterError, {"style": sf.InstantStyle(PICTURE, content=torch.ones(16))}, "16.*32"),
    "two_styles_of_one_name": (StyleError, {"style": [sf.DreamStyler(learned()), sf.DreamStyler(learned())]}, "'sks'"),
    "two_kinds_of_pooling": (
        StyleError,
        {"style": [sf.DreamStyler(learned()), sf.DreamStyler(learned("abc", pooled_policy="first_added_token"))]},
        "sks.*abc",
    ),
}
PROMPTS = {
    "none": ([], "one or several"),
    "empty": ("", "empty"),
    "blank": (["a cat", "  \n"], "empty"),
    "not_text": ([3], "int.*string"),
    "endless": ("a" * 40_000, "40000.*32000"),
}


@pytest.fixture
def untouched(engine, monkeypatch):
    """Fails the test if the UNet runs."""

    def run(*args, **named):
        pytest.fail("the UNet ran")

    monkeypatch.setattr(engine.unet, "forward", run)


@pytest.mark.parametrize(("error", "options", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_make_no_sense_are_refused(draw, untouched, error, options, message):
    with pytest.raises(error, match=f"(?s){message}") as caught:
        draw("a cat", **options)
    assert type(caught.value) is error


@pytest.mark.parametrize(("prompts", "message"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_say_nothing_are_refused(draw, untouched, prompts, message):
    with pytest.raises(InvalidRequest, match=message):
        draw(prompts)


def test_a_prompt_of_too_many_windows_is_refused(draw, untouched):
    with pytest.raises(PromptError, match="tokens in 17 chunks; at most 16 chunks of 75.*shorten"):
        draw("a cat " * 601, sf.DreamStyler(learned()))


@pytest.mark.parametrize("change", [{"steps": 4}, {"scheduler": "ddim"}, {"size": (64, 64)}], ids=str)
def test_a_group_that_can_not_run_step_by_step_is_refused(draw, untouched, change):
    style = sf.StyleAligned()
    requests = [sf.Request("a cat", style=style, **{"steps": 3, "size": SIZE} | other) for other in ({}, change)]
    with pytest.raises(InvalidRequest, match="(?s)3 steps of euler at 48x32.*own reference or prompt"):
        draw(requests)


def test_two_style_aligned_in_a_request_are_refused(draw, untouched):
    with pytest.raises(InvalidRequest, match=r"one StyleAligned.*reference=\[a, b\]"):
        draw("a cat", [sf.StyleAligned(), sf.StyleAligned()])


def test_instant_style_without_an_adapter_is_refused(draw, bare_engine):
    with pytest.raises(StyleError, match="has none.*load_adapter"):
        draw("a cat", sf.InstantStyle(PICTURE), using=bare_engine)


STYLES = {
    "mode": ({"mode": "blend"}, "'blend'.*concat, swap"),
    "noise": ({"noise": "inverted"}, "'inverted'.*forward, ddim"),
    "level": ({"only_self_level": 1.5}, "1.5.*0 to 1"),
    "level_in_words": ({"only_self_level": "half"}, "'half'"),
    "scale": ({"scale": float("inf")}, "inf.*from -10000 to 10000"),
    "scale_in_words": ({"scale": "strong"}, "'strong'"),
    "shift": ({"shift": float("inf")}, "inf.*-inf"),
    "shift_nan": ({"shift": float("nan")}, "nan"),
    "adain_part": ({"adain": ("q", "x")}, "'x'.*q, k, v"),
    "adain_strength": ({"adain": {"q": 1.5}}, "q is 1.5.*0 to 1"),
    "adain_strength_in_words": ({"adain": {"q": "full"}}, "q is 'full'"),
    "adain_of_nothing": ({"adain": 3}, "adain is 3"),
    "swap_without_reference": ({"mode": "swap", "share_attention": False}, "'concat'"),
    "swap_muted": ({"mode": "swap", "shift": float("-inf")}, "'concat'"),
    "full_sharing_with_prompt": ({"full_attention_share": True, "prompt": "a cat"}, "no reference or prompt"),
    "no_references": ({"reference": []}, "empty"),
    "empty_prompt": ({"prompt": " "}, "empty"),
    "prompt_of_numbers": ({"prompt": 3}, "int"),
    "window": ({"window": (0.5, 0.2)}, "0.5, 0.2.*start < end"),
    "empty_window": ({"window": (0.5, 0.5)}, "0.5, 0.5.*start < end"),
    "window_of_one": ({"window": 0.5}, "0.5.*start"),
    "seed": ({"seed": -2}, "seed is -2"),
    "layers": ({"layers": 3}, "layers is 3"),
}


@pytest.mark.parametrize(("options", "message"), STYLES.values(), ids=STYLES)
def test_style_aligned_refuses_what_makes_no_sense_at_the_door(options, message):
    with pytest.raises(StyleError, match=message):
        sf.StyleAligned(**options)


def test_a_picture_without_a_caption_may_have_an_empty_one(draw):
    bare, empty = (draw("a cat", sf.StyleAligned(reference=PICTURE, prompt=prompt)) for prompt in (None, ""))
    assert torch.equal(bare[0], empty[0])


# while running


def test_nan_in_the_weights_is_an_error_that_names_the_pictures():
    pipe = sharp_pipeline()
    pipe.unet.conv_out.weight[0, 0] = torch.nan
    engine = sf.Engine.from_pipeline(pipe)
    with pytest.raises(NumericsError, match=r"picture\(s\) 0, 1.*NaN.*float32"):
        engine.generate(["a cat", "a dog"], size=SIZE, steps=1)


def test_only_the_picture_that_overflows_is_named(draw):
    huge = sf.DreamStyler(StageEmbedding("sks", torch.full((1, 1, 32), 3e38), torch.full((1, 1, 32), 3e38)))
    requests = [sf.Request("a cat", style=style, size=SIZE, steps=2) for style in (None, huge)]
    with pytest.raises(NumericsError, match=r"picture\(s\) 1 contain.*adapter scale"):
        draw(requests)


def test_a_batch_that_does_not_fit_is_refused_before_it_runs(draw, untouched, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 1000)
    with pytest.raises(OutOfMemory, match="2 rows at 12x8 latents.*GiB are free.*fewer or smaller"):
        draw("a cat")


def test_all_errors_are_of_one_tree():
    for error in (InvalidRequest, StyleError, ImageError, PromptError, AdapterError, NumericsError, OutOfMemory):
        assert issubclass(error, StyleFastError)
