"""DreamStyler through the engine: stages by timestep, style and context guidance, mixing, with StyleAligned."""

from dataclasses import replace

import pytest
import torch

import stylefast as sf
from stylefast.sampling.guidance import StyleContextGuidance
from stylefast.styles.embeddings import StageEmbedding
from tests.support.fp64 import close, measured
from tests.support.oracle import generation
from tests.support.oracle.dream_styler import stage_of, style_and_context
from tests.support.scene import RUN, SIZE, StageTexts, apart, encode, guided, learned
from tests.support.watch import held

PROMPTS, SEEDS = ["a cat", "a red house"], [30, 31]
FULL = [f"{prompt}, in the style of {{}}" for prompt in PROMPTS]
STYLE = ["A painting in the style of {}"] * 2


def literal(
    pipe,
    embedding,
    weights=None,
    full=FULL,
    context=PROMPTS,
    style=STYLE,
    convention="code",
    guidance=5.0,
    sharing=None,
    seeds=SEEDS,
    **options,
):
    """The oracle with learned tokens; `weights` (style, context, negative) ask for all four branches."""
    texts = StageTexts(pipe, embedding)
    null, _ = encode(pipe, full)
    if weights is None:

        def branches(timestep):
            return null, texts(full, timestep)

        combine = generation.classifier_free(guidance)
    else:

        def branches(timestep):
            return null, texts.plain(context), texts(style, timestep), texts(full, timestep)

        def combine(null, context, style, full):
            return style_and_context(null, context, style, full, *weights, convention)

    return generation.generate(
        pipe, branches, combine, seeds=seeds, sharing=sharing, **RUN | {"null_branches": (0, 1)} | options
    )


@pytest.mark.parametrize(
    ("scheduler", "stages", "vectors"),
    [
        ("euler", 6, 1),
        ("euler", 1, 1),
        ("ddim", 4, 2),
        ("dpmpp_2m_karras", 6, 1),
        ("dpmpp_2m_karras", 4, 2),
    ],
)
def test_every_step_reads_the_vectors_of_its_stage(pipe, draw, scheduler, stages, vectors):
    embedding = learned(stages=stages, vectors=vectors)
    actual = draw(PROMPTS, sf.DreamStyler(embedding), seed=30, scheduler=scheduler, steps=5)
    close(actual, measured(literal, pipe, embedding, scheduler=scheduler, steps=5))
    apart(actual, draw(PROMPTS, seed=30, scheduler=scheduler, steps=5))


def test_without_guidance_only_the_full_prompt_runs(pipe, draw):
    embedding = learned()
    texts = StageTexts(pipe, embedding)
    expected = measured(
        generation.generate, pipe, lambda timestep: (texts(FULL, timestep),), lambda only: only, seeds=SEEDS, **RUN
    )
    close(draw(PROMPTS, sf.DreamStyler(embedding), seed=30, guidance=1.0), expected)


def test_context_stands_between_the_opening_and_the_style(pipe, draw):
    embedding, words = learned(), "on a red house"
    actual = draw(PROMPTS, sf.DreamStyler(embedding, context=words), seed=30)
    close(actual, measured(literal, pipe, embedding, full=[f"{p}, {words}, in the style of {{}}" for p in PROMPTS]))


def test_a_token_in_the_prompt_stays_where_it_is(pipe, draw):
    embedding = learned()
    actual = draw(["a <sks> cat", "a house of <sks>"], sf.DreamStyler(embedding), seed=30)
    close(actual, measured(literal, pipe, embedding, full=["a {} cat", "a house of {}"]))


# in the negative prompt


@pytest.mark.parametrize("policy", ["eos", "first_added_token"])
def test_a_style_that_only_the_negative_prompt_names_acts_there_alone(pipe, draw, policy):
    embedding = learned(stages=3, vectors=2, pooled_policy=policy)
    expected = measured(negative_alone, pipe, embedding)
    actual = draw(PROMPTS, sf.DreamStyler(embedding), seed=30, negative_prompt="a <sks> dog")
    if policy == "eos":
        close(actual, expected)
    else:
        apart(actual, expected.value)


def negative_alone(pipe, embedding):
    """A learned style in the negative prompt of both pictures, and plain prompts."""
    texts = StageTexts(pipe, embedding)
    _, plain = encode(pipe, PROMPTS)
    return generation.generate(
        pipe,
        lambda t: (texts(["a {} dog"] * 2, t), plain),
        generation.classifier_free(5.0),
        seeds=SEEDS,
        **RUN | {"null_branches": (0,)},
    )


def test_the_reference_of_a_shared_attention_has_the_styles_of_its_negative_prompt(draw, drawn):
    bad, good = sf.DreamStyler(learned("bad")), sf.DreamStyler(learned("good", seed=1))
    alone = sf.StyleAligned(prompt="a dog", share_styles=False, seed=3)
    settings = {"seed": 30, "negative_prompt": "<bad>"}
    # the style of the prompt is not shared, so leaving it out leaves the reference as it is
    expected = drawn("a cat <good>", [sf.StyleAligned(prompt="a dog", seed=3), bad], **settings)
    close(draw("a cat <good>", [alone, bad], **settings), expected)
    apart(draw("a cat <good>", [alone, bad, good], **settings), expected.value)


# style and context guidance


@pytest.mark.parametrize("convention", ["code", "paper"])
@pytest.mark.parametrize("weights", [(0.5, 3.0, 5.0), (4.0, 1.0, 2.0), (2.0, 2.0, 3.0), (0.0, 0.0, 6.0)], ids=str)
def test_collapsed_guidance_equals_the_four_branches(pipe, draw, weights, convention):
    embedding = learned()
    guidance = StyleContextGuidance(*weights, convention)
    actual = draw(PROMPTS, sf.DreamStyler(embedding, guidance=guidance), seed=30)
    close(actual, measured(literal, pipe, embedding, weights, convention=convention))


def test_equal_weights_of_style_and_context_are_plain_guidance_in_two_branches(engine, draw, drawn, monkeypatch):
    embedding, rows = learned(), []
    forward = engine.unet.forward
    monkeypatch.setattr(
        engine.unet,
        "forward",
        lambda latents, *rest, **named: rows.append(len(latents)) or forward(latents, *rest, **named),
    )
    equal = sf.DreamStyler(embedding, guidance=StyleContextGuidance(2.0, 2.0, 3.0))
    actual = draw(PROMPTS, equal, seed=30)
    assert rows == [4, 4]
    close(actual, drawn(PROMPTS, sf.DreamStyler(embedding), seed=30, guidance=5.0))


def test_guidance_rescale_takes_the_deviation_of_the_full_branch(pipe, draw):
    embedding, weights = learned(), (0.5, 3.0, 5.0)
    texts = StageTexts(pipe, embedding)
    null, _ = encode(pipe, FULL)

    def combine(null, context, style, full):
        guided = style_and_context(null, context, style, full, *weights, "code")
        return generation.rescaled(guided, full, 0.6)

    expected = measured(
        generation.generate,
        pipe,
        lambda t: (null, texts.plain(PROMPTS), texts(STYLE, t), texts(FULL, t)),
        combine,
        seeds=SEEDS,
        **RUN,
    )
    style = sf.DreamStyler(embedding, guidance=StyleContextGuidance(*weights))
    close(draw(PROMPTS, style, seed=30, guidance_rescale=0.6), expected)


# identities


@pytest.mark.parametrize("vectors", [1, 3])
def test_equal_vectors_in_all_stages_are_one_vector_bit_for_bit(engine, draw, vectors):
    single = learned(stages=1, vectors=vectors)
    six = replace(single, clip_l=single.clip_l.repeat(6, 1, 1), clip_g=single.clip_g.repeat(6, 1, 1))
    for one, many in zip(draw(PROMPTS, sf.DreamStyler(single), seed=30), draw(PROMPTS, sf.DreamStyler(six), seed=30)):
        assert torch.equal(one, many)
    assert not any(held(engine).values())  # the one page has six prompts, but as many users as it was given


def test_requests_in_different_stages_equal_solo_runs(draw, drawn):
    style, other = sf.DreamStyler(learned()), sf.DreamStyler(learned("abc", stages=3, seed=1))
    requests = [
        sf.Request("a cat", style=style, seed=1, steps=5, size=SIZE),
        sf.Request("a cat", style=style, seed=2, steps=3, scheduler="ddim", size=SIZE),
        sf.Request("a dog", style=other, seed=3, steps=2, size=SIZE),
        sf.Request("a dog", style=[style, other], seed=4, steps=4, guidance=1.0, size=SIZE),
        sf.Request("a dog", seed=5, steps=4, size=SIZE),
    ]
    for request, together in zip(requests, draw(requests)):
        close([together], drawn(request))


@pytest.mark.parametrize("stage", [5, 3, 2, 0])
def test_a_mixed_stage_leaves_the_steps_before_it_bit_identical(engine, stage):
    embedding, steps = learned(), 8

    def sample(style):
        seen = []
        engine.generate(
            "a cat",
            style,
            size=SIZE,
            steps=steps,
            output="latents",
            callback=lambda step, total, latents: seen.append(latents.clone()),
        )
        return seen

    base = sample(sf.DreamStyler(embedding))
    mixed = sample(sf.DreamStyler(embedding, stages={stage: learned("other", seed=9)}))
    timesteps = engine._planner.schedule(sf.Request("a cat", steps=steps)).timesteps.tolist()
    first = next(i for i, timestep in enumerate(timesteps) if stage_of(timestep, 6) == stage)
    for step in range(steps):
        same = torch.equal(base[step], mixed[step])
        assert same if step < first else not same, f"step {step}, stage {stage} begins at {first}"


def test_mixing_takes_the_vectors_of_the_other_style_at_that_stage(pipe, draw):
    one, other = learned(), learned("other", seed=9)
    mixed = StageEmbedding(
        "sks", *(torch.cat([a[:4], b[4:5], a[5:]]) for a, b in ((one.clip_l, other.clip_l), (one.clip_g, other.clip_g)))
    )
    actual = draw(PROMPTS, sf.DreamStyler(one, stages={4: other}), seed=30, steps=5)
    close(actual, measured(literal, pipe, mixed, steps=5))


# with StyleAligned: every branch reads its own branch of the reference

BRANCHES = {
    "full": (1.0, None),
    "null_full": (5.0, None),
    "context_style_full": (5.0, (0.0, 2.0, 0.0)),
    "all_four": (5.0, (0.5, 3.0, 5.0)),
}


@pytest.mark.parametrize(("guidance", "weights"), BRANCHES.values(), ids=BRANCHES)
def test_every_branch_reads_its_own_branch_of_the_reference(pipe, draw, guidance, weights):
    embedding = learned()
    context = None if weights is None else StyleContextGuidance(*weights)
    styles = [sf.StyleAligned(shift=0.3, share_group_norm=True), sf.DreamStyler(embedding, guidance=context)]
    actual = draw(PROMPTS, styles, seed=30, guidance=guidance)
    sharing = {"shift": 0.3, "share_group_norm": True}
    if guidance == 1:
        texts = StageTexts(pipe, embedding)
        expected = measured(
            generation.generate,
            pipe,
            lambda timestep: (texts(FULL, timestep),),
            lambda only: only,
            seeds=SEEDS,
            sharing=sharing,
            **RUN,
        )
    else:
        expected = measured(literal, pipe, embedding, weights, sharing=sharing)
    close(actual, expected)


def test_a_hidden_reference_wears_the_learned_style_unless_told_otherwise(pipe, draw):
    embedding, weights = learned(), (0.5, 3.0, 5.0)
    style = sf.DreamStyler(embedding, guidance=StyleContextGuidance(*weights))
    seeds = [8, *SEEDS]
    full = ["a dog, in the style of {}", *FULL]
    shared = draw(PROMPTS, [sf.StyleAligned(prompt="a dog", seed=8), style], seed=30)
    expected = measured(
        literal,
        pipe,
        embedding,
        weights,
        full=full,
        context=["a dog", *PROMPTS],
        style=STYLE[:1] * 3,
        sharing={},
        seeds=seeds,
    )
    close(shared, expected[1:])

    bare = draw(PROMPTS, [sf.StyleAligned(prompt="a dog", seed=8, share_styles=False), style], seed=30)
    expected = measured(
        literal,
        pipe,
        embedding,
        weights,
        full=["a dog", *FULL],
        context=["a dog", *PROMPTS],
        style=["a dog", *STYLE],
        sharing={},
        seeds=seeds,
    )
    close(bare, expected[1:])
    apart(bare, shared)


def test_a_reference_without_the_learned_style_serves_branches_it_does_not_need_itself(pipe, draw):
    """The first prompt runs two branches of its own; its reader needs four."""
    embedding, weights = learned(), (0.5, 3.0, 5.0)
    aligned = sf.StyleAligned()
    requests = [
        sf.Request("a dog", style=aligned, seed=30, size=SIZE, steps=2),
        sf.Request(
            PROMPTS[1],
            style=[aligned, sf.DreamStyler(embedding, guidance=StyleContextGuidance(*weights))],
            seed=31,
            size=SIZE,
            steps=2,
        ),
    ]
    reference, target = draw(requests)
    close([reference], measured(guided, pipe, ["a dog"], [30]))

    texts = StageTexts(pipe, embedding)
    null, _ = encode(pipe, PROMPTS)

    def combine(null, context, style, full):
        whole = style_and_context(null, context, style, full, *weights, "code")
        return torch.stack([generation.classifier_free(5.0)(null[:1], full[:1])[0], whole[1]])

    expected = measured(
        generation.generate,
        pipe,
        lambda t: (null, *(texts(["a dog", prompts[1]], t) for prompts in (PROMPTS, STYLE, FULL))),
        combine,
        seeds=SEEDS,
        sharing={},
        **RUN,
    )
    close([target], expected[1:])
