"""guided_step against its literal form, diffusers' guidance rescale, and values that must not leak."""

import math

import pytest
import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels.guided_step import guided_step, guided_step_ref

NAMES = (
    "latents",
    "anchor",
    "history",
    "predictions",
    "branch_rows",
    "branch_weights",
    "rescale",
    "denoised",
    "update",
    "noise",
)


def batch(images=5, picture=(4, 5, 7), seed=0):
    """Pictures with one, two and four branches, with and without rescale, and full or sparse coefficients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    layouts = [[0, -1, -1, 1], [2, 3, 4, 5], [-1, -1, -1, 6], [7, -1, 8, 9], [10, 11, 12, 13]]
    update = draw(images, 2, 6)
    update[torch.rand(images, 2, 6, generator=generator) < 0.3] = 0.0
    return {
        "latents": draw(images, *picture),
        "anchor": draw(images, *picture),
        "history": draw(images, 2, *picture),
        "predictions": draw(14, *picture),
        "branch_rows": torch.tensor([layouts[i % 5] for i in range(images)], dtype=torch.int64).reshape(images, 4),
        "branch_weights": draw(images, 4) * 3,
        "rescale": torch.tensor([0.0, 0.7, 0.0, 1.0, 0.3])[torch.arange(images) % 5],
        "denoised": draw(images, 2),
        "update": update,
        "noise": draw(images, *picture),
    }


def assert_equal_results(ours, theirs, tolerance=1e-5):
    for name, a, b in zip(("latents", "anchor", "history"), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("images", [0, 1, 2, 5, 7])
@pytest.mark.parametrize("picture", [(4, 5, 7), (4, 8, 8), (1, 1, 1), (3, 1, 9)])
def test_the_fast_form_equals_the_literal_one(images, picture):
    args = batch(images, picture)
    assert_equal_results(guided_step(**args), guided_step_ref(**args))


def test_strided_and_channels_last_inputs_give_the_same():
    args = batch()
    expected = guided_step(**args)
    strided = dict(args)
    strided["latents"] = args["latents"].contiguous(memory_format=torch.channels_last)
    strided["predictions"] = args["predictions"].repeat_interleave(2, dim=0)[::2]
    strided["noise"] = args["noise"].transpose(2, 3).contiguous().transpose(2, 3)
    assert_equal_results(guided_step(**strided), expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_combined_in_float32(dtype):
    args = batch()
    half = {
        k: v.to(dtype) if k in ("latents", "anchor", "history", "predictions", "noise") else v for k, v in args.items()
    }
    exact = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
    for got, literal, expected in zip(guided_step(**half), guided_step_ref(**half), guided_step(**exact), strict=True):
        assert got.dtype == literal.dtype == dtype
        # only the rounding of the result itself is left
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), expected, atol=eps, rtol=eps)
        torch.testing.assert_close(literal.float(), expected, atol=eps, rtol=eps)


@pytest.mark.parametrize("step", [guided_step, guided_step_ref])
def test_unused_inputs_may_hold_nan(step):
    args = batch()
    args["branch_weights"][1, 2] = 0.0
    args["branch_weights"][0, 1:3] = math.nan
    args["branch_weights"][2, :3] = math.nan
    args["branch_weights"][3, 1] = math.nan
    args["update"][:, :, [1, 4]] = 0.0
    args["update"][:, :, 5] = 0.0
    expected = step(**{**args, "branch_weights": args["branch_weights"].nan_to_num(0.0)})
    poisoned = {k: v.clone() for k, v in args.items()}
    poisoned["predictions"][4] = math.nan
    poisoned["anchor"][:] = math.nan
    poisoned["history"][:, 1] = math.inf
    poisoned["noise"][:] = math.nan
    got = step(**poisoned)
    assert all(torch.isfinite(tensor).all() for tensor in got)
    assert_equal_results(got, expected, 0.0)


@pytest.mark.parametrize("step", [guided_step, guided_step_ref])
def test_nan_in_a_used_branch_reaches_only_its_own_picture(step):
    args = batch()
    args["predictions"][3] = math.nan
    args["update"][:, 0, 2] = 1.0
    latents, _, history = step(**args)
    assert latents[1].isnan().all() and history[1, 0].isnan().all()
    assert torch.isfinite(latents[[0, 2, 3, 4]]).all() and torch.isfinite(history[[0, 2, 3, 4]]).all()


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_diffusers(strength):
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    generator = torch.Generator().manual_seed(4)
    null, full = torch.randn(2, 3, 4, 6, 6, generator=generator)
    guided = null + 5.0 * (full - null)
    expected = rescale_noise_cfg(guided, full, guidance_rescale=strength)
    zeros = torch.zeros(3, 4, 6, 6)
    args = {
        "latents": zeros,
        "anchor": zeros,
        "history": torch.zeros(3, 2, 4, 6, 6),
        "noise": zeros,
        "predictions": torch.cat([null, full]),
        "branch_rows": torch.tensor([[i, -1, -1, 3 + i] for i in range(3)]),
        "branch_weights": torch.tensor([[-4.0, 0.0, 0.0, 5.0]]).expand(3, 4),
        "rescale": torch.full((3,), strength),
        "denoised": torch.tensor([[0.0, 1.0]]).expand(3, 2),
        "update": torch.zeros(3, 2, 6),
    }
    for step in (guided_step, guided_step_ref):
        torch.testing.assert_close(step(**args)[2][:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [guided_step, guided_step_ref])
def test_rescale_of_a_constant_output_leaves_it_finite(step):
    args = batch()
    args["predictions"][:] = 0.0
    assert all(torch.isfinite(tensor).all() for tensor in step(**args))


def test_history_moves_on_by_one():
    args = batch()
    _, _, history = guided_step(**args)
    assert torch.equal(history[:, 1], args["history"][:, 0])


def test_inputs_are_left_as_they_were():
    args = batch()
    before = {name: tensor.clone() for name, tensor in args.items()}
    guided_step(**args)
    assert all(torch.equal(args[name], before[name]) for name in NAMES)


def test_pictures_do_not_depend_on_their_neighbours():
    args = batch()
    together = guided_step(**args)
    for i in range(5):
        alone = {k: v if k == "predictions" else v[i : i + 1] for k, v in args.items()}
        assert_equal_results(guided_step(**alone), [tensor[i : i + 1] for tensor in together], 1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "latents"])
def test_refuses_shapes_that_do_not_fit_and_names_the_argument(name):
    args = batch()
    args[name] = args[name][..., :-1] if name != "predictions" else args[name][:, :-1]
    with pytest.raises(InvalidRequest, match=name):
        guided_step(**args)
