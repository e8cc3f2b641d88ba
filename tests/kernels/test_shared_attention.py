"""The shared-attention op: fast form against the literal one, and the identities of the papers."""

import math

import pytest
import torch

from stylefast.kernels import registry
from stylefast.kernels.adain_affine import adain_affine
from stylefast.kernels.shared_attention import CONCAT, PLAIN, SWAP, Affine, shared_attention, shared_attention_ref
from stylefast.kernels.token_stats import token_stats

ROWS, TOKENS, HEADS, WIDTH = 4, 11, 2, 32


@pytest.fixture(autouse=True, params=["torch", "cpp"])
def backend(request):
    with registry.using(request.param, "shared_attention"):
        yield request.param


@pytest.fixture
def qkv():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, TOKENS, HEADS, WIDTH, generator=generator) * 2 for _ in range(3)]


def _segments(pages, mode, scale=1.0, shift=0.0):
    page = torch.tensor(pages)
    return page, torch.tensor(mode), torch.full(page.shape, scale), torch.full(page.shape, shift)


def _affine(rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    gain, offset = torch.randn(2, 3, rows, HEADS, WIDTH, generator=generator) * 0.3
    return Affine(gain + 1, offset)


MIXES = {
    "all rows plain": ([[-1], [-1], [-1], [-1]], [PLAIN] * 4),
    "targets read row 0": ([[-1], [0], [0], [0]], [PLAIN, CONCAT, CONCAT, CONCAT]),
    "concat, swap and plain rows together": ([[-1], [0], [0], [-1]], [PLAIN, CONCAT, SWAP, CONCAT]),
    "two references, one missing": ([[-1, -1], [0, 3], [3, -1], [-1, 0]], [PLAIN, CONCAT, SWAP, CONCAT]),
    "rows read the bank's pages": ([[4], [5], [0], [5]], [CONCAT, SWAP, CONCAT, CONCAT]),
    "a row in plain mode ignores its page": ([[2], [2], [-1], [2]], [PLAIN, CONCAT, PLAIN, PLAIN]),
}


@pytest.mark.parametrize("adain", [False, True], ids=["without AdaIN", "with AdaIN"])
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.5, 0.7), (0.0, 0.0), (1.3, -2.0)])
@pytest.mark.parametrize("name", MIXES)
def test_the_fast_form_equals_the_literal_one(qkv, name, scale, shift, adain):
    pool = torch.randn(2, 2, 7, HEADS, WIDTH, generator=torch.Generator().manual_seed(2))
    arguments = (*_segments(*MIXES[name], scale, shift), _affine() if adain else None, pool[0], pool[1])
    expected = shared_attention_ref(*qkv, *arguments)
    torch.testing.assert_close(shared_attention(*qkv, *arguments), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_per_reference_token_is_added_to_its_logits(qkv):
    bias = torch.randn(ROWS, TOKENS, generator=torch.Generator().manual_seed(3))
    arguments = _segments([[-1], [0], [0], [2]], [PLAIN, CONCAT, SWAP, CONCAT], 0.8, 0.1)
    expected = shared_attention_ref(*qkv, *arguments, bias=bias)
    torch.testing.assert_close(shared_attention(*qkv, *arguments, bias=bias), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[1], shared_attention_ref(*qkv, *arguments)[1], atol=1e-3)


def test_strided_views_of_a_fused_projection_are_taken_as_they_are():
    fused = torch.randn(ROWS, TOKENS, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(4))
    q, k, v = fused.unbind(2)
    arguments = _segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, SWAP, CONCAT], 0.9, 0.2)
    expected = shared_attention(q.contiguous(), k.contiguous(), v.contiguous(), *arguments)
    torch.testing.assert_close(shared_attention(q, k, v, *arguments), expected)


def test_a_shift_of_log_2_equals_listing_the_reference_twice(qkv):
    once = shared_attention(*qkv, *_segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, CONCAT, CONCAT], 1.0, math.log(2)))
    twice = shared_attention(*qkv, *_segments([[-1, -1], [0, 0], [0, 0], [0, 0]], [PLAIN, CONCAT, CONCAT, CONCAT]))
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


def test_a_shift_of_minus_infinity_leaves_adain_alone(qkv):
    q, k, v = qkv
    affine = _affine()
    hidden = shared_attention(q, k, v, *_segments([[0]] * 4, [CONCAT] * 4, 1.0, -math.inf), affine)
    moved = [x * affine.gain[i, :, None] + affine.offset[i, :, None] for i, x in enumerate((q, k, v))]
    alone = shared_attention(*moved, *_segments([[-1]] * 4, [PLAIN] * 4))
    torch.testing.assert_close(hidden, alone, rtol=1e-5, atol=1e-5)


def test_an_affine_of_two_parts_leaves_the_values_as_they_are(qkv):
    gain, offset = _affine()
    rest = Affine(torch.cat([gain[:2], torch.ones_like(gain[2:])]), torch.cat([offset[:2], torch.zeros_like(gain[2:])]))
    arguments = _segments([[-1], [0], [0], [2]], [PLAIN, CONCAT, SWAP, CONCAT], 0.8, 0.1)
    two = shared_attention(*qkv, *arguments, Affine(gain[:2], offset[:2]))
    torch.testing.assert_close(two, shared_attention(*qkv, *arguments, rest), rtol=1e-6, atol=1e-6)
    expected = shared_attention_ref(*qkv, *arguments, Affine(gain[:2], offset[:2]))
    torch.testing.assert_close(two, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_of_fp8_pages_may_be_the_same_for_all(qkv):
    generator = torch.Generator().manual_seed(5)
    pool = [torch.randn(2, 7, HEADS, WIDTH, generator=generator).to(torch.float8_e4m3fn) for _ in range(2)]
    scales = torch.rand(2, HEADS, WIDTH, generator=generator) + 0.5
    arguments = _segments([[4], [5], [0], [5]], [CONCAT, SWAP, CONCAT, CONCAT])
    shared = shared_attention(*qkv, *arguments, None, *pool, None, *scales)
    each = scales[:, None].expand(-1, 2, -1, -1)
    torch.testing.assert_close(shared, shared_attention(*qkv, *arguments, None, *pool, None, *each), rtol=0, atol=0)
    dequantised = [x.float() * scale for x, scale in zip(pool, scales)]
    torch.testing.assert_close(shared, shared_attention(*qkv, *arguments, None, *dequantised), rtol=1e-4, atol=1e-5)


def test_scale_zero_gives_reference_tokens_a_logit_of_zero_and_does_not_switch_them_off(qkv):
    q, k, v = qkv
    out = shared_attention(q, k, v, *_segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, CONCAT, CONCAT], 0.0))
    uniform = torch.cat([k[1], torch.zeros_like(k[0])])
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", q[1], uniform) / math.sqrt(WIDTH), -1)
    expected = torch.einsum("hqk,khd->qhd", weights, torch.cat([v[1], v[0]]))
    torch.testing.assert_close(out[1], expected, rtol=1e-5, atol=1e-5)


def test_attending_to_itself_as_a_reference_changes_nothing(qkv):
    plain = shared_attention(*qkv, *_segments([[-1]] * 4, [PLAIN] * 4))
    doubled = shared_attention(*qkv, *_segments([[0], [1], [2], [3]], [CONCAT] * 4, 1.0, 1.5))
    torch.testing.assert_close(doubled, plain, rtol=1e-5, atol=1e-5)


def test_a_target_does_not_notice_the_other_targets(qkv):
    whole = shared_attention(*qkv, *_segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, SWAP, CONCAT]))
    pair = [x[[0, 3]] for x in qkv]
    alone = shared_attention(*pair, *_segments([[-1], [0]], [PLAIN, CONCAT]))
    torch.testing.assert_close(whole[3], alone[1], rtol=1e-6, atol=1e-6)


def test_nan_in_a_row_stays_in_the_rows_that_read_it(qkv):
    k = qkv[1].clone()
    k[2] = math.nan
    out = shared_attention(qkv[0], k, qkv[2], *_segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, SWAP, CONCAT]))
    assert out[[0, 1, 3]].isfinite().all()


def test_adain_gives_a_tensor_the_statistics_of_its_reference(qkv):
    x = qkv[0] * torch.linspace(0.3, 2, ROWS)[:, None, None, None] + torch.arange(ROWS)[:, None, None, None]
    gain, offset = adain_affine(*(s[None] for s in token_stats(x)), torch.zeros(ROWS).long(), torch.ones(ROWS, 1))
    moved = x * gain[0, :, None] + offset[0, :, None]
    torch.testing.assert_close(moved.mean(1), x[0].mean(0).expand(ROWS, -1, -1), rtol=1e-5, atol=1e-5)
    expected = x[0].var(0, unbiased=True).expand(ROWS, -1, -1)
    torch.testing.assert_close(moved.var(1, unbiased=True), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved[0], x[0], rtol=1e-5, atol=1e-5)


def test_half_the_adain_strength_is_half_the_way(qkv):
    stats = [s[None] for s in token_stats(qkv[0])]
    page = torch.zeros(ROWS).long()
    ends = [adain_affine(*stats, page, torch.full((ROWS, 1), s)) for s in (0.0, 0.5, 1.0)]
    moved = [qkv[0] * gain[0, :, None] + offset[0, :, None] for gain, offset in ends]
    torch.testing.assert_close(moved[0], qkv[0])
    torch.testing.assert_close(moved[1], (moved[0] + moved[2]) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_twice_pytorchs_own_error(qkv, dtype):
    q, k, v = (x.to(dtype) for x in qkv)
    arguments = _segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, SWAP, CONCAT], 1.0, 0.5)
    truth = shared_attention_ref(q.float(), k.float(), v.float(), *arguments)
    plain = _segments([[-1]] * 4, [PLAIN] * 4)
    own = shared_attention(q, k, v, *plain).float() - shared_attention_ref(q.float(), k.float(), v.float(), *plain)
    error = shared_attention(q, k, v, *arguments).float() - truth
    assert error.abs().max() <= 2 * own.abs().max() + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.3, -20.0, 300.0])
def test_a_shift_keeps_its_digits_in_half_precision(qkv, dtype, shift):
    q, k, v = (x.to(dtype) for x in qkv)
    for mode in (CONCAT, SWAP):
        arguments = _segments([[-1], [0], [0], [0]], [PLAIN, mode, mode, mode], 1.0, shift)
        truth = shared_attention_ref(q.double(), k.double(), v.double(), *arguments)
        plain = shared_attention(q, k, v).double() - shared_attention_ref(
            q.double(), k.double(), v.double(), *_segments([[-1]] * 4, [PLAIN] * 4)
        )
        error = shared_attention(q, k, v, *arguments).double() - truth
        assert error.abs().max() <= 2 * plain.abs().max() + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift", [1e5, -1e5])
def test_a_shift_beyond_the_types_range_leaves_nothing_but_its_side(qkv, dtype, shift):
    q, k, v = (x.to(dtype) for x in qkv)
    out = shared_attention(q, k, v, *_segments([[-1], [0], [0], [0]], [PLAIN, CONCAT, CONCAT, CONCAT], 1.0, shift))
    side = SWAP if shift > 0 else PLAIN
    alone = _segments([[-1], [0], [0], [0]], [PLAIN, side, side, side])
    # next to 1e5 a logit of fp32 has 7 bits left behind the point
    torch.testing.assert_close(out.float(), shared_attention(q, k, v, *alone).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adain_keeps_its_digits_where_the_mean_is_large(qkv, dtype):
    q, k, v = ((x * 0.02 + 5).to(dtype) for x in qkv)
    page = torch.zeros(ROWS, 1).long()
    affine = adain_affine(*token_stats(q, k, v), page[:, 0], torch.ones(ROWS, 3))
    truth = shared_attention_ref(
        q.double(),
        k.double(),
        v.double(),
        page,
        torch.full((ROWS,), CONCAT),
        torch.ones(ROWS, 1),
        torch.zeros(ROWS, 1),
        Affine(affine.gain.double(), affine.offset.double()),
    )
    error = shared_attention(q, k, v, page, affine=affine).double() - truth
    assert error.abs().max() <= 5 * torch.finfo(dtype).eps * truth.abs().max()
