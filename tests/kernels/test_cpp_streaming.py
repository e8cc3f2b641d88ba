"""The C++ kernels of the operations bound by memory, against formulas in double precision, on every instruction set."""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from stylefast import kernels
from stylefast._extension import extension, extension_error
from stylefast.kernels.adain_affine import adain_affine_ref
from stylefast.kernels.guided_step import guided_step_ref

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
pytestmark = pytest.mark.skipif(switched_off, reason=extension_error() or "built")

SETS = ("avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# largest error that rounding explains here, relative and absolute: values are of order 1
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAN = math.nan
EPS = 1e-5


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    usable = SETS[: SETS.index(extension().instruction_set()) + 1] if extension().instruction_set() else ()
    if request.param not in usable:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("STYLEFAST_CPU", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(like, shape=None):
    """NaN in the layout of `like`, for results."""
    if shape is None:
        return torch.full_like(like, NAN)
    return torch.full(shape, NAN, dtype=like.dtype)


def assert_near(found, expected, dtype=None, factor=1.0):
    tolerance = TOLERANCE[dtype or found.dtype] * factor
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


# geglu


def geglu(x):
    out = poisoned(x, (*x.shape[:-1], x.shape[-1] // 2))
    extension().geglu(x, out)
    return out


def geglu_formula(x):
    hidden, gate = x.double().chunk(2, dim=-1)
    return hidden * F.gelu(gate)


@pytest.mark.parametrize("inner", [1, 7, 16, 33, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_geglu_of_any_width_equals_the_formula(instruction_set, dtype, inner):
    x = 2 * normal(2, 5, 2 * inner, seed=inner, dtype=dtype)
    assert_near(geglu(x), geglu_formula(x))


def test_gelu_errs_no_more_than_pytorchs_over_all_sizes_of_gate(instruction_set):
    gate = torch.cat([torch.linspace(-14, 14, 40001), torch.tensor([-1e-30, 1e-30, 1e-3, -1e-3, 30.0, -30.0])])
    found = geglu(torch.stack([torch.ones_like(gate), gate], -1).transpose(0, 1).reshape(1, -1))[0]
    exact = F.gelu(gate.double())
    limit = 2 * (F.gelu(gate).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= limit
    # the negative tail keeps its digits, which 1 + erf can't
    tail = (gate > -5) & (gate < 0)
    assert ((found.double() - exact).abs() <= 2e-6 * exact.abs())[tail].all()


def test_geglu_of_infinities_and_nan_follows_the_formula(instruction_set):
    gate = torch.tensor([math.inf, -math.inf, NAN, 0.0, -0.0, 1e30, -1e30])
    expected = gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert torch.equal(geglu(torch.cat([torch.ones(7), gate])).nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def test_geglu_takes_slices_transposed_rows_and_single_rows(instruction_set):
    wide = normal(6, 4, 50, seed=1)
    for x in (wide[1::2, :, 3:29], wide.transpose(0, 1)[..., :26], wide[0, 0, :26], wide[:, 1:3, :26]):
        assert_near(geglu(x), geglu_formula(x))


# layer norm


def layer_norm(x, weight, bias, eps=EPS):
    out = poisoned(x, x.shape)
    extension().layer_norm(x, weight, bias, eps, out)
    return out


def add_layer_norm(x, residual, weight, bias, eps=EPS):
    total, out = poisoned(x, x.shape), poisoned(x, x.shape)
    extension().add_layer_norm(x, residual, weight, bias, eps, total, out)
    return total, out


def layer_norm_formula(x, weight, bias, eps=EPS):
    return F.layer_norm(x.double(), x.shape[-1:], weight.double(), bias.double(), eps)


@pytest.mark.parametrize("channels", [1, 5, 64, 77, 320])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_of_any_width_equals_the_formula(instruction_set, dtype, channels):
    x, weight, bias = (normal(*s, channels, seed=i, dtype=dtype) for i, s in enumerate(((3, 4), (), ())))
    assert_near(layer_norm(x, weight, bias), layer_norm_formula(x, weight, bias), factor=2)


@pytest.mark.parametrize("channels", [5, 64, 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_to_its_type_and_then_normalised(instruction_set, dtype, channels):
    x, residual = (normal(3, 4, channels, seed=i, dtype=dtype) for i in range(2))
    weight, bias = (normal(channels, seed=i, dtype=dtype) for i in (2, 3))
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert_near(out, layer_norm_formula(total, weight, bias), factor=2)


def test_layer_norm_of_rows_far_from_zero_keeps_its_digits(instruction_set):
    x = normal(5, 640, seed=1) + 1e5 * torch.arange(5)[:, None]
    weight, bias = torch.ones(640), torch.zeros(640)
    assert_near(layer_norm(x, weight, bias), layer_norm_formula(x, weight, bias), factor=2)


def test_layer_norm_of_constant_rows_is_the_bias(instruction_set):
    bias = normal(77, seed=1)
    assert torch.equal(layer_norm(torch.full((2, 77), 3.7), normal(77, seed=2), bias), bias.expand(2, 77))


def test_layer_norm_takes_strided_rows_and_parameters(instruction_set):
    x, residual = normal(4, 6, 90, seed=1)[::2, 1:4, 5:82], normal(3, 2, 77, seed=2).transpose(0, 1)
    weight, bias = normal(77, 2, seed=3).unbind(1)
    total, out = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert_near(out, layer_norm_formula(total, weight, bias), factor=2)


def test_a_nan_stays_in_its_row(instruction_set):
    x = normal(3, 40, seed=1)
    x[1, 7] = NAN
    out = layer_norm(x, torch.ones(40), torch.zeros(40))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


# group norm


LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def group_norm(x, groups, weight, bias, silu=True, page=None, pool=(None, None), elements=0, eps=EPS):
    out = poisoned(x)
    page = None if page is None else torch.tensor(page)
    extension().group_norm_silu(x, groups, weight, bias, eps, silu, page, *pool, elements, out)
    return out


def group_norm_formula(x, groups, weight, bias, silu=True, page=None, pool=(None, None), elements=0, eps=EPS):
    rows = len(x)
    flat = x.double().reshape(rows, groups, -1)
    out = torch.empty_like(flat)
    for row in range(rows):
        p = -1 if page is None else page[row]
        own = flat[row] if not 0 <= p < rows else torch.cat([flat[row], flat[p]], -1)
        mean, variance = own.mean(-1), own.var(-1, unbiased=False)
        if p >= rows:
            n, other_mean, other_variance = flat.shape[-1], *(s[p - rows].double() for s in pool)
            both = (n * mean + elements * other_mean) / (n + elements)
            spread = n * (variance + (mean - both) ** 2) + elements * (other_variance + (other_mean - both) ** 2)
            mean, variance = both, spread / (n + elements)
        out[row] = (flat[row] - mean[:, None]) / torch.sqrt(variance + eps)[:, None]
    out = out.reshape(x.shape) * weight.double()[:, None, None] + bias.double()[:, None, None]
    return F.silu(out) if silu else out


def norm_case(rows, channels, height, width, layout, dtype=torch.float32):
    x = normal(rows, channels, height, width, seed=1, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    return x, normal(channels, seed=2, dtype=dtype), normal(channels, seed=3, dtype=dtype)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no silu"])
@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [(4, 2, 1, 1), (6, 3, 5, 7), (32, 32, 8, 8), (40, 4, 9, 13), (64, 1, 3, 131), (1, 1, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_of_any_shape_equals_the_formula(
    instruction_set, dtype, layout, channels, groups, height, width, silu
):
    x, weight, bias = norm_case(2, channels, height, width, layout, dtype)
    found = group_norm(x, groups, weight, bias, silu)
    assert_near(found, group_norm_formula(x, groups, weight, bias, silu), factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_of_many_blocks_equals_the_formula(instruction_set, layout):
    x, weight, bias = norm_case(1, 24, 71, 73, layout)
    assert_near(group_norm(x, 2, weight, bias), group_norm_formula(x, 2, weight, bias), factor=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_pool_with_rows_and_pool_entries(instruction_set, dtype, layout):
    x, weight, bias = norm_case(5, 12, 6, 7, layout, dtype)
    x = x + torch.arange(5).to(dtype)[:, None, None, None]  # means that differ
    pool = normal(2, 3, seed=4), normal(2, 3, seed=5).abs()
    case = dict(page=[-1, 0, 1, 5, 6], pool=pool, elements=50)
    assert_near(group_norm(x, 3, weight, bias, **case), group_norm_formula(x, 3, weight, bias, **case), factor=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_of_rows_and_pages_that_nobody_names_may_be_nan(instruction_set, layout):
    x, weight, bias = norm_case(4, 8, 5, 5, layout)
    x[3] = NAN
    pool = torch.zeros(2, 2), torch.ones(2, 2)
    pool[0][1], pool[1][1] = NAN, NAN
    out = group_norm(x, 2, weight, bias, page=[-1, 0, 4, 1], pool=pool, elements=9)
    assert out[:3].isfinite().all() and out[3].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_far_from_zero_keeps_its_digits(instruction_set, layout):
    x, weight, bias = norm_case(2, 16, 16, 17, layout)
    x = x + torch.tensor([1e4, -1e5])[:, None, None, None]
    assert_near(group_norm(x, 4, weight, bias), group_norm_formula(x, 4, weight, bias), factor=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_group_is_the_bias(instruction_set, layout):
    x, weight, bias = norm_case(2, 8, 9, 9, layout)
    found = group_norm(torch.full_like(x, 0.3), 2, weight, bias, silu=False)
    assert_near(found, bias[:, None, None].expand(x.shape), factor=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_takes_slices_of_rows(instruction_set, layout):
    x, weight, bias = norm_case(6, 8, 5, 7, layout)
    out = poisoned(x)
    extension().group_norm_silu(x[1::2], 2, weight, bias, EPS, True, None, None, None, 0, out[::2])
    assert_near(out[::2], group_norm_formula(x[1::2], 2, weight, bias), factor=2)
    assert out[1::2].isnan().all()


def test_silu_neither_overflows_nor_loses_its_tail(instruction_set):
    bias = torch.tensor([-200.0, -80.0, -20.0, -1.0, 0.0, 1.0, 80.0, 200.0, 1e30, -1e30])
    x = torch.zeros(1, 10, 2, 2)
    found = group_norm(x, 10, torch.ones(10), bias)[0, :, 0, 0]
    torch.testing.assert_close(found.double(), F.silu(bias.double()), rtol=2e-5, atol=1e-36)


# adain_affine


def adain_case():
    mean, variance = normal(3, 5, 2, 40, seed=1), normal(3, 5, 2, 40, seed=2).abs()
    pool_mean, pool_variance = normal(3, 2, 2, 40, seed=3), normal(3, 2, 2, 40, seed=4).abs()
    strength = torch.rand(5, 3, generator=torch.Generator().manual_seed(5))
    strength[1, 2] = 0
    return mean, variance, torch.tensor([-1, 0, 1, 5, 6]), strength, pool_mean, pool_variance


def adain_affine(mean, *others):
    gain, offset = poisoned(mean, mean.shape), poisoned(mean, mean.shape)
    extension().adain_affine(mean, *others, gain, offset)
    return gain, offset


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


# guided_step


def step_case(pictures=3, shape=(4, 9, 11), state=torch.float32, network=torch.float32):
    latents, anchor, noise = (normal(pictures, *shape, seed=i, dtype=state) for i in range(3))
    history = normal(pictures, 2, *shape, seed=3, dtype=network)
    predictions = normal(3 * pictures, *shape, seed=4, dtype=network)
    rows = torch.randperm(3 * pictures, generator=torch.Generator().manual_seed(5))
    branch_rows = torch.stack([rows[:pictures], torch.full((pictures,), -1), *rows[pictures:].view(2, pictures)], 1)
    return dict(
        latents=latents, anchor=anchor, history=history, predictions=predictions, branch_rows=branch_rows,
        branch_weights=normal(pictures, 4, seed=6), rescale=torch.linspace(0, 1, pictures),
        denoised=normal(pictures, 2, seed=7), update=normal(pictures, 2, 6, seed=8), noise=noise,
    )  # fmt: skip


def step(case, **given):
    out = tuple(poisoned(case[name], case[name].shape) for name in ("latents", "anchor", "history"))
    case = case | given
    extension().guided_step(*case.values(), *out)
    return out


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


# token statistics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_statistics_err_no_more_than_a_sum_in_double_precision(instruction_set, dtype):
    x = normal(2, 1030, 3, 40, seed=1, dtype=dtype)
    mean, variance = torch.full((1, 2, 3, 40), NAN), torch.full((1, 2, 3, 40), NAN)
    extension().token_stats([x], mean, variance)
    exact_variance, exact_mean = torch.var_mean(x.double(), dim=1)
    for found, exact in ((mean[0], exact_mean), (variance[0], exact_variance)):
        limit = 2 * (exact.float().double() - exact).abs().max()
        assert (found.double() - exact).abs().max() <= limit


# all of them


def every_operation(rows=3):
    """Results of every operation at sizes where several threads have work."""
    x, weight, bias = norm_case(rows, 40, 48, 49, "contiguous")
    last = x.contiguous(memory_format=torch.channels_last)
    tokens, residual = normal(rows, 700, 80, seed=4), normal(rows, 700, 80, seed=5)
    parameters = normal(80, seed=6), normal(80, seed=7)
    stats = torch.full((2, rows, 8, 40), NAN), torch.full((2, rows, 8, 40), NAN)
    extension().token_stats([normal(rows, 600, 8, 40, seed=i) for i in (8, 9)], *stats)
    case = step_case(shape=(4, 80, 81))
    page = [1] * rows
    return (
        geglu(tokens), layer_norm(tokens, *parameters), *add_layer_norm(tokens, residual, *parameters),
        group_norm(x, 4, weight, bias, page=page), group_norm(last, 4, weight, bias, page=page), *stats, *step(case),
        *adain_affine(*stats, torch.tensor(page), torch.ones(rows, 2), None, None),
    )  # fmt: skip


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


def refused(match):
    return pytest.raises(ValueError, match=match)


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
