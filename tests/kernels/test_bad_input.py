"""Bad input to the operations: a ValueError that names the value and the limit, before anything is computed."""

import math

import pytest
import torch

from stylefast import kernels

ROWS, TOKENS, HEADS, WIDTH = 2, 6, 2, 32


def _shared(**changes):
    x = torch.randn(ROWS, TOKENS, HEADS, WIDTH)
    arguments = {"q": x, "k": x.clone(), "v": x.clone(), "page": torch.tensor([[-1], [0]])}
    return kernels.shared_attention(**(arguments | changes))


def _pool(dtype=torch.float32, pages=2):
    return torch.randn(pages, 5, HEADS, WIDTH).to(dtype)


SHARED = {
    "keys of another type": (lambda: _shared(k=_pool()[:, :1].expand(2, 6, 2, 32).double()), "k must be torch.float32"),
    "integers": (lambda: _shared(q=torch.ones(ROWS, TOKENS, HEADS, WIDTH).long()), "q must be .*, not torch.int64"),
    "three dimensions": (lambda: _shared(q=torch.randn(2, 6, 64)), r"q must have shape \[rows, tokens, heads, d\]"),
    "other token counts": (lambda: _shared(v=torch.randn(2, 7, 2, 32)), r"v must have shape \[rows=2, tokens=6"),
    "a page behind the last": (lambda: _shared(page=torch.tensor([[0], [2]])), r"page holds 2, .* lie in \[-1, 1\]"),
    "a page below -1": (lambda: _shared(page=torch.tensor([[0], [-2]])), r"page holds -2, .* lie in \[-1, 1\]"),
    "a page of a pool that is too small": (
        lambda: _shared(page=torch.tensor([[0], [4]]), pool_k=_pool(), pool_v=_pool()),
        r"page holds 4, .*\[-1, 3\]",
    ),
    "pages as 32-bit integers": (lambda: _shared(page=torch.tensor([[0], [1]]).int()), "page must be torch.int64"),
    "an unknown mode": (lambda: _shared(mode=torch.tensor([0, 3])), r"mode holds 3, .* lie in \[0, 2\]"),
    "a scale per row only": (lambda: _shared(scale=torch.ones(2)), r"scale must have shape \[rows=2, R=1\]"),
    "a shift in half precision": (lambda: _shared(shift=torch.zeros(2, 1).half()), "shift must be torch.float32"),
    "keys of a pool without values": (lambda: _shared(pool_k=_pool()), "pool_k and pool_v go together"),
    "a pool of another head size": (
        lambda: _shared(pool_k=torch.randn(1, 5, 2, 16), pool_v=torch.randn(1, 5, 2, 16)),
        "d=32",
    ),
    "a pool of another type": (lambda: _shared(pool_k=_pool(torch.half), pool_v=_pool(torch.half)), "pool_k must be"),
    "fp8 pages without scales": (
        lambda: _shared(pool_k=_pool(torch.float8_e4m3fn), pool_v=_pool(torch.float8_e4m3fn)),
        "pool_k_scale",
    ),
    "scales without fp8 pages": (
        lambda: _shared(pool_k=_pool(), pool_v=_pool(), pool_k_scale=torch.ones(2, 2, 32)),
        "only with those",
    ),
    "a bias that is too short": (lambda: _shared(bias=torch.zeros(2, 5)), "bias covers 5 tokens .* has 6"),
    "an affine of other rows": (
        lambda: _shared(affine=kernels.Affine(*torch.ones(2, 3, 1, 2, 32))),
        r"affine.gain must have shape",
    ),
    "a strided last dimension": (
        lambda: _shared(q=torch.randn(2, 6, 32, 2).transpose(2, 3)),
        "q must have stride 1 in its last dimension, not 2",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_attention_refuses(name):
    call, message = SHARED[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("part", ["values", "scale"])
def test_an_out_that_overlaps_an_input_is_refused(part):
    bytes = torch.zeros(2000, dtype=torch.uint8)
    values, scale, out = _stored(1, 2, 32), torch.ones(1, 32), bytes[512:768].view(torch.float32).view(1, 2, 32)
    if part == "values":
        values = bytes[760:824].view(torch.float8_e4m3fn).view(1, 2, 32)
    else:
        scale = bytes[388:516].view(torch.float32).view(1, 32)
    with pytest.raises(ValueError, match=f"out overlaps {part} in memory"):
        kernels.dequantise(values, scale, out)
    beside = bytes[768:832].view(torch.float8_e4m3fn).view(1, 2, 32)
    kernels.dequantise(beside, bytes[384:512].view(torch.float32).view(1, 32), out)


def _gated(**changes):
    text = torch.randn(1, 7, HEADS, WIDTH)
    image = torch.randn(2, 4, HEADS, WIDTH)
    arguments = {
        "q": torch.randn(ROWS, TOKENS, HEADS, WIDTH),
        "text_k": text,
        "text_v": text,
        "text_page": torch.tensor([0, 0]),
        "image_k": image,
        "image_v": image,
        "image_lengths": torch.tensor([4, 2]),
        "image_page": torch.tensor([[0], [1]]),
        "strength": torch.ones(2, 1),
        "group": torch.zeros(2, 1).long(),
    }
    return kernels.gated_cross_attention(**(arguments | changes))


GATED = {
    "a text page behind the last": (lambda: _gated(text_page=torch.tensor([0, 1])), r"text_page holds 1, .*\[0, 0\]"),
    "an image page behind the last": (lambda: _gated(image_page=torch.tensor([[0], [2]])), "image_page holds 2"),
    "a length beyond the padding": (lambda: _gated(image_lengths=torch.tensor([5, 2])), r"holds 5, .*\[1, 4\]"),
    "a length of 0": (lambda: _gated(image_lengths=torch.tensor([0, 2])), "image_lengths holds 0"),
    "a text longer than its page": (
        lambda: _gated(text_lengths=torch.tensor([8])),
        r"text_lengths holds 8, .*\[1, 7\]",
    ),
    "a text without tokens": (lambda: _gated(text_lengths=torch.tensor([0])), "text_lengths holds 0"),
    "a text length per row": (lambda: _gated(text_lengths=torch.tensor([7, 7])), "text_lengths must have shape"),
    "text lengths in fp32": (lambda: _gated(text_lengths=torch.ones(1)), "text_lengths must be torch.int64"),
    "a strength table of other segments": (lambda: _gated(strength=torch.ones(2, 2)), "strength must have shape"),
    "strengths left out": (lambda: _gated(strength=None), "image segments need all of .*; strength is missing"),
    "a mask behind the last": (
        lambda: _gated(masks=torch.ones(1, 6), mask_index=torch.ones(2, 1).long()),
        "mask_index holds 1",
    ),
    "masks of another token count": (
        lambda: _gated(masks=torch.ones(1, 5), mask_index=torch.zeros(2, 1).long()),
        "masks must have shape",
    ),
    "no text": (lambda: _gated(text_k=torch.ones(1, 0, 2, 32), text_v=torch.ones(1, 0, 2, 32)), "at least one page"),
    "masks without their index": (lambda: _gated(masks=torch.ones(1, 6)), "masks need mask_index"),
    "a mask as a number": (
        lambda: _gated(masks=torch.tensor(1.0), mask_index=torch.zeros(2, 1).long()),
        "masks must have shape",
    ),
    "half-precision text": (lambda: _gated(text_k=torch.randn(1, 7, 2, 32).half()), "text_k must be torch.float32"),
}


@pytest.mark.parametrize("name", GATED)
def test_gated_cross_attention_refuses(name):
    call, message = GATED[name]
    with pytest.raises(ValueError, match=message):
        call()


def _adain(mean=None, variance=None, page=0, strength=1.0, **pool):
    shape = (1, ROWS, HEADS, WIDTH)
    mean, variance = (torch.ones(shape) if x is None else x for x in (mean, variance))
    return kernels.adain_affine(mean, variance, torch.full((ROWS,), page), torch.full((ROWS, 1), strength), **pool)


def _statistics(mean=0.0, variance=1.0):
    shape = (1, 1, HEADS, WIDTH)
    return {"pool_mean": torch.full(shape, mean), "pool_variance": torch.full(shape, variance)}


def _stored(*shape):
    return torch.ones(shape).to(torch.float8_e4m3fn)


def _step(**changes):
    x = torch.randn(1, 4, 2, 2)
    arguments = {
        "latents": x,
        "anchor": x,
        "history": torch.randn(1, 2, 4, 2, 2),
        "predictions": torch.randn(2, 4, 2, 2),
        "branch_rows": torch.tensor([[0, -1, -1, 1]]),
        "branch_weights": torch.ones(1, 4),
        "rescale": torch.zeros(1),
        "denoised": torch.ones(1, 2),
        "update": torch.ones(1, 2, 6),
        "noise": x,
    }
    return kernels.guided_step(**(arguments | changes))


def _loras(x=(2, 5, 8), y=(2, 5, 4), down=(3, 1, 8, 16), up=(3, 16, 4), rest=(), **changes):
    arguments = {
        "x": x if isinstance(x, torch.Tensor) else torch.ones(x),
        "ys": [torch.ones(y)],
        "down": down if isinstance(down, torch.Tensor) else torch.ones(down),
        "up": up if isinstance(up, torch.Tensor) else torch.ones(up),
        "unit": torch.zeros(1, 2, 1).long(),
        "scale": torch.ones(2, 1),
    }
    x, ys, down, up, unit, scale = (arguments | changes).values()
    return kernels.row_lora(x, ys, kernels.LoraPool(down, up), kernels.LoraRows(unit, scale), *rest)


LORAS = {
    "x of two dimensions": (lambda: _loras(x=(5, 8)), r"x must have shape \[rows, tokens, channels\]"),
    "x as integers": (lambda: _loras(x=torch.ones(2, 5, 8).long()), "x must be"),
    "a pool of other channels": (lambda: _loras(down=(3, 1, 9, 16)), "down must have shape .*channels=8"),
    "units of rank 8": (lambda: _loras(down=(3, 1, 8, 8)), "rank=16"),
    "a 2 x 2 kernel": (
        lambda: _loras(x=(2, 8, 4, 4), down=(3, 4, 8, 16)),
        "down has 4 taps, but a convolution has 1 or 9",
    ),
    "a 3 x 3 kernel for tokens": (lambda: _loras(down=(3, 9, 8, 16)), "down has 9 taps, but a linear layer has 1"),
    "pools of other sizes": (lambda: _loras(up=(2, 16, 4)), "up must have shape .*units=3"),
    "a pool in half precision": (lambda: _loras(up=torch.ones(3, 16, 4).half()), "up must be torch.float32"),
    "a pool with gaps": (lambda: _loras(down=torch.ones(3, 1, 8, 32)[..., ::2]), "down must be contiguous"),
    "a stride of 3": (lambda: _loras(rest=(3,)), "stride is 3; it must be a whole number from 1 to 2"),
    "a padding of 2": (lambda: _loras(rest=(1, 2)), "padding is 2"),
    "a padding of tokens": (lambda: _loras(rest=(1, 1)), "belong to convolutions"),
    "a tensor as ys": (lambda: _loras(ys=torch.ones(1, 2, 5, 4)), "ys is .* must be a list of at most 3"),
    "four parts": (lambda: _loras(ys=[torch.ones(2, 5, 4)] * 4), "at most 3 tensors"),
    "y of other channels": (lambda: _loras(y=(2, 5, 5)), r"ys\[0\] must have shape .*out=4"),
    "y of a convolution with another stride": (
        lambda: _loras(x=(2, 8, 6, 6), y=(2, 4, 6, 6), down=(3, 9, 8, 16), rest=(2, 1)),
        r"ys\[0\] must have shape \[rows=2, out=4, h=3, w=3\]",
    ),
    "y in half precision": (lambda: _loras(ys=[torch.ones(2, 5, 4).half()]), r"ys\[0\] must be torch.float32"),
    "strided channels": (
        lambda: _loras(x=torch.ones(2, 8, 5).transpose(1, 2)),
        "x must have stride 1 in its last dimension, not 5",
    ),
    "units of other parts": (lambda: _loras(unit=torch.zeros(2, 2, 1).long()), "unit must have shape .*parts=1"),
    "units as 32-bit integers": (lambda: _loras(unit=torch.zeros(1, 2, 1).int()), "unit must be torch.int64"),
    "scales of other units": (lambda: _loras(scale=torch.ones(2, 2)), "scale must have shape .*N=1"),
    "scales in half precision": (lambda: _loras(scale=torch.ones(2, 1).half()), "scale must be torch.float32"),
    "a unit behind the last": (lambda: _loras(unit=torch.full((1, 2, 1), 3)), r"unit holds 3, .* lie in \[-1, 2\]"),
    "a unit below -1": (lambda: _loras(unit=torch.full((1, 2, 1), -2)), "unit holds -2"),
}


@pytest.mark.parametrize("name", LORAS)
def test_row_lora_refuses(name):
    call, message = LORAS[name]
    with pytest.raises(ValueError, match=message):
        call()


OTHERS = {
    "a negative AdaIN strength": (lambda: _adain(strength=-0.1), r"strength holds -0.1.*, but must lie in \[0, 1\]"),
    "an AdaIN strength above 1": (lambda: _adain(strength=1.5), "strength holds 1.5"),
    "an AdaIN strength that is not a number": (lambda: _adain(strength=math.nan), "strength holds nan"),
    "an AdaIN page behind the last": (lambda: _adain(page=2), "page holds 2"),
    "pool statistics that are not a number": (lambda: _adain(page=2, **_statistics(math.nan)), "pool_mean holds nan"),
    "an infinite pool variance": (lambda: _adain(page=2, **_statistics(0.0, math.inf)), "pool_variance holds inf"),
    "a negative pool variance": (lambda: _adain(page=2, **_statistics(0.0, -1.0)), "pool_variance holds -1.0"),
    "own statistics that are not a number": (
        lambda: _adain(mean=torch.full((1, ROWS, HEADS, WIDTH), math.nan)),
        "mean holds nan",
    ),
    "a negative own variance": (
        lambda: _adain(variance=torch.full((1, ROWS, HEADS, WIDTH), -2.0)),
        "variance holds -2.0",
    ),
    "parameters of another half precision": (
        lambda: kernels.layer_norm(torch.ones(2, 8).half(), torch.ones(8).bfloat16(), torch.ones(8).bfloat16()),
        "weight must be torch.float16 or torch.float32, not torch.bfloat16",
    ),
    "a group norm's pages as a number": (
        lambda: kernels.group_norm_silu(
            torch.ones(1, 8, 2, 2), 4, torch.ones(8), torch.ones(8), 1e-5, True, torch.tensor(0)
        ),
        "page must have shape",
    ),
    "branch rows as floats": (lambda: _step(branch_rows=torch.zeros(1, 4)), "branch_rows must be torch.int64"),
    "a branch row behind the last": (
        lambda: _step(branch_rows=torch.full((1, 4), 2)),
        r"branch_rows holds 2, .* lie in \[-1, 1\]",
    ),
    "a rescale above 1": (lambda: _step(rescale=torch.full((1,), 9.0)), "rescale holds 9.0"),
    "latents as integers": (lambda: _step(latents=torch.ones(1, 4, 2, 2).long()), "latents must be"),
    "statistics of no tokens": (lambda: kernels.token_stats(torch.ones(1, 0, 2, 4)), "at least 1 token"),
    "statistics of four tensors": (lambda: kernels.token_stats(*[torch.ones(1, 2, 2, 4)] * 4), "1 to 3 tensors, not 4"),
    "stored values that are no fp8": (
        lambda: kernels.dequantise(torch.ones(1, 2, 3), torch.ones(1, 3)),
        "values must be torch.float8_e4m3fn, not",
    ),
    "a scale of other channels": (
        lambda: kernels.dequantise(_stored(1, 2, 3), torch.ones(1, 4)),
        r"scale must have shape \[groups=1, chann",
    ),
    "a place of another shape": (
        lambda: kernels.dequantise(_stored(1, 2, 3), torch.ones(1, 3), torch.empty(2, 2, 3)),
        "out must have shape",
    ),
    "a place with gaps": (
        lambda: kernels.dequantise(_stored(1, 2, 3), torch.ones(1, 3), torch.empty(1, 2, 6)[..., ::2]),
        "out must be contiguous",
    ),
    "an odd geglu": (lambda: kernels.geglu(torch.ones(2, 5)), r"splits .* in two, but x has shape \[2, 5\]"),
    "a norm of other channels": (
        lambda: kernels.layer_norm(torch.ones(2, 8), torch.ones(7), torch.ones(8)),
        r"weight must have shape \[channels=8\]",
    ),
    "a layer norm without eps": (
        lambda: kernels.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8), 0.0),
        "eps must be above 0, not 0.0",
    ),
    "a residual of another shape": (
        lambda: kernels.add_layer_norm(torch.ones(2, 8), torch.ones(1, 8), torch.ones(8), torch.ones(8)),
        "residual",
    ),
    "groups that do not divide the channels": (
        lambda: kernels.group_norm_silu(torch.ones(1, 8, 2, 2), 3, torch.ones(8), torch.ones(8), 1e-5, True),
        "8 channels can't be split into 3 groups",
    ),
    "a pool without its element count": (
        lambda: kernels.group_norm_silu(
            torch.ones(1, 8, 2, 2),
            4,
            torch.ones(8),
            torch.ones(8),
            1e-5,
            True,
            torch.tensor([1]),
            torch.ones(1, 4),
            torch.ones(1, 4),
        ),
        "pool_elements must say",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_operations_refuse(name):
    call, message = OTHERS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_constant_channel_gives_finite_results():
    q, k, v = (torch.full((2, TOKENS, HEADS, WIDTH), value) for value in (1.0, 2.0, 3.0))
    q[0] = torch.randn(TOKENS, HEADS, WIDTH)
    mean, variance = kernels.token_stats(q, k, v)
    assert variance[1:].eq(0).all()
    affine = kernels.adain_affine(mean, variance, torch.tensor([-1, 0]), torch.ones(2, 3))
    assert affine.gain.isfinite().all() and affine.offset.isfinite().all()
    assert kernels.shared_attention(q, k, v, torch.tensor([[-1], [0]]), affine=affine).isfinite().all()


def test_a_step_without_any_branch_takes_no_predictions():
    none = {"predictions": torch.empty(0, 4, 2, 2), "branch_rows": torch.full((1, 4), -1)}
    assert all(x.isfinite().all() for x in _step(**none))


def test_masks_that_hold_none_confine_nothing():
    everywhere = _gated(masks=torch.empty(0, 0), mask_index=torch.full((2, 1), -1))
    assert everywhere.shape == (ROWS, TOKENS, HEADS, WIDTH)


def test_rows_that_overflowed_can_be_let_through():
    mean, variance = torch.full((2, 1, ROWS, HEADS, WIDTH), math.nan)
    page, strength = torch.zeros(ROWS).long(), torch.ones(ROWS, 1)
    assert kernels.adain_affine(mean, variance, page, strength, check_finite=False).gain.isnan().all()


def test_statistics_that_a_row_does_not_use_may_hold_anything():
    mean, variance = torch.full((2, 1, ROWS, HEADS, WIDTH), math.nan)
    for page, strength in ((-1, 1.0), (0, 0.0)):
        affine = _adain(mean, variance, page, strength)
        assert affine.gain.eq(1).all() and affine.offset.eq(0).all()


@pytest.mark.parametrize("rows, tokens", [(0, 5), (2, 0)], ids=["no rows", "no tokens"])
def test_nothing_in_gives_nothing_out(rows, tokens):
    x = torch.randn(rows, tokens, 2, 32)
    assert kernels.shared_attention(x, x, x).shape == x.shape
    text = torch.randn(1, 7, 2, 32)
    assert kernels.gated_cross_attention(x, text, text, torch.zeros(rows).long()).shape == x.shape
    assert kernels.geglu(x).shape == (rows, tokens, 2, 16)
    assert kernels.layer_norm(x, torch.ones(32), torch.ones(32)).shape == x.shape
