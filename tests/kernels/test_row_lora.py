"""LoRAs per row in every form: ranks that mix, parts, convolutions, skipped units, and rows that stay apart."""

import pytest
import torch
import torch.nn.functional as F

from stylefast import kernels
from stylefast.errors import InvalidRequest
from stylefast.kernels.row_lora import RANK, LoraPool, LoraRows, operation, output_shape, row_lora_ref
from tests.kernels.conformance import (
    FLOATS,
    GPU,
    MATRICES,
    NAN,
    TORCH,
    Draw,
    Form,
    doubled,
    each,
    each_type,
    equal,
    forms,
    same_bits_on_any_number_of_threads,
)


def _literal(x, down, up, unit, scale, stride, padding, ys):
    for y, result in zip(ys, row_lora_ref(x, ys, LoraPool(down, up), LoraRows(unit, scale), stride, padding)):
        y.copy_(result)


def _traceable(*arguments):
    operation.traceable(*arguments)


ROUNDINGS = 4  # in eps, of one number; see `check`
SMALL = {"tokens": 16, "channels": 16, "out": 16, "num_warps": 4, "num_stages": 2}
LITERAL, *OTHERS = forms(_literal, MATRICES, small=SMALL, committed=None)
FORMS = [LITERAL, Form("torch", "traceable", reference=_traceable), *OTHERS]
CORE = [form for form in FORMS if form.name != "triton-committed"]
EXAMPLES = {"torch": 16, "cpp": 24, "triton": 4}


def results(form, x, ys, *rest):
    """What the form leaves in copies of ys, with the strides of each."""
    ys = [torch.empty_strided(y.shape, y.stride(), dtype=y.dtype).copy_(y) for y in ys]
    down, up, unit, scale, *layer = rest
    form(operation, x, down, up, unit, scale, *(layer or (1, 0)), ys)
    return ys


def composed(x, ys, down, up, unit, scale, stride=1, padding=0):
    """As one would write it: for each row and adapter, two layers."""
    found = [y.clone() for y in ys]
    for part, row, n in torch.nonzero((unit >= 0) & (scale != 0)).tolist():
        a, b = down[unit[part, row, n]], up[unit[part, row, n]]
        factor = scale[row, n].to(x.dtype)
        if x.ndim == 3:
            found[part][row] += factor * F.linear(F.linear(x[row], a[0].t()), b.t())
            continue
        side = 3 if len(a) == 9 else 1
        weight = a.unflatten(0, (side, side)).permute(3, 2, 0, 1)
        inner = F.conv2d(x[row, None], weight, stride=stride, padding=padding)
        found[part][row] += factor * F.conv2d(inner, b.t()[..., None, None])[0]
    return found


def check(form, *arguments):
    """Assert that every number is as near to fp64 as its own roundings allow.

    The inner product is rounded, its share, the sum with y and the sums within; each by half an eps of what is added
    up without signs, which errors of summing stay below too, since they are of either sign.
    """
    exact, sums = exact_of(arguments), sums_of(arguments)
    for found, true, size in zip(results(form, *arguments), exact, sums, strict=True):
        assert found.shape == true.shape
        error, unit = (found.double() - true).abs(), torch.finfo(found.dtype).eps * size
        worst = float((error / unit).nan_to_num().max()) if error.numel() else 0.0
        assert (error <= ROUNDINGS * unit).all(), f"off by {worst:.3g} units in the last place of what is added up"


def exact_of(arguments):
    x, ys, down, up, unit, scale, *layer = (doubled(list_of(x)) for x in arguments)
    return row_lora_ref(x, ys, LoraPool(down, up), LoraRows(unit, scale), *layer)


def sums_of(arguments):
    """What is added up for every number, in fp64 and without signs: |y| + |scale| |x| |A| |B|."""
    x, ys, down, up, unit, scale, *layer = (doubled(list_of(x)) for x in arguments)
    pool, rows = LoraPool(down.abs(), up.abs()), LoraRows(unit, scale.abs())
    return row_lora_ref(x.abs(), [y.abs() for y in ys], pool, rows, *layer)


def list_of(x):
    return tuple(x) if isinstance(x, list) else x


def pool(draw, units, taps, channels, out, dtype=torch.float32):
    """Factors of units whose products are about as large as a layer's, the first one NaN."""
    down = draw.normal(units, taps, channels, RANK) / (taps * channels) ** 0.5
    up = draw.normal(units, RANK, out) / RANK**0.5
    down[0], up[0] = NAN, NAN
    return down.to(dtype), up.to(dtype)


def tables(draw, parts, rows, count, units):
    """Which units the rows use, none of them the first except at a scale of 0."""
    unit = torch.tensor(draw.some(parts, rows, count, values=(-1, *range(1, units))), dtype=torch.int64)
    scale = torch.tensor(draw.some(rows, count, values=(0.0, 1.0, -0.5, 0.7))).reshape(rows, count)
    return torch.where(scale == 0, 0, unit.reshape(parts, rows, count)), scale


def linear_call(draw, dtype, large=False):
    rows, tokens = draw.one((1, 2, 3)), draw.one((1, 5, 16, 49, *((130,) if large else ())))
    channels = draw.one((1, 7, 16, 40, *((300, 530) if large else ())))
    out, parts, count, units = draw.one((1, 5, 16, 33, 72, 136)), draw.one((1, 2, 3)), draw.one((0, 1, 2, 5)), 6
    x = draw.normal(rows, tokens, channels, dtype=dtype)
    if draw.one((True, False)):
        x = x.new_full((rows, tokens, channels + 5), NAN)[..., 2:-3].copy_(x)
    ys = [draw.normal(rows, tokens, out, dtype=dtype) for _ in range(parts)]
    if draw.one((True, False)):
        ys = list(torch.stack(ys, 2).unbind(2))
    return (x, ys, *pool(draw, units, 1, channels, out, dtype), *tables(draw, parts, rows, count, units))


def convolution_call(draw, dtype, large=False):
    rows, channels, out = draw.one((1, 3)), draw.one((3, 16, *((20, 270) if large else ()))), draw.one((1, 4, 20, 40))
    height, width = draw.one((3, 6, *((11,) if large else ()))), draw.one((3, 4, 7))
    taps, stride, padding, parts, count = draw.one((1, 9)), draw.one((1, 2)), draw.one((0, 1)), 1, draw.one((1, 2))
    x = draw.normal(rows, channels, height, width, dtype=dtype)
    down, up = pool(draw, 5, taps, channels, out, dtype)
    y = draw.normal(*output_shape(x, down, up, stride, padding).values(), dtype=dtype)
    formats = (torch.contiguous_format, torch.channels_last)
    x, y = (z.contiguous(memory_format=draw.one(formats)) for z in (x, y))
    return (x, [y], down, up, *tables(draw, parts, rows, count, 5), stride, padding)


@pytest.mark.parametrize("call", [linear_call, convolution_call], ids=["linear", "convolution"])
def test_the_reference_is_the_formula(call):
    for seed in range(24):
        drawn = call(Draw(seed), torch.float32)
        found = composed(*(doubled(list_of(x)) for x in drawn))
        torch.testing.assert_close(found, list(exact_of(drawn)), rtol=1e-12, atol=1e-12)


FAULTS = {
    "a unit is left out": lambda unit, scale: (torch.where(torch.arange(2) == 1, -1, unit), scale),
    "one row's unit is left out": lambda unit, scale: (unit.index_fill(1, torch.tensor([2]), -1), scale),
    "a neighbour's unit": lambda unit, scale: (unit.roll(1, 1), scale),
    "strengths are a thousandth off": lambda unit, scale: (unit, scale * 1.001),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_faults(fault, dtype):
    def faulty(_, x, down, up, unit, scale, stride, padding, ys):
        _literal(x, down, up, *FAULTS[fault](unit, scale), stride, padding, ys)

    given = _simple(dtype=dtype)
    check(LITERAL, *given)
    if "thousandth" in fault and dtype != torch.float32:
        return  # such types don't hold a thousandth
    with pytest.raises(AssertionError, match="units in the last place"):
        check(faulty, *given)


@each_type(FORMS, "reference torch cpp triton")
@pytest.mark.parametrize("call", [linear_call, convolution_call], ids=["linear", "convolution"])
def test_drawn_calls_are_as_near_to_the_formula_as_roundings_allow(form, dtype, call):
    for seed in range(EXAMPLES.get(form.kind, 4)):
        check(form, *call(Draw(seed), dtype, large=form.kind == "cpp"))


@each_type(FORMS, "cpp")
def test_long_sums_stay_as_near(form, dtype):
    draw = Draw(3)
    x, y = draw.normal(1, 50, 2560, dtype=dtype), draw.normal(1, 50, 64, dtype=dtype)
    check(form, x, [y], *pool(draw, 9, 1, 2560, 64, dtype), torch.arange(1, 9)[None, None], torch.ones(1, 8))
    x, y = draw.normal(1, 320, 5, 5, dtype=dtype), draw.normal(1, 32, 5, 5, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    check(form, x, [y], *pool(draw, 2, 9, 320, 32, dtype), torch.ones(1, 1, 1).long(), torch.ones(1, 1), 1, 1)


def adapters(draw, ranks, channels, out):
    """LoRAs of any rank as units of one pool, their merged weights [channels, out], and a table [1, adapters, N]."""
    down, up, merged, rows = [], [], [], []
    for rank in ranks:
        a, b = draw.normal(channels, rank) / channels**0.5, draw.normal(rank, out) / rank**0.5
        units = -(-rank // RANK)
        rows.append(list(range(len(down), len(down) + units)))
        a, b = F.pad(a, (0, units * RANK - rank)), F.pad(b, (0, 0, 0, units * RANK - rank))
        down += a.unflatten(1, (units, RANK)).unbind(1)
        up += b.unflatten(0, (units, RANK)).unbind(0)
        merged.append(a.double() @ b.double())
    longest = max(map(len, rows))
    table = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
    return torch.stack(down)[:, None].contiguous(), torch.stack(up), merged, table[None]


@each(CORE)
def test_adapters_of_any_rank_mix_in_one_batch_and_equal_merged_weights(form):
    draw, ranks = Draw(0), (4, 16, 24, 128, 1)
    down, up, merged, unit = adapters(draw, ranks, 40, 24)
    x, weight = draw.normal(len(ranks), 9, 40), draw.normal(40, 24) / 6
    y, strength = x @ weight, torch.linspace(0.5, 1.5, len(ranks))
    (found,) = results(form, x, [y], down, up, unit, strength[:, None].expand(-1, unit.shape[2]).contiguous())
    for row, delta in enumerate(merged):
        exact = x[row].double() @ (weight.double() + strength[row].double() * delta)
        torch.testing.assert_close(found[row].double(), exact, rtol=1e-5, atol=1e-5)


def _simple(rows=3, tokens=20, channels=24, out=40, count=2, units=6, dtype=torch.float32):
    draw = Draw(7)
    x, ys = draw.normal(rows, tokens, channels, dtype=dtype), [draw.normal(rows, tokens, out, dtype=dtype)]
    unit = 1 + torch.arange(rows * count).reshape(1, rows, count) % (units - 1)
    return x, ys, *pool(draw, units, 1, channels, out, dtype), unit, torch.full((rows, count), 0.7)


@each([form for form in CORE if form is not TORCH], "torch cpp triton")
def test_another_rows_adapter_changes_no_bit_of_a_row(form):
    x, ys, down, up, unit, scale = _simple()
    (before,) = results(form, x, ys, down, up, unit, scale)
    for other, strength in ((5, 0.7), (-1, 0.7), (3, -4.0)):
        changed, strengths = unit.clone(), scale.clone()
        changed[0, 1], strengths[1] = other, strength
        (after,) = results(form, x, ys, down, up, changed, strengths)
        assert equal(after[0], before[0]) and equal(after[2], before[2])
        assert not equal(after[1], before[1])


@each([form for form in CORE if form.kind != "torch"], "cpp triton")
@pytest.mark.parametrize("size", [1, 5, 20, 100, (6, 7)], ids=str)
def test_rows_with_the_same_units_have_the_bits_of_each_alone(form, size):
    draw = Draw(3)
    convolution = isinstance(size, tuple)
    x, y = ((8, 24, *size), (8, 40, *size)) if convolution else ((8, size, 24), (8, size, 40))
    x, y = draw.normal(*x), draw.normal(*y)
    down, up = pool(draw, 6, 9 if convolution else 1, 24, 40)
    # two groups that alternate; a row with the units of one in another order, one that uses half of them, one without
    unit = torch.tensor([[[1, 2], [3, 4], [1, 2], [2, 1], [3, 4], [1, 2], [-1, -1], [1, 2]]])
    scale = 0.5 + torch.rand(8, 2, generator=torch.Generator().manual_seed(1))
    scale[5, 1] = 0
    layer = (1, 1) if convolution else (1, 0)
    (found,) = results(form, x, [y], down, up, unit, scale, *layer)
    for row in range(8):
        one = slice(row, row + 1)
        (alone,) = results(form, x[one], [y[one]], down, up, unit[:, one], scale[one], *layer)
        assert equal(found[one], alone) and equal(found[row], y[row]) == (row == 6)


@each(CORE)
def test_rows_without_units_keep_their_bits_even_beside_nan(form):
    x, ys, down, up, unit, scale = _simple()
    unit[0, 0], scale[1], unit[0, 1], x[:2] = -1, 0.0, 0, NAN  # unit 0 is NaN
    (found,) = results(form, x, ys, down, up, unit, scale)
    assert equal(found[:2], ys[0][:2]) and found[2].isfinite().all() and not equal(found[2], ys[0][2])


@each(CORE)
def test_the_order_of_units_and_a_units_repetition_are_sums(form):
    x, ys, down, up, unit, scale = _simple(count=3)
    scale = scale * torch.tensor([1.0, 2.0, -1.0])
    turned = (unit.flip(2), scale.flip(1)), (unit, scale)
    twice = (unit[..., :1].expand(-1, -1, 2), scale[:, :1].expand(-1, 2)), (unit[..., :1], 2 * scale[:, :1])
    for given, same in (turned, twice):
        (exact,) = exact_of((x, ys, down, up, *same))
        (found,) = results(form, x, ys, down, up, *given)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@each(CORE)
def test_parts_share_x_and_each_has_its_own_units(form):
    x, ys, down, up, unit, scale = _simple()
    ys, units = [ys[0], 2 * ys[0], -ys[0]], torch.cat([unit, torch.full_like(unit, -1), unit.flip(1)])
    check(form, x, ys, down, up, units, scale)
    for y, u in zip(ys, units):
        check(form, x, [y], down, up, u[None], scale)


@each(CORE)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)], ids=str)
def test_zero_sizes_do_nothing(form, shape):
    rows, tokens, out = shape
    x, ys = torch.ones(rows, tokens, 4), [torch.ones(shape)]
    factors = torch.ones(1, 1, 4, RANK), torch.ones(1, RANK, out)
    assert results(form, x, ys, *factors, torch.zeros(1, rows, 1).long(), torch.ones(rows, 1))[0].shape == shape


@each(CORE)
def test_no_units_at_all_change_nothing(form):
    x, ys, down, up, unit, scale = _simple()
    for call in ((down, up, unit[..., :0], scale[:, :0]), (down[:0], up[:0], torch.full_like(unit, -1), scale)):
        assert equal(tuple(results(form, x, ys, *call)), tuple(ys))


@each([form for form in CORE if form.kind != "cpp"], "torch triton")
def test_where_values_are_not_checked_a_unit_out_of_range_makes_its_row_nan(form):
    x, ys, down, up, unit, scale = _simple()
    unit[0, 1, 1] = len(down)
    (found,) = results(form, x, ys, down, up, unit, scale)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@each(CORE, "cpp")
def test_results_have_the_same_bits_on_any_number_of_threads(form):
    x, ys, down, up, unit, scale = _simple(tokens=300)

    def call(_, *arguments):
        return results(form, *arguments)[0]

    same_bits_on_any_number_of_threads(call, operation, x, ys, down, up, unit, scale)


@each(CORE, "torch cpp triton")
def test_only_the_rows_of_a_view_are_written(form):
    x, ys, down, up, unit, scale = _simple()
    wide = torch.full((3, 20, 50), NAN)
    y = wide[..., 4:44].copy_(ys[0])
    form(operation, x, down, up, unit, scale, 1, 0, [y])
    (expected,) = exact_of((x, ys, down, up, unit, scale))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert wide[..., :4].isnan().all() and wide[..., 44:].isnan().all()


def test_the_public_function_writes_in_place_in_fp64_too():
    x, ys, down, up, unit, scale = (doubled(list_of(x)) for x in _simple())
    ys, before = list(ys), ys[0].clone()
    loras = LoraPool(down, up), LoraRows(unit, scale.float())
    assert kernels.row_lora(x, ys, *loras) is None
    torch.testing.assert_close(ys, row_lora_ref(x, [before], *loras), rtol=1e-12, atol=1e-12)


def test_gradients_reach_x_and_the_factors():
    x, ys, down, up, unit, scale = (doubled(list_of(x)) for x in _simple(tokens=3, channels=4, out=5))
    leaves = [z.clone().requires_grad_() for z in (x, down[1:], up[1:])]

    def call(x, down, up):
        y = ys[0].clone()
        kernels.row_lora(x, [y], LoraPool(down, up), LoraRows(unit - 1, scale.float()))
        return y

    assert torch.autograd.gradcheck(call, leaves)


def test_views_of_one_fused_output_are_apart_and_others_that_overlap_are_refused():
    x, _, down, up, unit, scale = _simple()
    fused = torch.zeros(3, 20, 3, 40)
    kernels.row_lora(x, list(fused.unbind(2)), LoraPool(down, up), LoraRows(unit.expand(3, -1, -1), scale))
    assert all(y.abs().sum() > 0 for y in fused.unbind(2))
    wide = torch.zeros(3, 20, 60)
    overlapping = {
        r"ys\[1\] overlaps ys\[0\]": (x, [wide[..., :40], wide[..., 20:]], unit.expand(2, -1, -1)),
        r"ys\[0\] overlaps x": (wide[..., :24], [wide[..., 20:]], unit),
        r"ys\[0\] is expanded": (x, [torch.zeros(1, 20, 40).expand(3, -1, -1)], unit),
    }
    for message, (given, ys, units) in overlapping.items():
        with pytest.raises(InvalidRequest, match=message):
            kernels.row_lora(given, ys, LoraPool(down, up), LoraRows(units, scale))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sdxls_sizes_on_a_gpu_are_as_near(dtype):
    draw = Draw(0)
    for tokens, width, parts, count in ((1024, 1280, 3, 1), (4096, 640, 1, 8), (77, 2048, 2, 2)):
        x, ys = draw.normal(3, tokens, width, dtype=dtype), [draw.normal(3, tokens, 640, dtype=dtype)] * parts
        factors = pool(draw, 12, 1, width, 640, dtype)
        unit = 1 + torch.arange(parts * 3 * count).reshape(parts, 3, count) % 11
        check(GPU, x, ys, *factors, unit, torch.full((3, count), 0.5))
    for stride in (1, 2):
        x = draw.normal(2, 320, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        y = draw.normal(2, 640, 64 // stride, 64 // stride, dtype=dtype).contiguous(memory_format=torch.channels_last)
        unit = torch.tensor([[[1], [2]]])
        check(GPU, x, [y], *pool(draw, 3, 9, 320, 640, dtype), unit, torch.ones(2, 1), stride, 1)
