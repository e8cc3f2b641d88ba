"""A baked style gives the pictures that its reference gives when it runs beside them."""

import pytest
import torch

import stylefast as sf
from stylefast.errors import StyleError
from stylefast.sampling.guidance import StyleContextGuidance
from tests.support.fp64 import close
from tests.support.scene import RUN, SIZE, apart, learned, near, small_picture

PICTURE, OTHER = small_picture(1, (48, 40)), small_picture(2, (90, 70))
STEPS = RUN["steps"]
SETTINGS = {"steps": STEPS, "size": SIZE}

SOURCES = {
    "a picture": {"reference": PICTURE},
    "a picture with a caption": {"reference": PICTURE, "prompt": "a dog", "seed": 8},
    "two pictures": {"reference": [PICTURE, OTHER]},
    "a prompt": {"prompt": "a dog in neon style", "seed": 5},
}
USES = {
    "concat": {},
    "swap": {"mode": "swap"},
    "shared norms": {"share_group_norm": True},
    "scale and shift": {"scale": 0.8, "shift": 0.7},
    "swap with shared norms": {"mode": "swap", "share_group_norm": True, "shift": -0.5},
    "AdaIN of values, no shared attention": {"adain": {"q": 1.0, "k": 0.5, "v": 1.0}, "share_attention": False},
    "the up blocks in a window": {"layers": "up_blocks", "window": (0.0, 0.5)},
}
_baked = {}


@pytest.fixture
def bank_of(engine):
    """The bank of a source and a kind of storage, baked once."""

    def bank_of(source: str, store: str = "kv", dtype: str = "auto", **settings):
        key = (source, store, dtype, *settings.items())
        if key not in _baked:
            _baked[key] = engine.bake(
                sf.StyleAligned(**SOURCES[source]), **SETTINGS | settings, store=store, dtype=dtype
            )
        return _baked[key]

    return bank_of


# the source decides what lies in the pages, the use how they are read; the most pages are read in every way
PAIRS = [
    *(("two pictures", use) for use in USES),
    ("a picture", "concat"),
    ("a picture", "swap with shared norms"),
    ("a picture with a caption", "concat"),
    ("a picture with a caption", "AdaIN of values, no shared attention"),
    ("a prompt", "concat"),
    ("a prompt", "the up blocks in a window"),
]


@pytest.mark.parametrize(("source", "use"), PAIRS)
def test_cached_equals_batched(draw, drawn, bank_of, source, use):
    use = USES[use]
    live = drawn(["a cat", "a house"], sf.StyleAligned(**SOURCES[source], **use), seed=3)
    banked = draw(["a cat", "a house"], sf.StyleAligned(bank_of(source), **use), seed=3)
    close(banked, live)
    apart(banked, draw(["a cat", "a house"], seed=3))


@pytest.mark.parametrize("store", ["hidden", "latents"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_storage_gives_the_same_pictures(draw, drawn, bank_of, source, store):
    use = {"share_group_norm": True, "shift": 0.5}
    live = drawn("a cat", sf.StyleAligned(**SOURCES[source], **use), seed=3)
    close(draw("a cat", sf.StyleAligned(bank_of(source, store), **use), seed=3), live)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_any_number_of_targets(draw, drawn, bank_of, count):
    prompts = ["a cat", "a house", "a fish", "neon", "a dog"][:count]
    live = drawn(prompts, sf.StyleAligned(**SOURCES["a prompt"]), seed=11)
    close(draw(prompts, sf.StyleAligned(bank_of("a prompt")), seed=11), live)


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral", "dpmpp_2m", "unipc", "lcm"])
def test_banks_of_other_schedules(engine, draw, drawn, scheduler):
    style = {"prompt": "a dog", "seed": 5}
    bank = engine.bake(sf.StyleAligned(**style), scheduler=scheduler, guidance=3.0, steps=3, size=SIZE)
    options = {"scheduler": scheduler, "guidance": 3.0, "seed": 2, "steps": 3}
    close(draw("a cat", sf.StyleAligned(bank), **options), drawn("a cat", sf.StyleAligned(**style), **options))


def test_the_reference_of_a_bank_does_not_run(engine, bank_of, draw, monkeypatch):
    bank = bank_of("a picture")
    rows, forward = [], engine.unet.forward
    monkeypatch.setattr(engine.unet, "forward", lambda x, *a, **k: rows.append(len(x)) or forward(x, *a, **k))
    draw(["a cat", "a dog"], sf.StyleAligned(bank))
    assert rows == [4] * STEPS


def test_a_bank_shares_other_styles_with_its_reference_and_serves_four_branches(engine, draw, drawn):
    guidance = StyleContextGuidance(0.5, 3.0, 5.0)
    others = [sf.InstantStyle(PICTURE, scale=0.6), sf.DreamStyler(learned(), guidance=guidance)]
    aligned = {"prompt": "a dog", "seed": 8}
    bank = engine.bake([sf.StyleAligned(**aligned), *others], **SETTINGS)
    assert bank.info.branches == ("null", "context", "style", "full") and bank.info.styles
    live = drawn("a cat", [sf.StyleAligned(**aligned), *others], seed=4)
    close(draw("a cat", [sf.StyleAligned(bank), *others], seed=4), live)


def test_guidance_and_negative_prompt_of_readers_are_free(draw, bank_of):
    bank = bank_of("a picture")
    for options in ({"guidance": 1.0}, {"guidance": 9.0}, {"negative_prompt": "oil"}, {"guidance_rescale": 0.5}):
        assert torch.isfinite(draw("a cat", sf.StyleAligned(bank), **options)[0]).all()


def test_an_inverted_picture_can_be_baked(engine, draw, drawn):
    style = {"reference": PICTURE, "prompt": "a dog", "noise": "ddim"}
    bank = engine.bake(sf.StyleAligned(**style), scheduler="ddim", **SETTINGS)
    live = drawn("a cat", sf.StyleAligned(**style), scheduler="ddim")
    close(draw("a cat", sf.StyleAligned(bank), scheduler="ddim"), live)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4}, "steps=2.*steps=4"),
        ({"scheduler": "ddim"}, "scheduler='euler'.*scheduler='ddim'"),
        ({"size": (64, 64)}, r"size=\(48, 32\).*size=\(64, 64\)"),
        ({"spacing": "trailing"}, "schedule is .*noise levels"),
    ],
    ids=["steps", "scheduler", "size", "spacing"],
)
def test_a_request_that_the_bank_does_not_fit_is_refused(draw, bank_of, change, message):
    with pytest.raises(StyleError, match=f"(?s){message}"):
        draw("a cat", sf.StyleAligned(bank_of("a picture")), **change)


def test_a_bank_without_the_null_branch_refuses_guidance(draw, bank_of):
    bank = bank_of("a picture", guidance=1.0)
    draw("a cat", sf.StyleAligned(bank), guidance=1.0)
    with pytest.raises(StyleError, match="branches full, but the request also needs null"):
        draw("a cat", sf.StyleAligned(bank), guidance=5.0)


def test_a_bank_of_some_layers_refuses_others(engine, draw, drawn):
    bank = engine.bake(sf.StyleAligned(PICTURE, layers="up_blocks"), **SETTINGS)
    live = drawn("a cat", sf.StyleAligned(PICTURE, layers="up_blocks.1"))
    close(draw("a cat", sf.StyleAligned(bank, layers="up_blocks.1")), live)
    with pytest.raises(StyleError, match="layers .* also needs"):
        draw("a cat", sf.StyleAligned(bank))


def test_a_bank_of_another_model_is_refused(bare_engine, engine, bank_of, tmp_path, pipe):
    from tests.support.scene import sharp_pipeline

    other = sf.Engine.from_pipeline(sharp_pipeline(seed=2))
    with pytest.raises(StyleError, match="fingerprint"):
        other.generate("a cat", sf.StyleAligned(bank_of("a picture")), **SETTINGS, output="latents")


def test_a_saved_bank_gives_the_same_bits(engine, draw, bank_of, tmp_path):
    bank = bank_of("a prompt")
    loaded = sf.StyleBank.load(bank.save(tmp_path / "brand.bank"))
    styled = draw("a cat", sf.StyleAligned(bank))
    assert torch.equal(draw("a cat", sf.StyleAligned(loaded))[0], styled[0])
    streamed = engine.bake(sf.StyleAligned(**SOURCES["a prompt"]), **SETTINGS, path=tmp_path / "streamed.bank")
    assert torch.equal(draw("a cat", sf.StyleAligned(streamed))[0], styled[0])


@pytest.mark.parametrize(("dtype", "least"), [("fp16", 2e-3), ("bf16", 2e-2), ("fp8", 1e-1)])
def test_narrow_banks_stay_near(draw, drawn, bank_of, dtype, least):
    live = drawn("a cat", sf.StyleAligned(**SOURCES["a prompt"]), seed=3)
    narrow = draw("a cat", sf.StyleAligned(bank_of("a prompt", "kv", dtype)), seed=3)
    near(narrow, live.value, least)
    assert not torch.equal(narrow[0], live.value[0])


NOT_BAKED = {
    "no aligned style": (lambda: sf.DreamStyler(learned()), {}, "nothing to bake"),
    "the first prompt": (lambda: sf.StyleAligned(), {}, "first prompt.*prompt or a picture"),
    "an unknown store": (lambda: sf.StyleAligned(PICTURE), {"store": "all"}, "'all'.*kv, hidden, latents"),
    "an unknown type": (lambda: sf.StyleAligned(PICTURE), {"dtype": "int4"}, "'int4'.*fp8"),
    "other styles in latents": (
        lambda: [sf.StyleAligned(PICTURE), sf.InstantStyle(PICTURE)],
        {"store": "latents"},
        "can't include other styles",
    ),
}


@pytest.mark.parametrize(("style", "options", "message"), NOT_BAKED.values(), ids=NOT_BAKED)
def test_what_can_not_be_baked_is_refused(engine, style, options, message):
    with pytest.raises(sf.errors.StyleFastError, match=f"(?s){message}"):
        engine.bake(style(), **SETTINGS, **options)
