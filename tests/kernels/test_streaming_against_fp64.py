"""Statistics, norms, GEGLU and the guided step against their formulas in double precision, on drawn inputs.

What a call must not read holds NaN.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from stylefast import kernels
from stylefast.kernels import registry
from stylefast.kernels.adain_affine import adain_affine_ref
from stylefast.kernels.geglu import geglu_ref
from stylefast.kernels.group_norm_silu import group_norm_silu_ref
from stylefast.kernels.guided_step import guided_step_ref
from stylefast.kernels.layer_norm import layer_norm_ref
from tests.kernels.near_fp64 import (
    FORMS,
    HEAD_SIZES,
    assert_as_near_as_pytorch,
    dtypes,
    examples,
    generator,
    laid_out,
    layouts,
    normal,
    row_counts,
    seeds,
    table,
    token_counts,
)

# statistics


@pytest.mark.parametrize("form", FORMS)
@examples
@given(
    seed=seeds,
    rows=row_counts,
    tokens=token_counts,
    heads=st.integers(1, 3),
    dtype=dtypes,
    width=st.sampled_from([8, 24, *HEAD_SIZES]),
    count=st.integers(1, 3),
    centre=st.sampled_from([0.0, -3.0, 200.0]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 50.0]),
    views=st.lists(layouts, min_size=3, max_size=3),
)
def test_token_stats_are_as_near_to_double_precision_as_pytorch(
    form, seed, rows, tokens, heads, dtype, width, count, centre, spread, views
):
    random = generator(seed)
    tensors = [(normal(random, rows, tokens, heads, width) * spread + centre).to(dtype) for _ in range(count)]
    with registry.using(form, "token_stats"):
        mean, variance = kernels.token_stats(*(laid_out(x, view) for x, view in zip(tensors, views)))
    if rows == 0:
        assert mean.shape == variance.shape == ((count,) if count > 1 else ()) + (0, heads, width)
        return
    correction = min(1, tokens - 1)
    exact_variance, exact_mean = torch.var_mean(torch.stack(tensors).double(), 2, correction=correction)
    own_variance, own_mean = torch.var_mean(torch.stack(tensors).float(), 2, correction=correction)
    if count == 1:
        mean, variance = mean[None], variance[None]
    assert_as_near_as_pytorch(mean, own_mean, exact_mean, size=abs(centre) + 4 * spread)
    assert (variance >= 0).all()
    assert_as_near_as_pytorch(variance, own_variance, exact_variance)


@examples
@given(
    seed=seeds,
    parts=st.integers(1, 3),
    rows=row_counts,
    pages=st.integers(0, 2),
    data=st.data(),
    constant=st.booleans(),
    spread=st.booleans(),
)
def test_affine_is_the_formula_and_untouched_where_nothing_moves(seed, parts, rows, pages, data, constant, spread):
    random = generator(seed)
    page = torch.tensor([data.draw(st.integers(-1, rows + pages - 1)) for _ in range(rows)]).long()
    strengths = st.sampled_from([0.0, 1.0, 0.35])
    strength = torch.tensor([[data.draw(strengths) for _ in range(parts)] for _ in range(rows)]).reshape(rows, parts)
    mean, pool_mean = normal(random, parts, rows, 2, 32), normal(random, parts, pages, 2, 32)
    variance, pool_variance = mean.square() + 0.1, pool_mean.square()
    if constant:
        variance[..., ::3] = 0
        pool_variance[..., ::2] = 0
    moved = ((page >= 0)[:, None] & (strength != 0)).t()  # [parts, rows]
    for part in range(parts):
        lent = {int(page[row]) for row in range(rows) if moved[part, row]}
        for row in range(rows):
            if not moved[part, row] and row not in lent:
                mean[part, row] = variance[part, row] = math.nan
    pool = {"pool_mean": pool_mean, "pool_variance": pool_variance} if pages else {}
    statistics = [x.transpose(2, 3).contiguous().transpose(2, 3) if spread else x for x in (mean, variance)]
    found = kernels.adain_affine(*statistics, page, table(strength, spread), **pool)
    exact = adain_affine_ref(
        mean.double(), variance.double(), page, strength, **{name: x.double() for name, x in pool.items()}
    )
    for x, expected, idle in zip(found, exact, (1.0, 0.0)):
        assert x.is_contiguous() and x.dtype == torch.float32
        assert (x[~moved] == idle).all()
        torch.testing.assert_close(x[moved].double(), expected[moved], rtol=3e-6, atol=3e-6 * 400)


# operations without a C++ form


@examples
@given(
    seed=seeds,
    lead=st.lists(st.integers(0, 4), max_size=3),
    inner=st.integers(0, 70),
    dtype=dtypes,
    size=st.sampled_from([0.1, 1.0, 6.0]),
    gaps=st.booleans(),
)
def test_geglu_is_as_near_to_the_formula_as_pytorch(seed, lead, inner, dtype, size, gaps):
    x = (normal(generator(seed), *lead, 2 * inner) * size).to(dtype)
    view = x.new_full((*lead, 2 * inner + 5), math.nan)[..., 2 : 2 * inner + 2].copy_(x) if gaps else x
    hidden, gate = x.chunk(2, -1)
    found = kernels.geglu(view)
    assert found.is_contiguous()
    assert_as_near_as_pytorch(found, hidden * F.gelu(gate), geglu_ref(x.double()))


@examples
@given(
    seed=seeds,
    lead=st.lists(st.integers(0, 5), max_size=3),
    channels=st.integers(1, 90),
    dtype=dtypes,
    centre=st.sampled_from([0.0, 30.0]),
    gaps=st.booleans(),
    residual_gaps=st.booleans(),
)
def test_layer_norms_are_as_near_to_the_formula_as_pytorch(seed, lead, channels, dtype, centre, gaps, residual_gaps):
    random = generator(seed)

    def drawn(wide):
        x = (normal(random, *lead, channels) + centre).to(dtype)
        return x.new_full((*lead, channels + 3), math.nan)[..., 1:-2].copy_(x) if wide else x

    x, residual = drawn(gaps), drawn(residual_gaps)
    weight, bias = normal(random, channels).to(dtype), normal(random, channels).to(dtype)

    def compare(found, x):
        exact = layer_norm_ref(x.double(), weight.double(), bias.double())
        composed = F.layer_norm(x, (channels,), weight, bias)
        # the mean is known to a unit of its own size, and dividing by the deviation makes more of it
        assert found.is_contiguous()
        assert_as_near_as_pytorch(found, composed, exact, logits=abs(centre) * 4)

    compare(kernels.layer_norm(x, weight, bias), x)
    total, normed = kernels.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    compare(normed, total)


@examples
@given(
    seed=seeds,
    rows=row_counts,
    groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
    h=st.integers(2, 7),
    w=st.integers(1, 7),
    dtype=dtypes,
    silu=st.booleans(),
    pages=st.integers(0, 2),
    layout=st.sampled_from(["contiguous", "channels last", "sliced"]),
    data=st.data(),
)
def test_group_norm_is_the_formula_with_any_page(seed, rows, groups, per_group, h, w, dtype, silu, pages, layout, data):
    random, channels = generator(seed), groups * per_group
    x = (normal(random, rows, channels, h, w) * 2 + 1).to(dtype)
    if layout == "channels last" and rows:
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.new_full((rows, channels + 2, h + 1, w + 3), math.nan)[:, 1:-1, 1:, 2:-1].copy_(x)
    weight, bias = normal(random, channels).to(dtype), normal(random, channels).to(dtype)
    page = torch.tensor([data.draw(st.integers(-1, rows + pages - 1)) for _ in range(rows)]).long()
    page = None if data.draw(st.booleans()) else page
    pool = (normal(random, pages, groups), torch.rand(pages, groups, generator=random) + 0.5, 17) if pages else ()
    arguments = (groups, weight, bias, 1e-5, silu, page, *pool)
    found = kernels.group_norm_silu(x, *arguments)
    exact = group_norm_silu_ref(x, *arguments) if rows else x
    assert found.dtype == dtype and not found.isnan().any()
    if layout == "channels last" and rows:
        assert found.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.float32: 3e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


@examples
@given(
    seed=seeds,
    images=st.sampled_from([2, 3, 1, 0]),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    dtype=dtypes,
    predictions=st.integers(1, 5),
    data=st.data(),
    gaps=st.booleans(),
)
def test_guided_step_is_the_formula_and_leaves_out_what_weighs_nothing(
    seed, images, shape, dtype, predictions, data, gaps
):
    random = generator(seed)

    def pictures(*lead, dtype=torch.float32):
        x = normal(random, *lead, *shape).to(dtype)
        if not gaps:
            return x
        return x.new_full((*lead, *shape[:2], shape[2] + 2), math.nan)[..., 1:-1].copy_(x)

    latents, anchor, noise = pictures(images), pictures(images), pictures(images)
    history, predicted = pictures(images, 2), pictures(predictions, dtype=dtype)
    rows = [[data.draw(st.integers(-1, predictions - 1)) for _ in range(4)] for _ in range(images)]
    weights = [[data.draw(st.sampled_from([0.0, 1.0, -2.5, 7.0])) for _ in range(4)] for _ in range(images)]
    rescale = torch.tensor([data.draw(st.sampled_from([0.0, 0.0, 0.7, 1.0])) for _ in range(images)])
    factors = st.sampled_from([0.0, 1.0, -0.6])
    kept = st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, -0.6), (-0.6, 1.0)])
    denoised = torch.tensor([data.draw(kept) for _ in range(images)]).reshape(images, 2)
    update = torch.tensor([[data.draw(factors) for _ in range(12)] for _ in range(images)]).reshape(images, 2, 6)

    used = {row for p in range(images) for row, weight in zip(rows[p], weights[p]) if row >= 0 and weight != 0}
    used |= {rows[p][3] for p in range(images) if rescale[p] != 0}
    predicted[[row for row in range(predictions) if row not in used]] = math.nan
    for p in range(images):
        idle = (update[p] == 0).all(0)
        if idle[0] and denoised[p, 0] == 0:
            latents[p] = math.nan
        if idle[1]:
            anchor[p] = math.nan
        if idle[4]:
            history[p, 1] = math.nan
        if idle[5]:
            noise[p] = math.nan
    rows, weights = torch.tensor(rows).reshape(images, 4).long(), torch.tensor(weights).reshape(images, 4)
    arguments = (latents, anchor, history, predicted, rows, weights, rescale, denoised, update, noise)
    before = [x.clone() for x in arguments]
    for found, expected in zip(kernels.guided_step(*arguments), guided_step_ref(*arguments), strict=True):
        assert found.is_contiguous() and not found.isnan().any()
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)
    for x, old in zip(arguments, before):
        assert torch.equal(x.nan_to_num(1e9), old.nan_to_num(1e9))
