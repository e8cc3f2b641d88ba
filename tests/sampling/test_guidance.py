"""Guidance as branch weights: DreamStyler's equations, and which branches need no evaluation."""

import math

import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import (
    BRANCHES,
    GuidanceInterval,
    StyleContextGuidance,
    branch_weights_per_step,
    guidance_weights,
)

SETTINGS = [(0.5, 3.0, 5.0), (3.0, 3.0, 5.0), (4.0, 1.0, 5.0), (0.0, 0.0, 7.5), (2.0, 0.0, 0.0), (0.3, 1.7, 0.9)]


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    return {branch: torch.randn(4, 6, 6, generator=generator, dtype=torch.float64).float() for branch in BRANCHES}


def combine(weights, predictions):
    return sum(weight * predictions[branch] for branch, weight in weights.items())


@pytest.mark.parametrize("ls, lc, ln", SETTINGS)
@pytest.mark.parametrize("convention, half", [("code", 0.5), ("paper", 1.0)])
def test_the_collapsed_form_equals_the_four_terms(ls, lc, ln, convention, half, predictions):
    e0, context, style, full = (predictions[b].double() for b in BRANCHES)
    four_terms = e0 + ln * (full - e0)
    four_terms += half * (ls * (style - e0) + lc * (full - style) + lc * (context - e0) + ls * (full - context))
    weights = guidance_weights(5.0, StyleContextGuidance(ls, lc, ln, convention))
    collapsed = combine(weights, {b: p.double() for b, p in predictions.items()})
    torch.testing.assert_close(collapsed, four_terms, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ls, lc", [(0.5, 3.0), (4.0, 1.0)])
def test_the_paper_form_is_equations_9_and_10_together(ls, lc, predictions):
    e0, context, style, full = (predictions[b].double() for b in BRANCHES)
    equation_9 = e0 + lc * (context - e0) + ls * (full - context)
    equation_10 = e0 + ls * (style - e0) + lc * (full - style)
    double = {b: p.double() for b, p in predictions.items()}
    paper = combine(guidance_weights(5.0, StyleContextGuidance(ls, lc, 0.0, "paper")), double)
    torch.testing.assert_close(paper, equation_9 + equation_10 - e0, atol=1e-6, rtol=1e-6)
    code = combine(guidance_weights(5.0, StyleContextGuidance(ls, lc, 0.0, "code")), double)
    torch.testing.assert_close(code, (equation_9 + equation_10) / 2, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "setting, code, paper",
    [((0.5, 3, 5), (6.75, 1.25), (8.5, 2.5)), ((3, 3, 5), (8.0, 0.0), (11, 0)), ((4, 1, 5), (7.5, -1.5), (10, -3))],
)
def test_known_settings_collapse_to_known_weights(setting, code, paper):
    assert StyleContextGuidance(*setting).collapsed() == pytest.approx(code)
    assert StyleContextGuidance(*setting, convention="paper").collapsed() == pytest.approx(paper)


@pytest.mark.parametrize("convention", ["code", "paper"])
def test_equal_style_and_context_need_two_branches_and_are_plain_guidance(convention, predictions):
    guidance = StyleContextGuidance(1.3, 1.3, 4.0, convention)
    weights = guidance_weights(5.0, guidance)
    assert list(weights) == ["null", "full"]
    plain = guidance_weights(guidance.collapsed()[0])
    torch.testing.assert_close(combine(weights, predictions), combine(plain, predictions), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("negative", [1.5, 5.0, 7.5])
def test_no_style_and_no_context_is_plain_guidance_with_the_negative_weight(negative):
    assert guidance_weights(2.0, StyleContextGuidance(0, 0, negative)) == guidance_weights(negative)


def test_unequal_style_and_context_need_all_four_branches_in_order():
    assert tuple(guidance_weights(5.0, StyleContextGuidance())) == BRANCHES


def test_plain_guidance_moves_from_null_through_full():
    assert guidance_weights(5.0) == {"null": -4.0, "full": 5.0}


@pytest.mark.parametrize("guidance", [0, 0.5, 1, 1.0])
def test_guidance_of_one_or_less_needs_only_the_full_branch(guidance):
    assert guidance_weights(guidance) == {"full": 1.0}


@pytest.mark.parametrize("setting", SETTINGS)
def test_weights_sum_to_one_so_that_equal_predictions_pass_through(setting):
    for convention in ("code", "paper"):
        assert sum(guidance_weights(5.0, StyleContextGuidance(*setting, convention)).values()) == pytest.approx(1.0)


@pytest.mark.parametrize("guidance", [-0.1, math.nan, math.inf])
def test_refuses_negative_or_endless_guidance(guidance):
    with pytest.raises(InvalidRequest, match="guidance"):
        guidance_weights(guidance)


@pytest.mark.parametrize("bad", [{"style": -1}, {"context": math.nan}, {"negative": math.inf}, {"convention": "book"}])
def test_style_context_guidance_refuses_bad_values_at_the_door(bad):
    with pytest.raises(InvalidRequest, match=str(next(iter(bad)))):
        StyleContextGuidance(**bad)


@pytest.mark.parametrize(
    "interval, steps, guided",
    [
        ((0, 1), 7, range(7)),
        ((0, 0.8), 10, range(8)),
        ((0, 0.3), 10, range(3)),
        ((0.2, 0.7), 10, range(2, 7)),
        ((0.5, 1), 5, range(3, 5)),
        ((0.1, 0.9), 30, range(3, 27)),
        ((0, 0.01), 4, range(1)),
        ((0, 1), 1, range(1)),
    ],
)
def test_guidance_acts_within_its_interval_and_the_full_branch_alone_outside(interval, steps, guided):
    weights = guidance_weights(5.0, StyleContextGuidance())
    per_step = branch_weights_per_step(weights, steps, GuidanceInterval(*interval))
    assert per_step == [weights if i in guided else {"full": 1.0} for i in range(steps)]


def test_the_whole_interval_guides_every_step_of_any_count():
    for steps in range(1, 200):
        assert (
            branch_weights_per_step({"null": -4.0, "full": 5.0}, steps, GuidanceInterval())
            == [{"null": -4.0, "full": 5.0}] * steps
        )


def test_weights_of_a_step_can_be_changed_without_touching_the_others():
    given = {"null": -4.0, "full": 5.0}
    first, second = branch_weights_per_step(given, 2, GuidanceInterval())
    first["full"] = 0.0
    assert second == given == {"null": -4.0, "full": 5.0}


@pytest.mark.parametrize("bad", [(0.5, 0.5), (0.8, 0.2), (-0.1, 1), (0, 1.1), (math.nan, 1), (0, math.nan)])
def test_a_guidance_interval_is_checked_at_the_door(bad):
    with pytest.raises(InvalidRequest, match="start < end"):
        GuidanceInterval(*bad)


@pytest.mark.parametrize(
    "weights, steps, interval, words",
    [
        ({"full": 1.0}, 4, (0.51, 0.52), "widen"),
        ({"full": 1.0}, 0, (0, 1), "at least 1"),
        ({"content": 1.0}, 4, (0, 1), "content"),
    ],
)
def test_weights_per_step_refuse_what_they_can_not_mean(weights, steps, interval, words):
    with pytest.raises(InvalidRequest, match=words):
        branch_weights_per_step(weights, steps, GuidanceInterval(*interval))
