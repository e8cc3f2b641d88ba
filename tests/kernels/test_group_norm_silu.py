"""Group norm with SiLU in every form, both layouts, and statistics pooled with a reference."""

import pytest
import torch
import torch.nn.functional as F

from stylefast.errors import InvalidRequest
from stylefast.kernels.group_norm_silu import group_norm_silu_ref, operation
from tests.kernels.conformance import (
    FLOATS,
    GPU,
    NAN,
    Draw,
    assert_as_near_as_pytorch,
    captured,
    doubled,
    each,
    each_type,
    forms,
    normal,
    same_bits_on_any_number_of_threads,
)

EPS = 1e-5
# several pieces and tiles even for small pictures
SMALL = {"elements": 128, "splits": 4, "programs": 24, "num_warps": 4}


def reference(*grouped):
    return group_norm_silu_ref(*operation.flat(grouped))


def run(form, *flat):
    return form(operation, *operation.grouped(flat))


FORMS = forms(reference, small=SMALL, pieces=SMALL | {"programs": 1000}, committed=None)
CORE = [form for form in FORMS if form.name not in ("triton-pieces", "triton-committed")]
FAST = "torch cpp triton"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
EXAMPLES = {"torch": 40, "cpp": 40, "triton": 4}


def composed(x, groups, weight, bias, eps, silu, page, pool_mean, pool_variance, elements):
    """Pool by the formula over PyTorch's statistics, in fp32, and round once."""
    rows, exact = len(x), torch.float32
    flat = x.to(exact).reshape(rows, groups, -1)
    variance, mean = torch.var_mean(flat, -1, correction=0)
    out = torch.empty_like(flat)
    for row, p in enumerate([-1] * rows if page is None else page.tolist()):
        m, v = mean[row], variance[row]
        if p >= 0:
            count, other = (flat.shape[-1], (mean[p], variance[p])) if p < rows else (elements, None)
            other_m, other_v = other or (pool_mean[p - rows], pool_variance[p - rows])
            both = (flat.shape[-1] * m + count * other_m) / (flat.shape[-1] + count)
            spread = flat.shape[-1] * (v + (m - both) ** 2) + count * (other_v + (other_m - both) ** 2)
            m, v = both, spread / (flat.shape[-1] + count)
        out[row] = (flat[row] - m[:, None]) * torch.rsqrt(v + eps)[:, None]
    out = out.reshape(x.shape) * weight.to(exact)[:, None, None] + bias.to(exact)[:, None, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def check(form, *case):
    found = run(form, *case)
    x = case[0]
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() and form.kind != "reference":
        assert found.is_contiguous(memory_format=torch.channels_last)
    # the mean is known to a unit of its own size, and dividing by the deviation makes more of it
    assert_as_near_as_pytorch(found, composed(*case), group_norm_silu_ref(*doubled(case)), logits=16)


def case(layout="contiguous", rows=4, channels=12, height=5, width=7, groups=4, dtype=torch.float32, silu=True, **pool):
    x = normal(rows, channels, height, width, seed=1) * 1.7 + torch.arange(rows)[:, None, None, None]
    weight, bias = (normal(channels, seed=i, dtype=dtype) for i in (2, 3))
    x = x.to(dtype).contiguous(memory_format=LAYOUTS[layout])
    page = torch.tensor(pool["page"]) if "page" in pool else None
    return x, groups, weight, bias, EPS, silu, page, *pool.get("pool", (None, None)), pool.get("elements", 0)


def pool(groups=4):
    return normal(2, groups, seed=4), normal(2, groups, seed=5).abs()


@each_type(FORMS, FAST)
def test_drawn_calls_are_as_near_to_the_formula_as_pytorch(form, dtype):
    for seed in range(EXAMPLES[form.kind]):
        draw = Draw(seed)
        rows, groups, pages = draw.one((3, 2, 4, 1)), draw.one((1, 2, 3, 4)), draw.one((0, 1, 2))
        channels, (h, w) = (
            groups * draw.one((1, 2, 5, 10)),
            draw.one(((1, 5), (5, 1), (6, 7), (9, 13), (3, 31))),
        )
        x = (draw.normal(rows, channels, h, w) * 2 + 1).to(dtype)
        layout = draw.one(("contiguous", "channels_last", "sliced"))
        if layout == "sliced":
            x = x.new_full((rows, channels + 2, h + 1, w + 3), NAN)[:, 1:-1, 1:, 2:-1].copy_(x)
        else:
            x = x.contiguous(memory_format=LAYOUTS[layout])
        weight, bias = draw.normal(channels, 2, dtype=dtype).unbind(1)
        page = torch.tensor(draw.some(rows, values=range(-1, rows + pages))) if draw.one((True, True, False)) else None
        # entries that no row names hold NaN, and lie apart
        mean, variance = draw.normal(groups, pages).t(), (draw.uniform(groups, pages) + 0.5).t()
        for entry in set(range(pages)) - {p - rows for p in (page.tolist() if page is not None else [])}:
            mean[entry] = variance[entry] = NAN
        stats = (mean, variance, 17) if pages else (None, None, 0)
        check(form, x, groups, weight, bias, EPS, draw.one((True, False)), page, *stats)


@each_layout
@each(CORE, FAST)
def test_one_position_and_many_blocks_are_as_near_to_the_formula_as_pytorch(form, layout):
    check(form, *case(layout, height=1, width=1))
    check(form, *(case(layout, 1, 24, 71, 73, 2) if form.name[:6] != "triton" else case(layout, 1, 8, 16, 16, 2)))


@each_layout
@each(CORE)
def test_pooling_by_two_floats_equals_concatenating_the_feature_maps(form, layout):
    x, *rest = case(layout, page=[-1, 0, 0, 3])
    flat = x.double().reshape(4, 4, -1)
    other = torch.cat([flat[0], flat[2]], -1)
    expected = (flat[2] - other.mean(-1, True)) / (other.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    expected = expected.reshape(x[2].shape) * rest[1][:, None, None] + rest[2][:, None, None]
    out = run(form, x, *rest)
    torch.testing.assert_close(out[2].double(), F.silu(expected), rtol=2e-5, atol=2e-5)
    alone = group_norm_silu_ref(*doubled(case(layout)))  # a row pooled with itself, or with none
    torch.testing.assert_close(out[[0, 3]].double(), alone[[0, 3]], rtol=2e-5, atol=2e-5)


@each(CORE)
def test_a_pool_entry_is_weighted_by_its_elements(form):
    x, *rest = case(page=[4, -1, -1, -1], silu=False)
    other = normal(4, 500, seed=7) * 2 - 1
    stats = (other.mean(-1)[None], other.var(-1, unbiased=False)[None], 500)
    both = torch.cat([x[0].reshape(4, -1), other], -1).double()
    expected = (x[0].reshape(4, -1) - both.mean(-1, True)) / (both.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    expected = expected.reshape(x[0].shape) * rest[1][:, None, None] + rest[2][:, None, None]
    out = run(form, x, *rest[:6], *stats)
    torch.testing.assert_close(out[0].double(), expected, rtol=2e-5, atol=2e-5)


@each_layout
@each(CORE, FAST)
def test_nan_stays_in_the_rows_that_read_it(form, layout):
    mean, variance = pool()
    mean[1] = variance[1] = NAN
    x, *rest = case(layout, page=[-1, 0, 4, 1], pool=(mean, variance), elements=9)
    x[3] = NAN
    out = run(form, x, *rest)
    assert out[:3].isfinite().all() and out[3].isnan().all()


@each_layout
@each(CORE, "cpp triton")
def test_a_mean_far_larger_than_the_deviation_costs_no_accuracy(form, layout):
    x, *rest = case(layout, 2, 16, 16, 17, silu=False)
    x = x + torch.tensor([1e4, -3e4])[:, None, None, None]
    exact = group_norm_silu_ref(x.double(), *doubled(tuple(rest)))
    # two ulp of the mean, in deviations: what any fp32 mean of such numbers is worth
    torch.testing.assert_close(run(form, x, *rest).double(), exact, rtol=3e-3, atol=3e-3)


@each_layout
@each(CORE)
def test_a_constant_group_is_the_bias(form, layout):
    x, groups, weight, bias, *rest = case(layout, silu=False)
    found = run(form, torch.full_like(x, 0.3), groups, weight, bias, *rest)
    torch.testing.assert_close(found, bias[:, None, None].expand(x.shape), rtol=1e-5, atol=1e-4)


@each(CORE)
def test_silu_neither_overflows_nor_loses_its_tail(form):
    bias = torch.tensor([-200.0, -80.0, -20.0, -1.0, 0.0, 1.0, 80.0, 200.0, 1e30, -1e30])
    arguments = (torch.zeros(1, 10, 2, 2), 10, torch.ones(10), bias, EPS, True, None, None, None, 0)
    found = run(form, *arguments)[0, :, 0, 0]
    torch.testing.assert_close(found.double(), F.silu(bias.double()), rtol=2e-5, atol=1e-30)


@each_layout
@each(CORE, "cpp triton")
@pytest.mark.parametrize("banked", [False, True], ids=["without a pool", "with a pool"])
def test_a_page_out_of_range_is_refused_or_makes_its_row_nan_and_no_other(form, layout, banked):
    stats = {"pool": pool(), "elements": 10} if banked else {}
    for bad in (2**40, 6 if banked else 4):
        arguments = case(layout, page=[-1, bad, -1, 0], **stats)
        if form.kind == "cpp":
            with pytest.raises(ValueError, match=f"page is {bad}, but it must be from -1 to {5 if banked else 3}"):
                run(form, *arguments)
            continue
        out = run(form, *arguments)
        expected = group_norm_silu_ref(*doubled(case(layout, page=[-1, -1, -1, 0], **stats)))
        assert out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2, 3]].double(), expected[[0, 2, 3]], rtol=2e-5, atol=2e-5)


@each(CORE, FAST)
def test_other_strides_and_empty_batches_are_taken(form):
    x, *rest = case()
    check(form, x.transpose(2, 3), *rest)
    for shape in ((0, 12, 3, 3), (2, 12, 0, 3)):
        assert run(form, torch.empty(shape), *rest).shape == shape


@each(CORE, "cpp")
def test_one_thread_and_many_give_the_same_bits(form):
    for layout in LAYOUTS:
        given = operation.grouped(case(layout, 3, 40, 48, 49, page=[1, 1, 1]))
        same_bits_on_any_number_of_threads(form, operation, *given)


@each_layout
@each(CORE[-2:-1])
def test_the_kernels_read_and_write_slices_and_refuse_what_32_bits_do_not_reach(form, layout):
    from stylefast.kernels.gpu.group_norm_silu import group_norm_silu

    _, *rest = case(layout)
    wide = case(layout, rows=8, channels=24)[0]
    out = torch.full_like(wide, NAN)
    norm_and_pages = operation.grouped((wide, *rest))[1:]
    group_norm_silu(wide[::2, 6:18], *norm_and_pages, out[::2, 6:18], config=form.config)
    expected = group_norm_silu_ref(*doubled((wide[::2, 6:18], *rest)))
    torch.testing.assert_close(out[::2, 6:18].double(), expected, rtol=2e-5, atol=2e-5)
    assert out[1::2].isnan().all() and out[:, :6].isnan().all() and out[:, 18:].isnan().all()
    huge = torch.empty(1, 2**16, 2**8, 2**8, device="meta").contiguous(memory_format=torch.channels_last)
    with pytest.raises(InvalidRequest, match="not 4294967296"):
        group_norm_silu(huge, *norm_and_pages, huge)


SIZES = [
    (2, 320, 128),
    (4, 640, 64),
    (2, 960, 64),
    (8, 1280, 32),
    (2, 2560, 32),
    (1, 512, 128),
    (1, 128, 512),
    (3, 320, 37),
]


@pytest.mark.gpu
@each_layout
@pytest.mark.parametrize("rows, channels, side", SIZES)
def test_sdxls_sizes_on_a_gpu_are_as_near_as_pytorch(rows, channels, side, layout):
    for dtype in FLOATS:
        check(GPU, *case(layout, rows, channels, side, side, 32, dtype))


@pytest.mark.gpu
@each_layout
def test_captured_in_a_graph_it_follows_new_values_and_pages(layout):
    arguments = case(layout, 4, 640, 64, 64, 32, torch.bfloat16, page=[-1, 0, 0, 0])
    replay, given = captured(operation, *operation.grouped(arguments))
    x, _, pages = given
    x.mul_(0.3)
    pages.page.fill_(3)
    changed = (arguments[0] * 0.3, *arguments[1:6], torch.full((4,), 3), *arguments[7:])
    torch.testing.assert_close(replay(), group_norm_silu_ref(*changed), rtol=2e-2, atol=2e-2)
