"""guided_step in Triton, run in its interpreter, against the reference written out picture by picture."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.guided_step import guided_step
from stylefast.kernels.guided_step import guided_step_ref

SMALL = {"block": 32, "splits": 4, "num_warps": 4}  # several pieces and blocks of the small pictures below
CUTS = {"small blocks": SMALL, "one piece": {**SMALL, "splits": 1}, "as committed": None}
IMAGES, ROWS = 4, 7

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")


def _case(channels=4, height=7, width=5, state=torch.float32, prediction=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    picture = (channels, height, width)
    return {
        "latents": draw(IMAGES, *picture).to(state),
        "anchor": draw(IMAGES, *picture).to(state),
        "history": draw(IMAGES, 2, *picture).to(state),
        "predictions": (draw(ROWS, *picture) * 3 + 1).to(prediction),
        "branch_rows": torch.tensor([[0, 1, 2, 3], [4, -1, -1, 5], [-1, -1, -1, 6], [-1, -1, 2, -1]]),
        "branch_weights": torch.tensor(
            [[-2.0, 0.5, 1.0, 1.5], [-4.0, 9.0, 9.0, 5.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
        ),
        "rescale": torch.tensor([0.7, 0.0, 1.0, 0.5]),
        "denoised": draw(IMAGES, 2),
        "update": draw(IMAGES, 2, 6),
        "noise": draw(IMAGES, *picture).to(state),
    }


def _run(case, config=SMALL):
    out = [torch.full_like(case[name], math.nan) for name in ("latents", "anchor", "history")]
    guided_step(*case.values(), *out, config=config)
    return out


def _check(case, tolerance=2e-5, config=SMALL):
    for name, actual, expected in zip(("latents", "anchor", "history"), _run(case, config), guided_step_ref(**case)):
        torch.testing.assert_close(
            actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("channels, height, width", [(4, 7, 5), (4, 8, 8), (1, 1, 1), (3, 1, 11)])
def test_mixed_pictures_equal_the_reference(cut, channels, height, width):
    _check(_case(channels, height, width), config=CUTS[cut])


@pytest.mark.parametrize("state", [torch.float32, torch.float16, torch.bfloat16], ids=lambda t: f"state {t}")
@pytest.mark.parametrize("prediction", [torch.float16, torch.bfloat16], ids=lambda t: f"predictions {t}")
def test_types_may_be_mixed_and_are_rounded_when_stored(state, prediction):
    bound = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[state]
    _check(_case(state=state, prediction=prediction), tolerance=bound)


def test_each_state_keeps_its_own_type():
    case = _case()
    case["latents"], case["history"] = case["latents"].half(), case["history"].bfloat16()
    _check(case, tolerance=8e-3)


def test_the_update_uses_x0_before_it_is_rounded():
    case = _case(state=torch.bfloat16)
    case["latents"].fill_(1.0)
    case["denoised"][:] = torch.tensor([1.0 + 2**-10, 0.0])
    case["update"].zero_()
    case["update"][:, :, 2], case["update"][:, :, 0] = 1.0, -1.0
    latents, _, history = _run(case)
    assert torch.equal(latents, torch.full_like(latents, 2**-10))
    assert torch.equal(history[:, 0], torch.ones_like(latents))


@pytest.mark.parametrize("layout", ["channels_last", "a slice of rows"])
def test_predictions_are_taken_by_their_strides(layout):
    case = _case()
    if layout == "channels_last":
        case["predictions"] = case["predictions"].contiguous(memory_format=torch.channels_last)
    else:
        case["predictions"] = case["predictions"].repeat_interleave(2, 0)[::2]
    _check(case)


def test_tables_and_pictures_may_lie_apart():
    case = _case()
    for name in ("branch_rows", "branch_weights", "rescale", "denoised", "update"):
        case[name] = case[name].unsqueeze(-1).repeat(*[1] * case[name].ndim, 2)[..., 0]
    for name in ("latents", "anchor", "history", "noise"):
        case[name] = case[name].repeat_interleave(2, 0)[::2]
    _check(case)


def test_what_has_coefficient_zero_may_hold_nan():
    case = _case()
    case["update"][0, :, 0] = 0
    case["denoised"][0, 0] = 0
    case["latents"][0] = math.nan
    case["update"][1, :, 1] = 0
    case["anchor"][1] = math.nan
    case["update"][2, :, 4:] = 0
    case["history"][2, 1] = case["noise"][2] = math.nan
    case["branch_weights"][3, 2] = 0
    case["branch_weights"][0, 2] = 0
    case["predictions"][2] = math.nan
    expected = guided_step_ref(**case)
    assert all(part.isfinite().all() for part in expected)
    _check(case)


def test_a_denoised_coefficient_of_zero_leaves_the_predictions_out():
    case = _case()
    case["denoised"][:, 1] = 0
    case["predictions"].fill_(math.nan)
    _check(case)


def test_the_last_x0_moves_on_whatever_it_holds():
    case = _case()
    case["update"][:, :, 3] = 0
    case["history"][:, 0] = math.nan
    latents, anchor, history = _run(case)
    assert latents.isfinite().all() and anchor.isfinite().all() and history[:, 0].isfinite().all()
    assert history[:, 1].isnan().all()


def test_a_constant_output_is_not_rescaled():
    case = _case()
    case["predictions"].fill_(0.5)
    _check(case)


def test_rescaling_is_safe_where_the_mean_is_far_larger_than_the_deviation():
    case = _case()
    case["predictions"] = case["predictions"] + 1e4
    case["branch_weights"][0] = torch.tensor([0.0, 0.0, 1.0, 2.0])
    _check(case, tolerance=1e-3)


def test_a_row_out_of_range_makes_its_picture_nan_and_no_other():
    case = _case()
    expected = guided_step_ref(**case)
    case["branch_rows"][1, 0] = ROWS
    out = _run(case)
    assert out[0][1].isnan().all() and out[2][1, 0].isnan().all()
    others = [0, 2, 3]
    for actual, wanted in zip(out, expected):
        torch.testing.assert_close(actual[others], wanted[others], rtol=2e-5, atol=2e-5)


def test_pictures_that_are_not_contiguous_are_taken():
    case = _case()
    for name in ("noise", "predictions", "latents"):
        case[name] = case[name].transpose(2, 3).contiguous().transpose(2, 3)
    _check(case)


@pytest.mark.parametrize("empty", ["images", "height"])
def test_zero_sizes_do_nothing(empty):
    case = _case(height=0 if empty == "height" else 7)
    if empty == "images":
        case = {name: value if name == "predictions" else value[:0] for name, value in case.items()}
    assert all(part.numel() == 0 for part in _run(case))
