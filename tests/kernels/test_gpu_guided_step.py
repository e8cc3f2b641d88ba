"""guided_step in Triton on a GPU at SDXL's latents, against the reference written out picture by picture."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.kernels.gpu.guided_step import guided_step
from stylefast.kernels.guided_step import guided_step_ref
from tests.kernels.cuda_graphs import capture_and_replay

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
PICTURES = {"1024 x 1024": (4, 128, 128), "odd": (4, 37, 53)}


def _case(picture, images=4, prediction=torch.bfloat16, state=torch.float32):
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, device=DEVICE)

    rows = torch.tensor([[0, 1, 2, 3], [4, -1, -1, 5], [-1, -1, -1, 6], [-1, -1, 2, -1]], device=DEVICE)
    weights = torch.tensor(
        [[-2.0, 0.5, 1.0, 1.5], [-4.0, 9.0, 9.0, 5.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0]], device=DEVICE
    )
    return {
        "latents": draw(images, *picture).to(state),
        "anchor": draw(images, *picture).to(state),
        "history": draw(images, 2, *picture).to(state),
        "predictions": (draw(7, *picture) * 3 + 1).to(prediction),
        "branch_rows": rows[:images],
        "branch_weights": weights[:images],
        "rescale": torch.tensor([0.7, 0.0, 1.0, 0.5], device=DEVICE)[:images],
        "denoised": draw(images, 2),
        "update": draw(images, 2, 6),
        "noise": draw(images, *picture).to(state),
    }


def _outputs(case):
    return [torch.full_like(case[name], math.nan) for name in ("latents", "anchor", "history")]


def _check(out, case, bound=3e-5):
    for name, actual, expected in zip(("latents", "anchor", "history"), out, guided_step_ref(**case)):
        torch.testing.assert_close(
            actual, expected, rtol=bound, atol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("prediction", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mixed_pictures_equal_the_reference(picture, layout, prediction):
    case = _case(PICTURES[picture], prediction=prediction)
    if layout == "channels_last":
        case["predictions"] = case["predictions"].contiguous(memory_format=torch.channels_last)
    out = _outputs(case)
    guided_step(*case.values(), *out)
    _check(out, case)


def test_state_in_half_types_is_rounded_when_stored():
    case = _case(PICTURES["odd"], state=torch.bfloat16)
    out = _outputs(case)
    guided_step(*case.values(), *out)
    _check(out, case, bound=8e-3)


def test_a_row_out_of_range_makes_its_picture_nan_and_no_other():
    case = _case(PICTURES["1024 x 1024"])
    case["branch_rows"][1, 0] = 2**40
    out = _outputs(case)
    guided_step(*case.values(), *out)
    finite = out[0].isfinite().flatten(1)
    assert not finite[1].any() and finite[[0, 2, 3]].all()


def test_captured_in_a_graph_it_follows_new_coefficients():
    case = _case(PICTURES["1024 x 1024"])
    out = _outputs(case)
    arguments = list(case.values())
    graph = capture_and_replay(lambda: guided_step(*arguments, *out), *out)
    _check(out, case)
    case["rescale"].fill_(0.3)
    case["update"].mul_(-0.5)
    case["branch_rows"][:, 3] = 1
    graph.replay()
    _check(out, case)
