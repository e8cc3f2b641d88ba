"""Stages, prompts and style mixing of learned styles."""

import logging
import time

import pytest
import torch

from stylefast.errors import InvalidRequest, PromptError, StyleError
from stylefast.models.text import TextEncoder
from stylefast.sampling.guidance import StyleContextGuidance
from stylefast.styles.dream_styler import (
    TEMPLATE,
    DreamStyler,
    branch_prompts,
    check_places,
    placed_styles,
    pooled_policy_of,
    prompts_per_step,
    stage_of,
)
from stylefast.styles.embeddings import StageEmbedding, save_embedding
from stylefast.styles.style import Texts
from tests.support.small_text import small_text_parts


def embedding(name="brand", stages=6, count=1, seed=0, policy="eos"):
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(stages, count, width, generator=generator) for width in (32, 48))
    return StageEmbedding(name, *rows, pooled_policy=policy)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(*small_text_parts(), force_zeros=True)


@pytest.mark.parametrize(
    ("timestep", "stage"),
    [*zip((0, 167, 334, 500, 667, 834), range(6)), *zip((166, 333, 499, 666, 833, 999), range(6))],
)
def test_stage_edges_of_six_stages(timestep, stage):
    assert stage_of(timestep, 6) == stage_of(float(timestep), 6) == stage_of(torch.tensor(float(timestep)), 6) == stage


def test_stage_of_whole_timesteps_is_exact_for_every_stage_count():
    for stages in range(1, 33):
        assert [stage_of(t, stages) for t in range(1000)] == [t * stages // 1000 for t in range(1000)]


@pytest.mark.parametrize(("timestep", "stage"), [(166.5, 0), (166.7, 1), (999.6, 5), (1000.0, 5), (0.4, 0)])
def test_stage_of_fractional_timesteps(timestep, stage):
    assert stage_of(timestep, 6) == stage


@pytest.mark.parametrize("timestep", [-1, 1000.5, float("nan")])
def test_timesteps_outside_of_the_schedule_are_refused(timestep):
    with pytest.raises(InvalidRequest, match="timestep"):
        stage_of(timestep, 6)


def counts(timesteps, stages=6):
    found = [stage_of(float(t), stages) for t in timesteps]
    return [found.count(k) for k in reversed(range(stages))]


@pytest.mark.parametrize(
    ("scheduler", "steps", "spacing", "offset", "skip", "expected"),
    [
        ("DPMSolverMultistepScheduler", 25, "linspace", 0, 0, [5, 4, 4, 4, 4, 4]),
        ("DPMSolverMultistepScheduler", 25, "leading", 0, 0, [4, 4, 4, 5, 4, 4]),
        ("EulerDiscreteScheduler", 30, "leading", 1, 0, [4, 5, 5, 5, 5, 6]),
        ("EulerDiscreteScheduler", 50, "leading", 0, 0, [8, 8, 9, 8, 8, 9]),
        ("EulerDiscreteScheduler", 8, "trailing", 0, 0, [2, 1, 1, 2, 1, 1]),
        ("EulerDiscreteScheduler", 4, "trailing", 0, 0, [1, 1, 0, 1, 1, 0]),
        ("EulerDiscreteScheduler", 2, "trailing", 0, 0, [1, 0, 0, 1, 0, 0]),
        ("EulerDiscreteScheduler", 1, "trailing", 0, 0, [1, 0, 0, 0, 0, 0]),
        ("UniPCMultistepScheduler", 30, "linspace", 0, 6, [0, 4, 5, 5, 5, 5]),
        ("EulerDiscreteScheduler", 30, "leading", 1, 3, [1, 5, 5, 5, 5, 6]),
        ("EulerDiscreteScheduler", 30, "leading", 1, 6, [0, 3, 5, 5, 5, 6]),
        ("EulerDiscreteScheduler", 30, "leading", 1, 15, [0, 0, 0, 4, 5, 6]),
    ],
)
def test_steps_per_stage_of_common_samplers(scheduler, steps, spacing, offset, skip, expected):
    import diffusers

    sampler = getattr(diffusers, scheduler)(timestep_spacing=spacing, steps_offset=offset)
    sampler.set_timesteps(steps)
    assert counts(sampler.timesteps[skip:]) == expected


def test_karras_timesteps_have_a_stage_each():
    from diffusers import EulerDiscreteScheduler

    sampler = EulerDiscreteScheduler(use_karras_sigmas=True)
    sampler.set_timesteps(20)
    assert any(not float(t).is_integer() for t in sampler.timesteps)
    found = [stage_of(t, 6) for t in sampler.timesteps]
    assert found == sorted(found, reverse=True) and found[0] == 5 and found[-1] == 0


@pytest.mark.parametrize(
    ("prompt", "full", "context"),
    [
        ("a cat", "a cat, in the style of <brand>", "a cat"),
        ("a cat in the style of {style}", "a cat in the style of <brand>", "a cat"),
        ("a cat, in the Style of <brand>, at night", "a cat, in the Style of <brand>, at night", "a cat, at night"),
        ("a {style} cat", "a <brand> cat", "a cat"),
        ("a {red|blue} cat", "a {red|blue} cat, in the style of <brand>", "a {red|blue} cat"),
        ("a <foo> {prompt}", "a <foo> {prompt}, in the style of <brand>", "a <foo> {prompt}"),
    ],
)
def test_branch_prompts(prompt, full, context):
    found = DreamStyler(embedding()).branch_prompts(prompt)
    assert found == {"full": full, "context": context, "style": "A painting in the style of <brand>"}


@pytest.mark.parametrize(
    ("prompt", "full"),
    [
        ("a cat", "a cat, on a red house, in the style of <brand>"),
        ("a cat in the style of {style}, at night", "a cat, on a red house in the style of <brand>, at night"),
        ("a {style} cat {context}", "a <brand> cat on a red house"),
        ("in the style of {style}", "on a red house, in the style of <brand>"),
    ],
)
def test_context_goes_before_the_style_clause(prompt, full):
    found = DreamStyler(embedding(), context="on a red house").branch_prompts(prompt)
    assert found["full"] == full
    assert "on a red house" in found["context"] and "<brand>" not in found["context"]
    assert "red house" not in found["style"]


def test_several_styles_share_one_clause():
    first, second = DreamStyler(embedding("one")), DreamStyler(embedding("two", seed=1), context="on a house")
    found = branch_prompts([first, second], "a cat")
    assert found["full"] == "a cat, on a house, in the style of <one>, <two>"
    assert found["context"] == "a cat, on a house"
    assert found["style"] == "A painting in the style of <one>, <two>"
    named = branch_prompts([first, second], "a <two> cat in the style of {style}")
    assert named["full"] == "a <two> cat, on a house in the style of <one>"


@pytest.mark.parametrize(
    ("styles", "prompt", "match"),
    [
        ([DreamStyler(embedding())], "  ", "say what the picture shows"),
        ([DreamStyler(embedding())], "a cat {context}", "no style of the request has one"),
        ([DreamStyler(embedding())], "a <brand> {style}", "names all styles"),
        ([DreamStyler(embedding(), context="on a house")], "a {style} cat", "no style clause"),
    ],
)
def test_prompts_without_a_place_for_what_they_need_are_refused(styles, prompt, match):
    with pytest.raises(PromptError, match=match):
        branch_prompts(styles, prompt)


def test_a_style_that_the_negative_prompt_names_stays_out_of_a_prompt_that_does_not():
    bad, good = DreamStyler(embedding("bad")), DreamStyler(embedding("good", seed=1))
    assert placed_styles([bad, good], "a cat", "blurry, <bad>") == ([good], [bad])
    assert placed_styles([bad, good], "a <bad> cat", "<bad>") == ([bad, good], [bad])
    assert placed_styles([bad], "a cat", "bad") == ([bad], [])


@pytest.mark.parametrize(
    ("options", "prompt", "negative", "guided", "match"),
    [
        ({}, "a cat", "<brand>", False, "guidance above 1"),
        ({"context": "on a house"}, "a cat", "<brand>", True, "context= of the style <brand>"),
        ({"guidance": StyleContextGuidance()}, "a cat", "<brand>", True, "guidance= of the style <brand>"),
        ({}, "a {style} cat", "<brand>", True, "only the negative prompt names <brand>"),
        ({}, "a cat", "{style}", True, "name the style there: <brand>"),
        ({"template": "{prompt}"}, "a cat", "blurry", True, "nor the negative prompt names <brand>"),
        ({}, "a cat {context}", "", True, "no style of the request has one"),
    ],
)
def test_what_the_two_prompts_and_a_style_can_not_do_together_is_refused(options, prompt, negative, guided, match):
    with pytest.raises(InvalidRequest, match=match):
        check_places([DreamStyler(embedding(), **options)], prompt, negative, guided)


@pytest.mark.parametrize(
    ("template", "prompt", "negative", "guided"),
    [
        ("{prompt}", "a cat", "<brand>", True),
        ("{prompt}", "a <brand> cat", "", False),
        (TEMPLATE, "a {style}", "", False),
        (TEMPLATE, "a <brand> cat", "<brand>", False),
    ],
)
def test_what_they_can_do_together_is_taken(template, prompt, negative, guided):
    check_places([DreamStyler(embedding(), template=template)], prompt, negative, guided)


def test_two_styles_of_one_name_are_refused_and_a_name_helps():
    with pytest.raises(StyleError, match="called 'brand'.*another name="):
        branch_prompts([DreamStyler(embedding()), DreamStyler(embedding(seed=1))], "a cat")
    renamed = DreamStyler(embedding(seed=1), name="other")
    assert renamed.branch_prompts("a cat")["full"].endswith("<other>")


def test_steps_of_one_stage_share_a_prompt_and_the_context_is_stage_free(encoder):
    steps = [999.0, 900.0, 400.0, 10.0]
    found = prompts_per_step([DreamStyler(embedding())], "a cat", steps, ("full", "context", "style"))
    assert [len({id(p) for p in found[b]}) for b in ("full", "context", "style")] == [3, 1, 3]
    states = encoder.encode(found["context"] + found["full"])
    assert states[0] is states[3] and states[4] is states[5] and states[5] is not states[6]


def test_equal_vectors_at_every_stage_equal_a_plain_textual_inversion(encoder):
    single = embedding(stages=1)
    repeated = StageEmbedding("brand", single.clip_l.repeat(6, 1, 1), single.clip_g.repeat(6, 1, 1))
    steps = [950.0, 700.0, 20.0]
    plain = encoder.encode(prompts_per_step([DreamStyler(single)], "a cat", steps)["full"])
    staged = encoder.encode(prompts_per_step([DreamStyler(repeated)], "a cat", steps)["full"])
    for a, b in zip(plain, staged, strict=True):
        assert torch.equal(a.hidden, b.hidden) and torch.equal(a.pooled, b.pooled)


def test_mixing_a_stage_changes_only_that_stage(encoder):
    base, other = embedding(), embedding("other", count=2, seed=5)
    mixed = DreamStyler(base, stages={2: other})
    for stage in range(6):
        expected = (other if stage == 2 else base).stage(stage)
        assert all(torch.equal(a, b) for a, b in zip(mixed.stage_vectors(stage), expected, strict=True))
    steps = [950.0, 700.0, 600.0, 400.0, 200.0, 20.0]
    plain = encoder.encode(prompts_per_step([DreamStyler(base)], "a cat", steps)["full"])
    found = encoder.encode(prompts_per_step([mixed], "a cat", steps)["full"])
    changed = [not torch.allclose(a.hidden, b.hidden, atol=1e-5) for a, b in zip(plain, found, strict=True)]
    assert changed == [stage_of(t, 6) == 2 for t in steps]


def test_a_style_of_one_stage_lends_it_anywhere():
    single = embedding("single", stages=1, seed=3)
    mixed = DreamStyler(embedding(), stages={0: DreamStyler(single), 5: single})
    assert torch.equal(mixed.stage_vectors(5)[0], single.clip_l[0])
    assert torch.equal(mixed.stage_vectors(0)[1], single.clip_g[0])


@pytest.mark.parametrize(("begin", "warned"), [(0, [0]), (1, [0, 4]), (2, [0, 2, 4])])
def test_mixing_at_a_stage_that_no_step_visits_warns(caplog, begin, warned):
    style = DreamStyler(embedding(), stages={stage: embedding(seed=1) for stage in (0, 2, 4)})
    texts = Texts("a cat", "", torch.tensor([799.0, 400.0, 200.0]), 1000, ("full",), begin=begin)
    with caplog.at_level(logging.WARNING, logger="stylefast"):
        DreamStyler.write_prompts([style], texts)
    assert f"stage(s) {warned} of the style" in caplog.text


@pytest.mark.parametrize(
    ("stages", "match"),
    [
        ({6: embedding()}, "0 .last steps. to 5"),
        ({"2": embedding()}, "given as integers"),
        ({1: embedding(stages=4)}, "has 4 stages"),
        ({1: embedding(policy="first_added_token")}, "pools at"),
        ({1: StageEmbedding("wide", torch.zeros(6, 1, 768), torch.zeros(6, 1, 1280))}, "768 and 1280 wide"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, match):
    with pytest.raises(StyleError, match=match):
        DreamStyler(embedding(), stages=stages)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"context": ""}, "context"),
        ({"guidance": 3.0}, "StyleContextGuidance"),
        ({"template": "in the style of {style}"}, "template"),
        ({"style_prompt": "a painting"}, "style_prompt"),
        ({"name": "two words"}, "called 'two words'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match):
    with pytest.raises(StyleError, match=match):
        DreamStyler(embedding(), **arguments)


def test_a_style_loads_from_a_file_and_remembers_it(tmp_path):
    path = save_embedding(embedding(count=2), tmp_path / "brand.safetensors")
    style = DreamStyler(path, guidance=StyleContextGuidance())
    assert (style.name, style.stage_count, style.source) == ("brand", 6, str(path))
    assert torch.equal(style.stage_vectors(4)[0], embedding(count=2).clip_l[4])


def test_styles_that_pool_at_different_places_are_refused():
    assert pooled_policy_of([]) == "eos"
    assert pooled_policy_of([DreamStyler(embedding(policy="first_added_token"))]) == "first_added_token"
    with pytest.raises(StyleError, match="brand: eos, other: first_added_token"):
        pooled_policy_of([DreamStyler(embedding()), DreamStyler(embedding("other", policy="first_added_token"))])


def test_a_long_row_of_blanks_in_a_prompt_costs_no_time():
    """The work once grew with the third power of its length: hours for 30,000, in the thread that makes all steps."""
    style = DreamStyler(embedding())
    for blanks in (" " * 500, " " * 30_000, " , " * 10_000, "\n\t" * 15_000):
        began = time.process_time()
        found = branch_prompts([style], f"a fish{blanks}in the sea, in the style of <brand>")
        assert time.process_time() - began < 0.5
        assert found["context"].startswith("a fish") and found["context"].endswith("in the sea")


@pytest.mark.parametrize("before", ["", " ", ",", ", ", " , ", "  ", ",  "])
def test_the_blanks_and_the_comma_before_a_style_go_with_it(before):
    found = branch_prompts([DreamStyler(embedding())], f"a fish{before or '.'}in the style of <brand> at sea")
    assert found["context"] == ("a fish at sea" if before else "a fish. at sea")
