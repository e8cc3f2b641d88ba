"""The attention operations, in every form, against their formulas in double precision, on drawn inputs.

What a call must not read holds NaN.
"""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from stylefast import kernels
from stylefast.kernels import registry
from stylefast.kernels.gated_cross_attention import gated_cross_attention_ref
from stylefast.kernels.shared_attention import CONCAT, FP8, PLAIN, SWAP, shared_attention_ref
from tests.kernels.near_fp64 import (
    HEAD_SIZES,
    HIDDEN,
    LAYOUTS,
    assert_as_near_as_pytorch,
    attend,
    doubled,
    dtypes,
    forms,
    generator,
    laid_out,
    layouts,
    many_examples,
    mostly,
    normal,
    row_counts,
    seeds,
    table,
    token_counts,
)


def in_every_form(name, case, layout):
    """The operation's result by every form that runs here, each in memory laid out like this."""
    for form in forms():
        with registry.using(form, name):
            yield getattr(kernels, name)(**case)


# shared attention


@st.composite
def shared_cases(draw):
    """Arguments of shared_attention, with NaN in all that it must not read."""
    random = generator(draw(seeds))
    rows, tokens, heads = draw(row_counts), draw(token_counts), draw(st.integers(1, 3))
    width, dtype, references = draw(st.sampled_from(HEAD_SIZES)), draw(dtypes), draw(st.sampled_from([2, 1, 3, 0]))
    pages, page_tokens = draw(st.sampled_from([2, 3, 1, 0])), draw(token_counts)
    fp8, with_bias, parts = pages > 0 and draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([3, 2, 0]))
    extreme = draw(st.booleans())

    mode = [draw(st.sampled_from([PLAIN, CONCAT, SWAP])) for _ in range(rows)]
    page = [[draw(st.integers(-1, rows + pages - 1)) for _ in range(references)] for _ in range(rows)]
    scales = [1.0, 0.0, -0.7, 0.5, 3.0, *([40.0] if extreme else [])]
    shifts = [0.0, HIDDEN, -0.5, 1.25, *([-2000.3, -60.1, 90.7, 1000.4] if extreme else [])]
    scale = torch.tensor([[draw(st.sampled_from(scales)) for _ in row] for row in page]).reshape(rows, references)
    shift = torch.tensor([[draw(st.sampled_from(shifts)) for _ in row] for row in page]).reshape(rows, references)

    q, k, v = (normal(random, rows, tokens, heads, width).to(dtype) for _ in range(3))
    pool = [normal(random, pages, page_tokens, heads, width).to(FP8 if fp8 else dtype) for _ in range(2)]
    pool_scale = [torch.rand(pages, heads, width, generator=random) + 0.5 for _ in range(2)]
    bias = normal(random, rows + pages, max(tokens, page_tokens) + draw(st.integers(0, 3)))
    bias[torch.rand(bias.shape, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = HIDDEN
    gain = normal(random, max(parts, 1), rows, heads, width) * 0.3 + 1
    offset = normal(random, max(parts, 1), rows, heads, width) * 0.3

    read, own = set(), set(range(rows))
    for row in range(rows):
        refers = mode[row] != PLAIN and any(p >= 0 for p in page[row])
        if not refers:
            gain[:, row] = offset[:, row] = math.nan
        elif mode[row] == SWAP:
            own.remove(row)
        for r, p in enumerate(page[row]):
            if p >= 0 and refers and shift[row, r] != HIDDEN:
                read.add(p)
            elif p < 0 or not refers:
                scale[row, r] = shift[row, r] = math.nan
            else:
                scale[row, r] = math.nan  # the shift is what hides it
    for x in (k, v):
        x[[row for row in range(rows) if row not in own | read]] = math.nan
    for i, p in enumerate(range(rows, rows + pages)):
        if p not in read:
            for x, s in zip(pool, pool_scale):
                x[i] = math.nan
                s[i] = math.nan
    for p in range(rows + pages):
        bias[p, (tokens if p < rows else page_tokens) if p in read else 0 :] = math.nan

    spread = draw(st.booleans())
    q, k, v = (laid_out(x, draw(layouts)) for x in (q, k, v))
    if rows > 1 and draw(st.booleans()):
        q = q[:1].expand(rows, -1, -1, -1)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "page": table(torch.tensor(page).reshape(rows, references).long(), spread),
        "mode": torch.tensor(mode).long().repeat_interleave(2)[::2],
        "scale": table(scale, spread),
        "shift": table(shift, spread),
    }
    if parts:
        arguments["affine"] = kernels.Affine(gain, offset.transpose(1, 2).contiguous().transpose(1, 2))
    if pages:
        layout = "contiguous" if fp8 else draw(layouts)
        arguments |= {"pool_k": laid_out(pool[0], layout), "pool_v": pool[1]}
    if fp8:
        arguments |= {"pool_k_scale": pool_scale[0], "pool_v_scale": pool_scale[1]}
    if with_bias:
        arguments["bias"] = bias
    arguments["out"] = draw(st.sampled_from(["new", *LAYOUTS]))
    return arguments


def composed_shared(
    q,
    k,
    v,
    page,
    mode,
    scale,
    shift,
    affine=None,
    pool_k=None,
    pool_v=None,
    bias=None,
    pool_k_scale=None,
    pool_v_scale=None,
):
    """What one writes without this operation: AdaIN, concatenation and PyTorch's attention, in the input's type."""
    rows, out = len(q), torch.zeros_like(q)
    for row in range(rows):
        used = [(r, p) for r, p in enumerate(page[row].tolist()) if p >= 0 and mode[row] != PLAIN]
        own = [q[row], k[row], v[row]]
        if used and affine is not None:
            for i, (gain, offset) in enumerate(zip(*affine, strict=True)):
                own[i] = own[i] * gain[row].to(q.dtype) + offset[row].to(q.dtype)
        keys, values, added = [], [], []
        if not used or mode[row] != SWAP:
            keys, values, added = [own[1]], [own[2]], [torch.zeros(len(own[1]))]
        for r, p in used:
            if shift[row, r] == HIDDEN:
                continue
            if p < rows:
                page_k, page_v = k[p], v[p]
            else:
                page_k, page_v = pool_k[p - rows], pool_v[p - rows]
                if pool_k_scale is not None:
                    page_k = (page_k.float() * pool_k_scale[p - rows]).to(q.dtype)
                    page_v = (page_v.float() * pool_v_scale[p - rows]).to(q.dtype)
            keys.append(page_k * scale[row, r].to(q.dtype))
            values.append(page_v)
            added.append(shift[row, r] + (bias[p, : len(page_k)] if bias is not None else torch.zeros(len(page_k))))
        if keys:
            mask = torch.cat(added)
            if not torch.isneginf(mask).all():
                out[row] = attend(own[0], torch.cat(keys), torch.cat(values), mask)
    return out


@many_examples
@given(case=shared_cases())
def test_shared_attention_is_as_near_to_the_formula_as_pytorch(case):
    layout = case.pop("out")
    exact, composed = shared_attention_ref(**doubled(case)), composed_shared(**case)
    shifts = case["shift"][case["shift"].isfinite()]
    scales = case["scale"][case["scale"].isfinite()]
    largest = max([1.0, *shifts.abs().flatten().tolist(), *(5 * scales.abs()).flatten().tolist()])
    for found in in_every_form("shared_attention", case, layout):
        assert_as_near_as_pytorch(found, composed, exact, largest)


# gated cross-attention


@st.composite
def gated_cases(draw):
    """Arguments of gated_cross_attention, with NaN in all that it must not read."""
    random = generator(draw(seeds))
    rows, tokens, heads = draw(row_counts), draw(token_counts), draw(st.integers(1, 3))
    width, dtype, segments = draw(st.sampled_from(HEAD_SIZES)), draw(dtypes), draw(st.sampled_from([2, 1, 3, 0]))
    text_pages, text_tokens = draw(st.integers(1, 3)), draw(st.one_of(st.just(77), token_counts))
    pages, image_tokens = draw(st.sampled_from([2, 3, 1, 0])), draw(st.one_of(st.sampled_from([4, 16]), token_counts))
    masks = draw(st.sampled_from([2, 1, 0]))

    text_page = [draw(st.integers(0, text_pages - 1)) for _ in range(rows)]
    q = normal(random, rows, tokens, heads, width).to(dtype)
    text = [normal(random, text_pages, text_tokens, heads, width).to(dtype) for _ in range(2)]
    for x in text:
        x[[p for p in range(text_pages) if p not in text_page]] = math.nan
    arguments = {"q": q, "text_k": text[0], "text_v": text[1]}
    if draw(mostly):
        image = [normal(random, pages, image_tokens, heads, width).to(dtype) for _ in range(2)]
        lengths = [draw(st.integers(1, image_tokens)) for _ in range(pages)]
        page = [[draw(st.integers(-1, pages - 1)) for _ in range(segments)] for _ in range(rows)]
        strengths = st.sampled_from([0.0, -0.0, 1.0, 0.6, -0.8, 2.5])
        strength = torch.tensor([[draw(strengths) for _ in row] for row in page]).reshape(rows, segments)
        mask = torch.rand(masks, tokens, generator=random)
        mask_index = [[draw(st.integers(-1, masks - 1)) for _ in row] for row in page]
        read = {
            p: mask_index[row][s]
            for row in range(rows)
            for s, p in enumerate(page[row])
            if p >= 0 and strength[row, s] != 0
        }
        seen_masks = {
            mask_index[row][s]
            for row in range(rows)
            for s, p in enumerate(page[row])
            if p >= 0 and strength[row, s] != 0
        }
        for x in image:
            for p in range(pages):
                x[p, lengths[p] if p in read else 0 :] = math.nan
        mask[[m for m in range(masks) if m not in seen_masks]] = math.nan
        page = torch.tensor(page).reshape(rows, segments)
        strength[page < 0] = math.nan
        spread = draw(st.booleans())
        arguments |= {
            "image_k": laid_out(image[0], draw(layouts)),
            "image_v": laid_out(image[1], draw(layouts)),
            "image_lengths": torch.tensor(lengths).long(),
            "image_page": table(page.long(), spread),
            "strength": table(strength, spread),
            "group": torch.tensor([[draw(st.integers(-5, -4)) for _ in row] for row in page]).reshape(rows, -1).long()
            if rows * segments
            else torch.zeros(rows, segments).long(),
        }
        if masks:
            arguments |= {
                "masks": torch.full((masks, 2 * tokens), math.nan)[:, ::2].copy_(mask),
                "mask_index": table(torch.tensor(mask_index).reshape(rows, segments).long(), spread),
            }
    for name in ("q", "text_k", "text_v"):
        arguments[name] = laid_out(arguments[name], draw(layouts))
    arguments["text_page"] = torch.tensor(text_page).long()
    arguments["out"] = draw(st.sampled_from(["new", *LAYOUTS]))
    return arguments


def composed_gated(
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
    """Attention to the text and to every group of images, added up in the input's type."""
    out = torch.zeros_like(q)
    for row, page in enumerate(text_page.tolist()):
        out[row] = attend(q[row], text_k[page], text_v[page])
        pages = image_page[row].tolist() if image_page is not None else []
        active = [s for s, p in enumerate(pages) if p >= 0 and strength[row, s] != 0]
        for number in {int(group[row, s]) for s in active}:
            members = [s for s in active if group[row, s] == number]
            lengths = [(pages[s], image_lengths[pages[s]]) for s in members]
            parts = [(image_k[p, :n], image_v[p, :n]) for p, n in lengths]
            keys = torch.cat([k for k, _ in parts])
            logits = torch.einsum("qhd,khd->hqk", q[row], keys) / math.sqrt(q.shape[-1])
            weights = torch.softmax(logits.float(), -1).to(q.dtype).split([len(k) for k, _ in parts], -1)
            for s, weight, (_, values) in zip(members, weights, parts):
                gate = strength[row, s].to(q.dtype).expand(q.shape[1])
                if mask_index is not None and mask_index[row, s] >= 0:
                    gate = gate * masks[mask_index[row, s]].to(q.dtype)
                out[row] += gate[:, None, None] * torch.einsum("hqk,khd->qhd", weight, values)
    return out


@many_examples
@given(case=gated_cases())
def test_gated_cross_attention_is_as_near_to_the_formula_as_pytorch(case):
    layout = case.pop("out")
    exact, composed = gated_cross_attention_ref(**doubled(case)), composed_gated(**case)
    # weights are rounded, so errors grow with the values that they average, however small the average comes out
    size = float(case["text_v"].nan_to_num().abs().max()) if case["text_v"].numel() else None
    for found in in_every_form("gated_cross_attention", case, layout):
        assert_as_near_as_pytorch(found, composed, exact, size=size)
