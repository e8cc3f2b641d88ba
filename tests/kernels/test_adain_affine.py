"""AdaIN's gains and offsets in every form, and what they do to a tensor."""

import pytest
import torch

from stylefast.kernels.adain import adain_affine, adain_affine_ref, token_stats
from stylefast.kernels.adain import affine_operation as operation
from tests.kernels.conformance import NAN, Draw, captured, doubled, each, equal, forms, normal


def reference(mean, variance, page, strength, pool_mean, pool_variance, check_finite):
    return adain_affine_ref(mean, variance, page, strength, pool_mean, pool_variance)


FORMS = forms(reference, small={"block": 64, "num_warps": 4}, committed=None)
FAST = "torch cpp triton"
CORE = [form for form in FORMS if form.name != "triton-committed"]
EXAMPLES = {"torch": 40, "cpp": 40, "triton": 4}


def near(found, expected, tolerance=3e-6):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@each(FORMS, FAST)
def test_drawn_calls_equal_the_formula_and_touch_nothing_that_does_not_move(form):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        parts, rows, pages, width = (
            draw.one((1, 2, 3)),
            draw.one((3, 2, 4, 1, 0)),
            draw.one((0, 1, 2)),
            draw.one((32, 40, 7)),
        )
        page = draw.some(rows, values=range(-1, rows + pages))
        strength = draw.table(draw.some(rows, parts, values=(0.0, 1.0, 0.35)), rows, parts)
        mean = draw.normal(parts, rows, 2, width)
        variance = mean.square() + 0.1
        # a bank's slice of one layer, as a strided view
        pool_mean = draw.normal(parts, pages, 3, 2, width)[:, :, 1]
        pool_variance = pool_mean.square() + draw.one((0.0, 0.2))
        if draw.one((True, False)):  # constant channels
            variance[..., ::3], pool_variance[..., ::2] = 0, 0
        table = torch.tensor(page).long()
        moves = ((table >= 0)[:, None] & (strength != 0)).t()  # [parts, rows]
        for part in range(parts):
            lent = {page[row] for row in range(rows) if moves[part, row]}
            for row in set(range(rows)) - lent:
                if not moves[part, row]:
                    mean[part, row] = variance[part, row] = NAN
            for p in set(range(pages)) - {p - rows for p in lent}:
                pool_mean[part, p], pool_variance[part, p] = NAN, NAN
        if draw.one((True, False)):
            mean, variance = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (mean, variance))
        case = (mean, variance, table, strength, *((pool_mean, pool_variance) if pages else (None, None)), True)
        for x, expected, idle in zip(form(operation, *case), reference(*doubled(case)), (1.0, 0.0)):
            assert x.is_contiguous() and x.dtype == torch.float32
            assert (x[~moves] == idle).all()
            torch.testing.assert_close(x[moves].double(), expected[moves], rtol=3e-6, atol=3e-6 * 400)


@each(CORE, FAST)
def test_gains_and_offsets_equal_the_formula_to_a_few_units(form):
    mean, variance = normal(3, 5, 2, 40, seed=1), normal(3, 5, 2, 40, seed=2).abs() + 0.05
    stats = normal(3, 2, 2, 40, seed=3), normal(3, 2, 2, 40, seed=4).abs()
    strength = normal(5, 3, seed=5).abs().clamp(max=1)
    case = (mean, variance, torch.tensor([-1, 0, 1, 5, 6]), strength, *stats, True)
    near(form(operation, *case), reference(*doubled(case)))


@each(CORE)
def test_a_constant_channel_stays_finite(form):
    mean, variance = torch.ones(1, 2, 1, 32), torch.zeros(1, 2, 1, 32)
    gain, offset = form(operation, mean, variance, torch.tensor([1, 0]), torch.ones(2, 1), None, None, True)
    assert gain.isfinite().all() and offset.isfinite().all()


@each(CORE, "cpp triton")
def test_a_page_out_of_range_is_refused_or_gives_nan_in_its_row_alone(form):
    mean, variance = normal(1, 4, 1, 32), normal(1, 4, 1, 32, seed=1).abs()
    for bad in (4, -2, 2**40):
        case = (mean, variance, torch.tensor([1, bad, -1, 0]), torch.ones(4, 1), None, None, True)
        if form.kind == "cpp":
            with pytest.raises(ValueError, match=f"page is {bad}, but it must be from -1 to 3"):
                form(operation, *case)
            continue
        gain, offset = form(operation, *case)
        assert gain[:, 1].isnan().all() and offset[:, 1].isnan().all()
        assert gain[:, [0, 2, 3]].isfinite().all() and offset[:, [0, 2, 3]].isfinite().all()
    idle = (mean, variance, torch.tensor([3, -1, 0, 2]), torch.zeros(4, 1), None, None, True)
    assert equal(form(operation, *idle), (torch.ones_like(mean), torch.zeros_like(mean)))


def test_adain_gives_a_tensor_the_statistics_of_its_reference():
    x = normal(4, 11, 2, 32) * torch.linspace(0.3, 2, 4)[:, None, None, None] + torch.arange(4)[:, None, None, None]
    gain, offset = adain_affine(*(s[None] for s in token_stats(x)), torch.zeros(4).long(), torch.ones(4, 1))
    moved = x * gain[0, :, None] + offset[0, :, None]
    torch.testing.assert_close(moved.mean(1), x[0].mean(0).expand(4, -1, -1), rtol=1e-5, atol=1e-5)
    expected = x[0].var(0, unbiased=True).expand(4, -1, -1)
    torch.testing.assert_close(moved.var(1, unbiased=True), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[0], x[0], rtol=1e-5, atol=1e-5)


def test_half_the_strength_is_half_the_way():
    x = normal(4, 11, 2, 32)
    stats, page = [s[None] for s in token_stats(x)], torch.zeros(4).long()
    ends = [adain_affine(*stats, page, torch.full((4, 1), s)) for s in (0.0, 0.5, 1.0)]
    moved = [x * gain[0, :, None] + offset[0, :, None] for gain, offset in ends]
    torch.testing.assert_close(moved[0], x)
    torch.testing.assert_close(moved[1], (moved[0] + moved[2]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_call_follows_new_pages():
    mean, variance = normal(3, 4, 10, 64), normal(3, 4, 10, 64, seed=1).abs()
    case = (mean, variance, torch.tensor([-1, 0, 0, 0]), torch.ones(4, 3), None, None, True)
    replay, given = captured(operation, *case)
    given[2].copy_(torch.tensor([1, -1, 3, 2]))
    near(replay(), reference(*doubled((*case[:2], torch.tensor([1, -1, 3, 2]), *case[3:]))), 1e-5)
