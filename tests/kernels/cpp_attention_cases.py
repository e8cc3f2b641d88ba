"""Cases and formulas in double precision for the C++ kernels of attention and statistics."""

import math

import torch

from stylefast._extension import extension

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (32, 40, 64, 80, 128)
# largest error that rounding explains here: values are of order 1
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
PLAIN, CONCAT, SWAP = 0, 1, 2
HIDDEN = -math.inf


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(found, expected, dtype=None):
    tolerance = TOLERANCE[dtype or found.dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def shared(q, k, v, page, mode, scale=None, shift=None, gain=None, offset=None, pool=(None,) * 4, bias=None, out=None):
    """The kernel's result; NaN wherever it wrote nothing."""
    page, mode = torch.as_tensor(page), torch.as_tensor(mode)
    scale = torch.ones(page.shape) if scale is None else scale
    shift = torch.zeros(page.shape) if shift is None else shift
    out = torch.full(q.shape, math.nan, dtype=q.dtype) if out is None else out
    extension().shared_attention(q, k, v, page, mode, scale, shift, bias, gain, offset, *pool, out)
    return out


def shared_formula(q, k, v, page, mode, scale=None, shift=None, gain=None, offset=None, pool=(None,) * 4, bias=None):
    """The same in double precision, one row at a time, all logits in memory."""
    rows = len(q)
    pool_k, pool_v, k_scale, v_scale = [x if x is None else x.double() for x in pool]
    if k_scale is not None:
        pool_k, pool_v = pool_k * k_scale[:, None], pool_v * v_scale[:, None]
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for row in range(rows):
        used = [(r, int(p)) for r, p in enumerate(torch.as_tensor(page)[row]) if p >= 0]
        used = [] if int(mode[row]) == PLAIN else used
        query, own_k, own_v = q[row], k[row], v[row]
        if used and gain is not None:
            query, own_k, own_v = (
                x * gain[i, row].double() + offset[i, row].double() for i, x in enumerate((query, own_k, own_v))
            )
        parts = [] if used and int(mode[row]) == SWAP else [(query_logits(query, own_k), own_v)]
        for r, p in used:
            added = 0.0 if shift is None else float(shift[row, r])
            if added == HIDDEN:
                continue
            page_k, page_v = (k[p], v[p]) if p < rows else (pool_k[p - rows], pool_v[p - rows])
            logits = query_logits(query, page_k) * (1.0 if scale is None else float(scale[row, r])) + added
            if bias is not None:
                logits = logits + bias[p, : len(page_k)].double()
            parts.append((logits, page_v))
        if parts:
            weights = torch.softmax(torch.cat([logits for logits, _ in parts], -1), -1).nan_to_num(0.0)
            out[row] = torch.einsum("hqk,khd->qhd", weights, torch.cat([values for _, values in parts]))
    return out


def query_logits(query, keys):
    return torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1])


def mixed_case(dtype, width, tokens, page_tokens=23, heads=2):
    """Five rows of all modes with live and pool pages, AdaIN and a bias."""
    q, k, v = (normal(5, tokens, heads, width, seed=i, dtype=dtype) for i in range(3))
    pool_k, pool_v = (normal(3, page_tokens, heads, width, seed=i, dtype=dtype) for i in (3, 4))
    page = torch.tensor([[-1, -1, -1], [0, 5, -1], [7, 7, 3], [2, 6, 5], [-1, 1, -1]])
    mode = torch.tensor([CONCAT, CONCAT, SWAP, PLAIN, CONCAT])
    return dict(
        q=q,
        k=k,
        v=v,
        page=page,
        mode=mode,
        scale=normal(5, 3, seed=5),
        shift=normal(5, 3, seed=6),
        gain=normal(3, 5, heads, width, seed=7) * 0.3 + 1,
        offset=normal(3, 5, heads, width, seed=8) * 0.3,
        pool=(pool_k, pool_v, None, None),
        bias=normal(8, max(tokens, page_tokens), seed=9),
    )


GATED = (
    "q",
    "text_k",
    "text_v",
    "text_page",
    "image_k",
    "image_v",
    "image_lengths",
    "image_page",
    "strength",
    "group",
    "masks",
    "mask_index",
)


def gated(**case):
    q = case["q"]
    out = torch.full(q.shape, math.nan, dtype=q.dtype)
    extension().gated_cross_attention(*(case.get(name) for name in GATED), out)
    return out


def gated_formula(
    q,
    text_k,
    text_v,
    text_page,
    image_k=None,
    image_v=None,
    image_lengths=None,
    image_page=None,
    strength=None,
    group=None,
    masks=None,
    mask_index=None,
):
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        query, page = q[row].double(), int(text_page[row])
        weights = torch.softmax(query_logits(query, text_k[page].double()), -1)
        out[row] = torch.einsum("hqk,khd->qhd", weights, text_v[page].double())
        segments = range(image_page.shape[1]) if image_page is not None else ()
        active = [s for s in segments if image_page[row, s] >= 0 and strength[row, s] != 0]
        for number in {int(group[row, s]) for s in active}:
            members = [(s, int(image_page[row, s])) for s in active if group[row, s] == number]
            keys = torch.cat([image_k[p, : image_lengths[p]].double() for _, p in members])
            weights = torch.softmax(query_logits(query, keys), -1)
            parts = weights.split([int(image_lengths[p]) for _, p in members], -1)
            for (s, p), part in zip(members, parts, strict=True):
                gate = strength[row, s].double().expand(q.shape[1])
                if mask_index is not None and mask_index[row, s] >= 0:
                    gate = gate * masks[mask_index[row, s]].double()
                values = torch.einsum("hqk,khd->qhd", part, image_v[p, : image_lengths[p]].double())
                out[row] += gate[:, None, None] * values
    return out


def gated_case(dtype, width=64, tokens=65, text_tokens=77, image_tokens=17, heads=2):
    """Four rows, up to three segments: alone, in one group, masked, negative, switched off."""
    text = [normal(2, text_tokens, heads, width, seed=i, dtype=dtype) for i in (1, 2)]
    image = [normal(4, image_tokens, heads, width, seed=i, dtype=dtype) for i in (3, 4)]
    lengths = torch.tensor([4, 16, 3, image_tokens]).clamp(max=image_tokens)
    for x in image:
        for page, length in enumerate(lengths):
            x[page, length:] = math.nan  # padding
    return dict(
        q=normal(4, tokens, heads, width, seed=0, dtype=dtype),
        text_k=text[0],
        text_v=text[1],
        text_page=torch.tensor([0, 1, 1, 0]),
        image_k=image[0],
        image_v=image[1],
        image_lengths=lengths,
        image_page=torch.tensor([[0, -1, -1], [1, 2, 3], [3, 0, 2], [2, 1, 1]]),
        strength=torch.tensor([[0.7, 5.0, 1.0], [1.0, -0.4, 0.3], [0.5, 0.0, 1.5], [0.0, 0.0, 0.0]]),
        group=torch.tensor([[0, 0, 0], [7, 2, 7], [1, 1, 1], [0, 1, 2]]),
        masks=normal(2, tokens, seed=5),
        mask_index=torch.tensor([[-1, 0, 0], [1, -1, 0], [0, 0, 1], [0, 0, 0]]),
    )


def statistics(*xs):
    mean, variance = (torch.full((len(xs), xs[0].shape[0], *xs[0].shape[2:]), math.nan) for _ in range(2))
    extension().token_stats(list(xs), mean, variance)
    return mean, variance
