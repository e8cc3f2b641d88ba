"""Image prompts cleaned of content (CleanStyle), and weighted references, against literal oracles."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import stylefast as sf
from stylefast.errors import StyleError
from stylefast.record import from_record, to_record
from tests.engine.test_instant_style import LAYOUT_MODULE, OTHER, PICTURE, STYLE_MODULE, no_picture, segment
from tests.support.fp64 import Twins, close, measured
from tests.support.oracle.instant_style import image_tokens, row_adapters
from tests.support.scene import RUN, SIZE, apart, by_step, embeds, half_mask, small_picture

STEPS = 6
CLEAN = sf.CleanStyle()
STRONG = sf.CleanStyle(strength=0.5, keep=2, decline=8.0, middle=0.6, negative=0.4)


def of_values(matrix, value_of):
    """The matrix with its singular values s, from the largest to the smallest, replaced by `value_of(i, s)`."""
    left, sizes, right = np.linalg.svd(matrix.double().numpy())
    found = sum(value_of(i, s) * np.outer(left[:, i], right[i]) for i, s in enumerate(sizes))
    return torch.from_numpy(found).to(matrix.dtype)


def cleaned(clean, step, steps):
    """The paper's equations: the first half of the rows is unconditional, the second conditional."""
    strength = clean.strength * (1 - 1 / (1 + math.exp(-clean.decline * (step / steps - clean.middle))))

    def change(part, states):
        rows = []
        for i, matrix in enumerate(states):
            if 2 * i < len(states):
                done = of_values(matrix, lambda i, s: s * math.exp(-clean.negative * s)) if clean.negative else matrix
            else:
                done = of_values(matrix, lambda i, s: s if i < clean.keep else s * math.exp(-strength * s))
            rows.append(done)
        return torch.stack(rows)

    return change


def literal(pipe, adapter, tokens, without, clean, scheduler, scale=0.8, steps=STEPS):
    strengths = {STYLE_MODULE: scale}
    plain = segment(adapter, without, tokens, strengths, strengths, count=1)

    def within(unet, step):
        return row_adapters(unet, [replace(plain, change=cleaned(clean, step, steps))])

    return by_step(pipe, ["a cat in oil"], [30], within, steps=steps, scheduler=scheduler)


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    "clean", [CLEAN, STRONG, sf.CleanStyle(strength=0.3, negative=0.0)], ids=["paper", "strong", "no cfg"]
)
def test_clean_tokens_equal_the_papers_equations(pipe, adapters, draw, clean, scheduler):
    style = sf.InstantStyle(PICTURE, scale=0.8, clean=clean)
    found = draw("a cat in oil", style, seed=30, steps=STEPS, scheduler=scheduler)
    tokens = image_tokens(adapters[0], embeds(pipe, PICTURE)[0, 0])
    without = tokens if clean.negative else no_picture(pipe, adapters[0])
    close(found, measured(literal, pipe, adapters[0], tokens, without, clean, scheduler))
    apart(found, draw("a cat in oil", sf.InstantStyle(PICTURE, scale=0.8), seed=30, steps=STEPS, scheduler=scheduler))


def test_styles_that_are_not_cleaned_are_not_decomposed(draw, monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *given, **named: pytest.fail("decomposed"))
    draw("a cat", sf.InstantStyle([PICTURE, small_picture(8)], weights=(2, 1)), seed=30, steps=2)


def test_nothing_is_damped_at_strength_0(draw, drawn):
    off = sf.CleanStyle(strength=0.0, negative=0.0)
    options = {"seed": 30, "steps": 2}
    close(
        draw("a cat", sf.InstantStyle(PICTURE, clean=off), **options),
        drawn("a cat", sf.InstantStyle(PICTURE), **options),
    )


def test_requests_of_unequal_cleaning_and_steps_share_a_batch_and_equal_themselves_alone(engine, adapter_files):
    twins, own = Twins(engine, adapter_files[0]), {"size": SIZE}
    first, second = (sf.InstantStyle(PICTURE, clean=clean) for clean in (CLEAN, STRONG))
    both = sf.InstantStyle([PICTURE, OTHER], clean=STRONG, weights=(2, 1))
    masked = sf.InstantStyle([PICTURE, OTHER], mask=[half_mask(), None], clean=STRONG)
    requests = [
        sf.Request("a cat", style=first, steps=6, seed=1, **own),
        sf.Request("a fish", style=first, steps=4, seed=2, **own),
        sf.Request("a tree", style=second, steps=5, seed=3, **own),
        sf.Request("a pot", style=both, steps=5, seed=4, **own),
        sf.Request("a hat", style=[masked, sf.StyleAligned(small_picture(7))], steps=4, seed=5, **own),
        sf.Request("a car", style=second, steps=6, seed=6, image=small_picture(5).resize(SIZE), strength=0.5, **own),
        sf.Request("a sun", steps=5, seed=7, guidance=1.0, style=first, **own),
        sf.Request("a cup", steps=5, seed=8, **own),
    ]
    before = engine.runner.calls
    together = engine.generate(requests, output="latents").latents
    assert engine.runner.calls - before == 6
    for request, latents in zip(requests, together, strict=True):
        close(latents[None], twins.drawn([request]))


def test_pages_are_made_once_for_each_step_and_given_back(pipe, adapter_files):
    engine = sf.Engine.from_pipeline(pipe)
    engine.load_adapter(adapter_files[0])
    style = sf.InstantStyle(PICTURE, clean=CLEAN)
    engine.generate(["a cat", "a fish"], style, steps=STEPS, size=SIZE, output="latents")
    pages = engine.runner.conditions.images
    assert pages.used == 0 and len(pages._page_of) == STEPS + 1  # and what unconditional rows see
    engine.generate(["a dog"], style, steps=STEPS, size=SIZE, output="latents")
    assert len(pages._page_of) == STEPS + 1


# several references


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1, 1)])
def test_weights_of_pictures_multiply_what_their_tokens_add(pipe, adapters, draw, weights):
    first, second = (image_tokens(adapters[0], embeds(pipe, image)[0, 0]) for image in (PICTURE, OTHER))
    tokens, strengths = torch.cat([first, second]), {STYLE_MODULE: 0.8, LAYOUT_MODULE: 0.8}
    factor = torch.tensor(weights, dtype=torch.float64).repeat_interleave(len(first)) * 2 / sum(weights)
    nothing = no_picture(pipe, adapters[0])

    def oracle(pipe, adapter):
        def change(part, states):
            half = len(states) // 2  # "no picture" is not weighted
            return (
                states if part == "k" else torch.cat([states[:half], states[half:] * factor[:, None].to(states.dtype)])
            )

        padded = nothing.repeat(2, 1)  # the same tokens twice are one softmax as well
        plain = segment(adapter, padded, tokens, strengths, strengths, count=1)
        return by_step(pipe, ["a cat"], [30], lambda unet, step: row_adapters(unet, [replace(plain, change=change)]))

    style = sf.InstantStyle([PICTURE, OTHER], "style+layout", 0.8, weights=weights)
    close(draw("a cat", style, seed=30), measured(oracle, pipe, adapters[0]))


def test_weights_of_references_multiply_their_tokens_in_the_softmax(engine, adapter_files):
    twins, own = Twins(engine, adapter_files[0]), {"seed": 3, "size": SIZE, "steps": RUN["steps"]}

    def drawn(style):
        return engine.generate("a cat", style, output="latents", **own).latents

    def twin(style):
        return twins.drawn([sf.Request("a cat", style=style, **own)])

    pair = [PICTURE, OTHER]
    close(drawn(sf.StyleAligned(pair, weights=(2, 2))), twin(sf.StyleAligned(pair)))
    close(drawn(sf.StyleAligned([PICTURE] * 2, weights=(5, 1))), twin(sf.StyleAligned([PICTURE] * 2)))
    # without the second, the first counts for two
    close(drawn(sf.StyleAligned(pair, weights=(1, 1e-30))), twin(sf.StyleAligned(PICTURE, shift=math.log(2))))
    apart(drawn(sf.StyleAligned(pair, weights=(3, 1))), drawn(sf.StyleAligned(pair)))


def test_weights_of_a_banks_references_are_those_of_live_ones(engine):
    pair, own = [PICTURE, OTHER], {"size": SIZE, "steps": RUN["steps"]}
    bank = engine.bake(sf.StyleAligned(pair), **own)
    live, banked = (
        engine.generate("a cat", sf.StyleAligned(reference, weights=(3, 1)), seed=3, output="latents", **own).latents[0]
        for reference in (pair, bank)
    )
    assert (live - banked).abs().max() < 1e-4 * live.abs().max()


# records, and what is refused


def test_a_record_gives_the_same_styles_back(engine):
    styles = [
        sf.InstantStyle([small_picture(1), small_picture(2)], weights=(1, 2.5), clean=STRONG),
        sf.StyleAligned([small_picture(1), small_picture(2)], weights=(0.5, 4)),
    ]
    request = sf.Request("a cat", style=styles, seed=3, steps=2, size=SIZE)
    (again,) = from_record(json.loads(json.dumps(to_record([request]))))
    instant, aligned = again.styles
    assert (instant.clean, instant.weights, aligned.weights) == (STRONG, (1, 2.5), (0.5, 4))
    one, other = (engine.generate(each, output="latents").latents[0] for each in (request, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: sf.CleanStyle(strength=-1), "strength is -1"),
        (lambda: sf.CleanStyle(keep=1.5), "keep is 1.5"),
        (lambda: sf.CleanStyle(middle=2), "middle is 2"),
        (lambda: sf.CleanStyle(negative=math.nan), "negative is nan"),
        (lambda: sf.InstantStyle(PICTURE, clean=True), "clean is True; give a CleanStyle, or None"),
        (lambda: sf.InstantStyle(PICTURE, "precise", clean=CLEAN), "does not go together with clean"),
        (lambda: sf.InstantStyle(PICTURE, clean=CLEAN, negative_image=OTHER), "negative_image and clean both say"),
        (lambda: sf.InstantStyle(PICTURE, weights=(1, 2)), "2 weights for 1 pictures"),
        (lambda: sf.InstantStyle([PICTURE, OTHER], weights=(1, 0)), "all must be above 0"),
        (lambda: sf.InstantStyle([PICTURE, OTHER], weights=2), "weights is 2"),
        (lambda: sf.InstantStyle([PICTURE, OTHER], weights=(1, "b")), r"weights\[1\] is 'b'"),
        (lambda: sf.InstantStyle([PICTURE, OTHER], mask=[None, None], weights=(1, 2)), "weights has no effect on"),
        (lambda: sf.StyleAligned(PICTURE, weights=(1,)), "1 weights for 1 references"),
        (lambda: sf.StyleAligned([PICTURE, OTHER], weights=(1, 2, 3)), "3 weights for 2 references"),
        (lambda: sf.StyleAligned(prompt="a star", weights=(1, 2)), "2 weights for no references"),
    ],
)
def test_what_makes_no_sense_is_refused(made, message):
    with pytest.raises(StyleError, match=message):
        made()


# colour calibration


def calibrated(pipe, strength, scheduler, style_options, steps=20):
    """The published sampler's step: each channel of the estimate gets the reference's mean and deviation; eps stays."""
    from tests.support.oracle import generation
    from tests.support.oracle.sampler import make_scheduler
    from tests.support.oracle.style_aligned import Sharing, guidance_layout, shared
    from tests.support.scene import encode

    prompts = ["a star in oil", "a cat"]
    (null, null_pooled), (full, full_pooled) = encode(pipe, prompts)
    dtype = pipe.unet.dtype
    states, pooled = torch.cat([null, full]).to(dtype), torch.cat([null_pooled, full_pooled]).to(dtype)
    height, width = SIZE[1], SIZE[0]
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(4, 1)
    one = make_scheduler(scheduler, pipe.scheduler.config)
    one.set_timesteps(steps)
    alphas = one.alphas_cumprod.double()
    latents = torch.cat(
        [torch.randn(1, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(seed)) for seed in (9, 3)]
    ).to(dtype)
    sharing = Sharing(guidance_layout(2), **style_options)
    combine = generation.classifier_free(5.0)
    ratio = 1000 // steps
    for timestep in one.timesteps:
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        with shared(pipe.unet, sharing), torch.no_grad():
            output = pipe.unet(latents.repeat(2, 1, 1, 1), timestep, states, added_cond_kwargs=conditions).sample
        eps, t = combine(*output.chunk(2)), int(timestep)
        now, last = alphas[t], alphas[t - ratio] if t >= ratio else one.final_alpha_cumprod.double()
        clean = (latents - (1 - now).sqrt().to(dtype) * eps) / now.sqrt().to(dtype)
        if 100 < t < 150:
            moved = (clean - clean.mean((2, 3), keepdim=True)) / (clean.std((2, 3), keepdim=True) + 1e-8)
            moved = moved * clean[:1].std((2, 3), keepdim=True) + clean[:1].mean((2, 3), keepdim=True)
            clean = torch.cat([clean[:1], torch.lerp(clean[1:], moved[1:], strength)])
        latents = last.sqrt().to(dtype) * clean + (1 - last).sqrt().to(dtype) * eps
    return latents[1:]


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_colours_are_calibrated_as_in_the_published_sampler(pipe, engine, strength):
    style = sf.StyleAligned(prompt="a star in oil", seed=9, calibrate=strength)
    options = {"seed": 3, "size": SIZE, "steps": 20, "scheduler": "ddim"}
    found = engine.generate("a cat", style, output="latents", **options).latents
    close(found, measured(calibrated, pipe, strength, "ddim", {}))
    plain = sf.StyleAligned(prompt="a star in oil", seed=9)
    apart(found, engine.generate("a cat", plain, output="latents", **options).latents)


def test_a_picture_that_begins_below_the_range_is_calibrated_in_its_first_step(engine):
    options = {"seed": 3, "size": SIZE, "steps": 20, "image": small_picture(5).resize(SIZE), "strength": 0.1}
    drawn = [
        engine.generate("a cat", sf.StyleAligned(PICTURE, calibrate=share), output="latents", **options).latents
        for share in (0.0, 1.0)
    ]
    apart(*drawn)


def means(latents):
    return latents.mean((-2, -1)), latents.std((-2, -1))


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "unipc", "ddim"])
@pytest.mark.parametrize("kind", ["picture", "prompt", "latents bank"])
def test_after_the_last_step_colours_are_nearer_to_the_references(engine, scheduler, kind):
    own = {"size": SIZE, "steps": 4, "scheduler": scheduler}  # few steps: none in the range, so the last above it
    reference = {"prompt": "a star in oil", "seed": 9} if kind == "prompt" else {"reference": PICTURE}
    if kind == "latents bank":
        reference = {"reference": engine.bake(sf.StyleAligned(PICTURE), store="latents", **own)}
    job_of = {}
    for strength in (0.0, 1.0):
        style = sf.StyleAligned(mode="swap", calibrate=strength, **reference)
        job_of[strength] = engine.generate("a cat", style, seed=3, output="latents", **own).latents[0]
    if kind == "prompt":
        target = engine.generate("a star in oil", seed=9, output="latents", **own).latents[0]
    else:
        sample = engine._planner.samples([sf.Request("a", style=sf.StyleAligned(PICTURE), **own)])[1]
        target = engine._planner.read_picture(sample)[0]
    far, near = (
        sum((a - b).abs().sum() for a, b in zip(means(job_of[strength]), means(target), strict=True))
        for strength in (0.0, 1.0)
    )
    assert near < 0.7 * far


def test_calibration_in_a_batch_equals_itself_alone(engine, adapter_files):
    twins = Twins(engine, adapter_files[0])
    requests = [
        sf.Request("a cat", style=sf.StyleAligned(PICTURE, mode="swap", calibrate=0.7), size=SIZE, steps=5, seed=1),
        sf.Request("a fish", style=sf.StyleAligned(prompt="a star", calibrate=1.0), size=SIZE, steps=4, seed=2),
        sf.Request("a pot", size=SIZE, steps=5, seed=3),
        sf.Request(
            "a hat",
            style=sf.StyleAligned(PICTURE, calibrate=1.0),
            size=(96, 48),
            window=SIZE,
            steps=4,
            seed=4,
            wrap=True,
        ),
    ]
    for request, latents in zip(requests, engine.generate(requests, output="latents").latents, strict=True):
        close(latents[None], twins.drawn([request]))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda engine: sf.StyleAligned(PICTURE, calibrate=1.5), "calibrate is 1.5"),
        (lambda engine: sf.StyleAligned(full_attention_share=True, calibrate=1), "which full_attention_share does not"),
        (
            lambda engine: sf.StyleAligned(engine.bake(sf.StyleAligned(PICTURE), steps=2, size=SIZE), calibrate=1),
            "of which a bank of keys and values has no picture",
        ),
    ],
)
def test_what_can_not_be_calibrated_is_refused(engine, made, message):
    with pytest.raises(StyleError, match=message):
        made(engine)
