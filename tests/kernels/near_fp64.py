"""What the tests against double precision share: drawn layouts full of NaN, and the bound on errors.

An error may be twice that of the formula composed of PyTorch's own calls in the same type, plus a few units in the last
place.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from hypothesis import strategies as st

from stylefast._extension import extension, extension_error
from stylefast.kernels.shared_attention import FP8

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
NEEDS_EXTENSION = pytest.mark.skipif(switched_off, reason=extension_error() or "built")
FORMS = ["torch", pytest.param("cpp", marks=NEEDS_EXTENSION)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (32, 40, 64, 80, 128)
LAYOUTS = ("contiguous", "fused", "transposed", "padded", "spread")
HIDDEN = -math.inf

examples = settings(max_examples=40)
many_examples = settings(max_examples=500)
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(FLOATS)
layouts = st.sampled_from(LAYOUTS)
row_counts = st.sampled_from([3, 2, 4, 1, 3, 2, 4, 0])
mostly = st.sampled_from([True, True, True, False])
token_counts = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 95, 96, 97, 127, 129, 193, 200]))


def forms() -> list[str]:
    """The forms that run here. A drawn case costs more than the calls that it tests, so both forms share it."""
    return ["torch"] if switched_off or os.environ.get("STYLEFAST_CPU") == "none" else ["torch", "cpp"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(random, *shape):
    return torch.randn(*shape, generator=random)


def laid_out(x, layout):
    """x [rows, tokens, heads, d] as a view whose gaps hold NaN."""
    rows, tokens, heads, width = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "fused":
        view = x.new_full((rows, tokens, 3, heads, width), math.nan)[:, :, 1]
    elif layout == "transposed":
        view = x.new_full((rows, heads, tokens, width), math.nan).transpose(1, 2)
    elif layout == "padded":
        view = x.new_full((rows, tokens + 2, heads + 1, width + 8), math.nan)[:, 1:-1, 1:, 3 : width + 3]
    else:
        view = x.new_full((2 * rows, 3 * tokens, heads, width), math.nan)[1::2, 2::3]
    return view.copy_(x)


def table(x, spread):
    """x [a, b] as it is, or with strides that are not its own."""
    return x.t().contiguous().t() if spread else x


def rms(x):
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def assert_as_near_as_pytorch(found, composed, exact, logits=0.0, ulps=4, size=None):
    """Errors against `exact` stay below twice those of `composed`, give or take `ulps` of numbers of this size.

    logits: the largest magnitude that fp32 had to hold beside the logits, such as a shift. size: by default that of the
    largest exact number.
    """
    assert found.shape == exact.shape and found.dtype == composed.dtype
    assert not found.isnan().any(), "a NaN came through"
    if size is None:
        size = float(exact.abs().max()) if exact.numel() else 0.0
    units = ulps * torch.finfo(found.dtype).eps + 8 * torch.finfo(torch.float32).eps * logits
    error, allowed = rms(found.double() - exact), rms(composed.double() - exact)
    assert error <= 2 * allowed + 0.25 * units * size, f"rms error {error:.3g}, PyTorch's own {allowed:.3g}"
    worst, worst_allowed = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (found, composed))
    assert worst <= 2 * worst_allowed + units * size, f"largest error {worst:.3g}, PyTorch's own {worst_allowed:.3g}"


def doubled(arguments):
    """Queries, keys and values in double precision; tables, scales and fp8 pages as they are."""
    names = {"q", "k", "v", "pool_k", "pool_v", "text_k", "text_v", "image_k", "image_v"}
    return {
        name: x.double() if name in names and isinstance(x, torch.Tensor) and x.dtype != FP8 else x
        for name, x in arguments.items()
    }


def attend(q, k, v, mask=None):
    """PyTorch's attention over [tokens, heads, d], with a mask of one number a key."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None if mask is None else mask.expand(q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
