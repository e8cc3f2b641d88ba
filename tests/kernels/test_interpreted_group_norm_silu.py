"""Group norm with SiLU in Triton, run in its interpreter, in both layouts and with pooled statistics."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="needs the triton package")

from stylefast.errors import InvalidRequest
from stylefast.kernels.gpu.group_norm_silu import group_norm_silu
from stylefast.kernels.group_norm_silu import group_norm_silu_ref

# several pieces and tiles even for small pictures
SMALL = {"elements": 128, "splits": 4, "programs": 24, "num_warps": 4}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where a CUDA device is")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def _case(layout, rows=3, channels=24, height=7, width=9, groups=4, dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, height, width, generator=generator) * 1.7 + offset
    weight, bias = torch.randn(2, channels, generator=generator)
    return {
        "x": x.to(dtype).contiguous(memory_format=LAYOUTS[layout]),
        "groups": groups,
        "weight": weight.to(dtype),
        "bias": bias.to(dtype),
        "eps": 1e-5,
        "silu": True,
        "page": None,
        "pool_mean": None,
        "pool_variance": None,
        "pool_elements": 0,
    }


def _run(case, config=SMALL):
    out = torch.full_like(case["x"], math.nan)
    group_norm_silu(**case, out=out, config=config)
    return out


def _check(case, tolerance=2e-5, config=SMALL):
    torch.testing.assert_close(_run(case, config), group_norm_silu_ref(**case), rtol=tolerance, atol=tolerance)


@each_layout
@pytest.mark.parametrize(
    "channels, groups, silu",
    [(24, 4, True), (24, 4, False), (40, 4, True), (12, 12, True), (10, 1, False), (6, 3, True)],
)
def test_every_grouping_equals_the_reference(layout, channels, groups, silu):
    _check({**_case(layout, channels=channels, groups=groups), "silu": silu})


@each_layout
@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (5, 1), (16, 16), (13, 11)])
def test_pictures_of_any_size_equal_the_reference(layout, height, width):
    _check(_case(layout, height=height, width=width))


@each_layout
@pytest.mark.parametrize(
    "config",
    [None, {**SMALL, "splits": 1}, {**SMALL, "programs": 1000}],
    ids=["as committed", "one piece", "many pieces"],
)
def test_the_cut_into_pieces_does_not_matter(layout, config):
    _check(_case(layout), config=config)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_are_rounded_once(layout, dtype):
    _check(_case(layout, dtype=dtype), tolerance={torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype])


@each_layout
def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy(layout):
    case = {**_case(layout, offset=3e4), "silu": False}
    exact = torch.nn.functional.group_norm(
        case["x"].double(), 4, case["weight"].double(), case["bias"].double(), case["eps"]
    )
    # two ulp of the mean, in deviations: what any fp32 mean of such numbers is worth
    torch.testing.assert_close(_run(case).double(), exact, rtol=1e-2, atol=1e-2)


@each_layout
def test_a_constant_group_stays_finite(layout):
    case = _case(layout)
    case["x"].fill_(5.0)
    _check(case)


@each_layout
def test_statistics_are_pooled_with_rows_of_the_batch(layout):
    case = {**_case(layout, rows=4), "page": torch.tensor([-1, 0, 1, 3])}
    case["x"][1] += 4.0
    _check(case)


@each_layout
def test_statistics_are_pooled_with_a_pool_of_another_size(layout):
    case = _case(layout, rows=4)
    case |= {
        "page": torch.tensor([4, -1, 5, 0]),
        "pool_mean": torch.randn(2, 4),
        "pool_variance": torch.rand(2, 4),
        "pool_elements": 100,
    }
    _check(case)
    for name in ("pool_mean", "pool_variance"):
        case[name] = case[name].t().contiguous().t()
    case["page"] = case["page"].repeat_interleave(2)[::2]
    _check(case)


@each_layout
def test_a_page_that_no_row_uses_may_hold_nan(layout):
    case = _case(layout)
    case |= {
        "page": torch.tensor([-1, 3, -1]),
        "pool_mean": torch.tensor([[0.5] * 4, [math.nan] * 4]),
        "pool_variance": torch.tensor([[0.5] * 4, [math.nan] * 4]),
        "pool_elements": 30,
    }
    _check(case)


@each_layout
@pytest.mark.parametrize("with_pool", [False, True], ids=["without a pool", "with a pool"])
def test_a_page_out_of_range_makes_its_row_nan_and_no_other(layout, with_pool):
    case = _case(layout)
    if with_pool:
        case |= {"pool_mean": torch.zeros(2, 4), "pool_variance": torch.ones(2, 4), "pool_elements": 10}
    expected = group_norm_silu_ref(**case)
    out = _run({**case, "page": torch.tensor([-1, 5 if with_pool else 3, -1])})
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], rtol=2e-5, atol=2e-5)


@each_layout
def test_slices_of_rows_and_channels_are_taken_as_they_are(layout):
    case = _case(layout)
    wide = _case(layout, rows=6, channels=48)["x"]
    case["x"] = wide[::2, 12:36]
    out = torch.full_like(wide, math.nan)
    group_norm_silu(**case, out=out[::2, 12:36], config=SMALL)
    torch.testing.assert_close(out[::2, 12:36], group_norm_silu_ref(**case), rtol=2e-5, atol=2e-5)
    assert out[1::2].isnan().all() and out[:, :12].isnan().all() and out[:, 36:].isnan().all()


def test_other_strides_and_strided_parameters_are_taken():
    case = _case("contiguous")
    case["x"] = case["x"].transpose(2, 3)
    case["weight"], case["bias"] = torch.randn(24, 2).unbind(1)
    _check(case)


def test_pictures_beyond_32_bit_offsets_are_refused_by_name():
    case = _case("contiguous")
    case["x"] = torch.empty(1, 2**16, 2**8, 2**8, device="meta").contiguous(memory_format=torch.channels_last)
    with pytest.raises(InvalidRequest, match="not 4294967296"):
        group_norm_silu(**case, out=case["x"])


@pytest.mark.parametrize("rows, height", [(0, 7), (3, 0)])
def test_zero_sizes_do_nothing(rows, height):
    case = _case("contiguous", rows=rows, height=height)
    assert _run(case).shape == case["x"].shape
