"""AdaIN, the guided step, and what holds for all C++ kernels that are bound by memory."""

import pytest
import torch

from stylefast import kernels
from stylefast._extension import extension
from stylefast.kernels.adain_affine import adain_affine_ref
from stylefast.kernels.guided_step import guided_step_ref
from tests.kernels.cpp_streaming_cases import (
    DTYPES,
    EPS,
    NAN,
    adain_affine,
    adain_case,
    add_layer_norm,
    assert_near,
    every_operation,
    geglu,
    geglu_formula,
    group_norm,
    layer_norm,
    norm_case,
    normal,
    refused,
    step,
    step_case,
)
from tests.kernels.near_fp64 import NEEDS_EXTENSION

pytestmark = NEEDS_EXTENSION


def test_adain_gains_and_offsets_equal_the_formula(instruction_set):
    mean, variance, page, strength, *pool = adain_case()
    found = adain_affine(mean, variance, page, strength, *pool)
    expected = adain_affine_ref(mean.double(), variance.double(), page, strength, *(x.double() for x in pool))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=3e-6)


def test_adain_of_odd_widths_and_strided_statistics_equals_the_formula(instruction_set):
    mean, variance, page, strength, *_ = adain_case()
    case = (mean[..., ::3], variance[..., 1:15], page.clamp(max=4), strength.T.contiguous().T, None, None)
    expected = adain_affine_ref(case[0].double(), case[1].double(), *case[2:4])
    for one, other in zip(adain_affine(*case), expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=3e-6)


def test_rows_that_adain_leaves_alone_get_exactly_one_and_zero_whatever_the_statistics_hold(instruction_set):
    mean, variance, page, strength, *pool = adain_case()
    mean[:, 0], variance[:, 0], mean[2, 1], variance[2, 1] = NAN, NAN, NAN, NAN
    page[1] = 2
    gain, offset = adain_affine(mean, variance, page, strength, *pool)
    for part, row in ((0, 0), (1, 0), (2, 0), (2, 1)):
        assert (gain[part, row] == 1).all() and (offset[part, row] == 0).all()
    assert gain[0, 1:].isfinite().all() and offset[0, 1:].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 9, 11), (4, 33, 40)], ids=str)
@pytest.mark.parametrize(
    ("state", "network"),
    [(torch.float32, t) for t in DTYPES] + [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_the_step_equals_the_formula(instruction_set, state, network, shape):
    case = step_case(shape=shape, state=state, network=network)
    for found, expected in zip(step(case), guided_step_ref(**case), strict=True):
        assert found.dtype == expected.dtype
        assert_near(found, expected, factor=8 if found.dtype == torch.float32 else 1)


def test_the_history_moves_on_bit_by_bit_and_the_denoised_picture_is_rounded_only_there(instruction_set):
    case = step_case(network=torch.bfloat16)
    case["update"] = torch.zeros(3, 2, 6)
    case["update"][:, 0, 2] = 1  # the new latents are x0 itself
    latents, anchor, history = step(case)
    assert torch.equal(history[:, 1], case["history"][:, 0])
    assert torch.equal(history[:, 0], latents.bfloat16()) and not torch.equal(latents, latents.bfloat16().float())
    assert (anchor == 0).all()


def test_terms_without_weight_are_not_read(instruction_set):
    case = step_case()
    case["branch_rows"][0, 0] = -1
    case["branch_weights"][:, 2] = 0
    case["rescale"][:] = 0
    case["denoised"][1, 0] = 0
    case["denoised"][2, 1] = 0  # no prediction at all
    case["update"][:, :, 1] = 0
    case["update"][:, :, 4] = 0
    case["update"][:, 0, 5] = 0
    case["update"][1, :, 0] = 0
    expected = step(case)
    poison = {name: case[name].clone() for name in ("latents", "anchor", "history", "predictions", "noise")}
    poison["anchor"][:] = NAN
    poison["history"][:, 1] = NAN
    poison["latents"][1] = NAN
    poison["predictions"][case["branch_rows"][:, 2]] = NAN
    poison["predictions"][case["branch_rows"][2, [0, 3]]] = NAN
    found = step(case, **poison)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(x.isfinite().all() for x in expected)
    poison["noise"][:] = NAN  # the anchor alone still takes it
    latents, anchor, _ = step(case, **poison)
    assert torch.equal(latents, expected[0]) and anchor.isnan().all()


def test_rescale_leaves_constant_outputs_and_pictures_without_a_full_branch_alone(instruction_set):
    case = step_case()
    case["rescale"][:] = 0.7
    case["branch_rows"][0, 3] = -1
    case["branch_weights"][1] = 0  # output 0 everywhere
    found = step(case)
    for one, other in zip(found, guided_step_ref(**case), strict=True):
        assert_near(one, other, factor=8)
    plain = step(case, rescale=torch.tensor([0.0, 0.0, 0.7]))
    assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True))


def test_deviations_of_predictions_far_from_zero_keep_their_digits(instruction_set):
    case = step_case(pictures=1, shape=(4, 33, 40))
    case["predictions"] = case["predictions"] + 1000
    case["branch_weights"] = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    case["rescale"] = torch.ones(1)  # the output gets the deviation of the full branch: its own by half
    case["denoised"] = torch.tensor([[0.0, 1.0]])
    history = step(case)[2][0, 0]
    full = case["predictions"][case["branch_rows"][0, 3]]
    torch.testing.assert_close(history, full, rtol=1e-6, atol=0)


def test_the_step_takes_strided_pictures_and_tables(instruction_set):
    case = step_case()
    strided = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in case.items() if x.ndim >= 4}
    tables = {name: torch.stack([x, x], -1)[..., 0] for name, x in case.items() if x.ndim < 4}
    rows = {"predictions": torch.cat([case["predictions"]] * 2, 1)[:, :4]}
    found, expected = step(case, **strided, **tables), step(case)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(step(case, **rows)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_statistics_err_no_more_than_a_sum_in_double_precision(instruction_set, dtype):
    x = normal(2, 1030, 3, 40, seed=1, dtype=dtype)
    mean, variance = torch.full((1, 2, 3, 40), NAN), torch.full((1, 2, 3, 40), NAN)
    extension().token_stats([x], mean, variance)
    exact_variance, exact_mean = torch.var_mean(x.double(), dim=1)
    for found, exact in ((mean[0], exact_mean), (variance[0], exact_variance)):
        limit = 2 * (exact.float().double() - exact).abs().max()
        assert (found.double() - exact).abs().max() <= limit


def test_the_number_of_threads_changes_no_bit(instruction_set, threads):
    threads(1)
    alone = every_operation()
    threads(3)
    assert all(torch.equal(one, other) for one, other in zip(alone, every_operation(), strict=True))


def test_large_results_in_fresh_memory_are_complete(instruction_set):
    x = normal(1500, 2 * 1024, seed=1)  # 6 MB of results
    out = geglu(x)
    assert_near(out[::97], geglu_formula(x[::97]))
    assert out.isfinite().all()


def test_empty_tensors_are_left_alone(instruction_set):
    none = torch.empty(0)
    assert geglu(torch.empty(0, 6)).shape == (0, 3) and geglu(torch.empty(4, 0)).shape == (4, 0)
    assert layer_norm(torch.empty(2, 0, 8), torch.ones(8), torch.ones(8)).numel() == 0
    for shape in ((0, 4, 3, 3), (2, 4, 0, 3)):
        assert group_norm(torch.empty(shape), 2, torch.ones(4), torch.ones(4)).shape == shape
    empty = {name: x[:0] for name, x in step_case().items()}
    assert step(empty)[0].shape == (0, 4, 9, 11)
    statistics = torch.empty(2, 0, 3, 8)
    adain_affine(statistics, statistics, none.long(), torch.empty(0, 2), None, None)


@pytest.mark.parametrize("page", [[0, -2], [0, 4], [5, 0]], ids=str)
def test_pages_out_of_range_are_refused(page):
    x, weight, bias = norm_case(2, 4, 3, 3, "contiguous")
    pool = torch.zeros(2, 2), torch.ones(2, 2)
    value = next(p for p in page if not -1 <= p < 4)
    with refused(f"page is {value}, but it must be from -1 to 3"):
        group_norm(x, 2, weight, bias, page=page, pool=pool, elements=5)
    mean, pooled = torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8)
    with refused(f"page is {value}, but it must be from -1 to 3"):
        adain_affine(mean, mean, torch.tensor(page), torch.ones(2, 1), pooled, pooled)


@pytest.mark.parametrize("row", [-2, 9])
def test_branch_rows_out_of_range_are_refused(row):
    case = step_case()
    case["branch_rows"][1, 2] = row
    with refused(f"branch_rows is {row}, but it must be from -1 to 8"):
        step(case)


def test_arguments_that_do_not_fit_are_refused():
    x, weight, bias = norm_case(2, 6, 3, 3, "contiguous")
    with refused("6 channels can't be split into 4 groups"):
        group_norm(x, 4, weight, bias)
    with refused("weight does not have the shape .*5.* instead of .*6"):
        group_norm(x, 2, weight[:5], bias)
    with refused("bias must be Float"):
        group_norm(x, 2, weight, bias.half())
    with refused("neither contiguous nor channels last"):
        group_norm(x.transpose(1, 2), 1, torch.ones(3), torch.ones(3))
    with refused("memory format"):
        last = x.contiguous(memory_format=torch.channels_last)
        extension().group_norm_silu(x, 2, weight, bias, EPS, True, None, None, None, 0, last)
    with refused("pool_variance is missing"):
        group_norm(x, 2, weight, bias, pool=(torch.zeros(1, 2), None), elements=1)
    with refused("pool_elements is 0"):
        group_norm(x, 2, weight, bias, pool=(torch.zeros(1, 2), torch.ones(1, 2)))
    with refused("even last dimension"):
        geglu(torch.ones(2, 5))
    with refused("x is Double, which no kernel takes"):
        geglu(torch.ones(2, 6, dtype=torch.float64))
    with refused("out is Half, unlike the input"):
        extension().geglu(torch.ones(2, 6), torch.ones(2, 3).half())
    with refused("out has no evenly spaced rows"):
        extension().geglu(torch.ones(2, 6), torch.ones(2, 6)[:, ::2])
    with refused("residual does not have x's type"):
        add_layer_norm(torch.ones(2, 4), torch.ones(2, 4).half(), torch.ones(4), torch.ones(4))
    with refused("noise does not have the shape"):
        step(step_case(), noise=torch.zeros(3, 4, 9, 10))
    with refused("next_latents does not have the type of what it replaces"):
        case = step_case()
        extension().guided_step(*case.values(), case["latents"].half(), case["anchor"].clone(), case["history"].clone())
    with refused("at least one channel"):
        layer_norm(torch.ones(3, 0), torch.ones(0), torch.ones(0))


def test_the_operations_in_python_agree_with_their_kernels():
    tokens = normal(2, 9, 48, seed=1)
    torch.testing.assert_close(kernels.geglu(tokens), geglu(tokens), rtol=2e-6, atol=2e-6)
    x, weight, bias = norm_case(2, 8, 5, 5, "channels last")
    public = kernels.group_norm_silu(x, 2, weight, bias, EPS, True, torch.tensor([-1, 0]))
    torch.testing.assert_close(public, group_norm(x, 2, weight, bias, page=[-1, 0]), rtol=4e-6, atol=4e-6)
