"""Gated cross-attention over text and up to S image segments, each with its own softmax and strength.

    out = softmax(Q K_text^T / sqrt(d)) V_text + sum_s strength_s * mask_s * softmax(Q K_s^T / sqrt(d)) V_s

(IP-Adapter, arXiv 2308.06721, equation 5; InstantStyle, arXiv 2404.02733, sets the strength per attention module.)
Segments of a row with the same group number share one softmax; each keeps its own strength and mask. A segment of
strength 0 is skipped: it costs nothing, and NaN in its keys or values has no effect. Nor has NaN in the tokens of a
page beyond its length.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension
from stylefast.kernels.shared_attention import refuse_head_size
from stylefast.kernels.shared_attention_torch import attend


class ImageSegments(NamedTuple):
    """Image keys and values, and what each row's S segments read of them; see `gated_cross_attention`."""

    k: torch.Tensor  # [image pages, image tokens, heads, d], padded
    v: torch.Tensor
    lengths: torch.Tensor  # [image pages] int64: tokens in use
    page: torch.Tensor  # [rows, S] int64; -1: none
    strength: torch.Tensor  # [rows, S] fp32
    group: torch.Tensor  # [rows, S] int64
    masks: torch.Tensor | None = None  # [masks, tokens] fp32
    mask_index: torch.Tensor | None = None  # [rows, S] int64; -1: everywhere


def gated_cross_attention_ref(
    q: torch.Tensor,  # [rows, tokens, heads, d]
    text_k: torch.Tensor,  # [text pages, text tokens, heads, d]
    text_v: torch.Tensor,
    text_page: torch.Tensor,  # [rows] int64
    text_lengths: torch.Tensor | None = None,  # [text pages] int64: tokens in use; None: all
    image_k: torch.Tensor | None = None,  # [image pages, image tokens, heads, d], padded
    image_v: torch.Tensor | None = None,
    image_lengths: torch.Tensor | None = None,  # [image pages] int64: tokens in use
    image_page: torch.Tensor | None = None,  # [rows, S] int64; -1: none
    strength: torch.Tensor | None = None,  # [rows, S] fp32
    group: torch.Tensor | None = None,  # [rows, S] int64
    masks: torch.Tensor | None = None,  # [masks, tokens] fp32
    mask_index: torch.Tensor | None = None,  # [rows, S] int64; -1: everywhere
) -> torch.Tensor:
    """Evaluate the formula above row by row, in fp32 or, for fp64 input, in fp64. Returns [rows, tokens, heads, d]."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    images = None
    if image_page is not None:
        images = ImageSegments._make((image_k, image_v, image_lengths, image_page, strength, group, masks, mask_index))
    for row in range(q.shape[0]):
        query = q[row].to(exact)
        page = int(text_page[row])
        length = text_k.shape[1] if text_lengths is None else int(text_lengths[page])
        total = _weighted(query, text_k[page, :length].to(exact), text_v[page, :length].to(exact))
        for part in _image_parts_ref(query, row, images) if images is not None else ():
            total = total + part
        out[row] = total.to(q.dtype)
    return out


def _image_parts_ref(query: torch.Tensor, row: int, images: ImageSegments) -> Iterator[torch.Tensor]:
    """Yield what each group of a row's segments adds, [tokens, heads, d]."""
    exact = query.dtype
    segments = range(images.page.shape[1])
    active = [s for s in segments if int(images.page[row, s]) >= 0 and float(images.strength[row, s]) != 0.0]
    for number in dict.fromkeys(int(images.group[row, s]) for s in active):
        keys, values, gates = [], [], []
        for s in active:
            if int(images.group[row, s]) != number:
                continue
            page = int(images.page[row, s])
            length = int(images.lengths[page])
            keys.append(images.k[page, :length].to(exact))
            values.append(images.v[page, :length].to(exact))
            gate = images.strength[row, s].to(exact).expand(query.shape[0])
            if images.masks is not None and images.mask_index is not None and int(images.mask_index[row, s]) >= 0:
                gate = gate * images.masks[int(images.mask_index[row, s])].to(exact)
            gates.append(gate[:, None].expand(-1, length))  # [tokens, keys of the segment]
        yield _weighted(query, torch.cat(keys), torch.cat(values), torch.cat(gates, 1))


def gated_cross_attention(
    q: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    text_page: torch.Tensor,
    text_lengths: torch.Tensor | None = None,
    image_k: torch.Tensor | None = None,
    image_v: torch.Tensor | None = None,
    image_lengths: torch.Tensor | None = None,
    image_page: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute gated cross-attention in one kernel, the custom op `torch.ops.stylefast.gated_cross_attention`.

    q [rows, tokens, heads, d]; text_k, text_v [text pages, text tokens, heads, d]; text_page [rows] int64;
    text_lengths [text pages] int64: the tokens in use of pages of unequal length, all if None. For images, give all or
    none of: image_k, image_v [image pages, image tokens, heads, d], image_lengths [image pages] int64 (tokens in use),
    image_page [rows, S] int64 (-1: none), strength [rows, S] fp32, group [rows, S] int64; masks
    [masks, tokens] fp32 with mask_index [rows, S] int64 (-1: everywhere) confine segments. A negative strength
    subtracts. Returns [rows, tokens, heads, d], contiguous.

    Raises InvalidRequest, a ValueError, for shapes, types and devices that don't fit, and on CPUs, or under
    STYLEFAST_CHECKS=1, for a page, length or mask out of range.
    """
    if masks is not None and masks.ndim and masks.shape[0] == 0:
        masks = None
    segments = {
        "image_k": image_k,
        "image_v": image_v,
        "image_lengths": image_lengths,
        "image_page": image_page,
        "strength": strength,
        "group": group,
    }
    missing = [name for name, x in segments.items() if x is None]
    if missing and len(missing) < len(segments):
        raise InvalidRequest(f"image segments need all of {', '.join(segments)}; {', '.join(missing)} is missing")
    if missing and masks is not None:
        raise InvalidRequest("masks confine image segments, but no image_k is given")
    images = None if missing else ImageSegments._make((*segments.values(), masks, mask_index))
    _check(q, text_k, text_v, text_page, text_lengths, images)
    return operation.call(q, text_k, text_v, text_page, text_lengths, images)


def _check(q, text_k, text_v, text_page, text_lengths, images: ImageSegments | None):
    checks.shape("q", q, rows=-1, tokens=-1, heads=-1, d=-1)
    rows, _, heads, width = q.shape
    checks.floating("q", q)
    checks.shape("text_k", text_k, pages=-1, tokens=-1, heads=heads, d=width)
    if 0 in text_k.shape[:2] and q.numel():
        raise InvalidRequest(f"text_k needs at least one page of one token, but has shape {list(text_k.shape)}")
    checks.shape("text_v", text_v, pages=text_k.shape[0], tokens=text_k.shape[1], heads=heads, d=width)
    checks.shape("text_page", text_page, rows=rows)
    checks.dtype("text_page", text_page, torch.int64)
    if text_lengths is not None:
        checks.shape("text_lengths", text_lengths, pages=text_k.shape[0])
        checks.dtype("text_lengths", text_lengths, torch.int64)
    keys = {"text_k": text_k, "text_v": text_v}
    if images is not None:
        _check_segments(q, images)
        keys |= {"image_k": images.k, "image_v": images.v}
    for name, x in keys.items():
        checks.dtype(name, x, q.dtype)
    checks.dense_channels(q=q, **keys)
    tables = {"text_page": text_page, "text_lengths": text_lengths}
    checks.together("q", q=q, **tables, **keys, **(images._asdict() if images is not None else {}))


def _check_segments(q, images: ImageSegments):
    rows, tokens, heads, width = q.shape
    checks.shape("image_k", images.k, pages=-1, tokens=-1, heads=heads, d=width)
    pages, image_tokens = images.k.shape[:2]
    checks.shape("image_v", images.v, pages=pages, tokens=image_tokens, heads=heads, d=width)
    checks.shape("image_lengths", images.lengths, pages=pages)
    checks.dtype("image_lengths", images.lengths, torch.int64)
    checks.shape("image_page", images.page, rows=rows, S=-1)
    checks.dtype("image_page", images.page, torch.int64)
    tables = {"strength": (images.strength, torch.float32), "group": (images.group, torch.int64)}
    if images.mask_index is not None:
        tables["mask_index"] = (images.mask_index, torch.int64)
    for name, (x, dtype) in tables.items():
        checks.shape(name, x, rows=rows, S=images.page.shape[1])
        checks.dtype(name, x, dtype)
    if images.masks is not None:
        checks.shape("masks", images.masks, masks=-1, tokens=tokens)
        checks.dtype("masks", images.masks, torch.float32)
        if images.mask_index is None:
            raise InvalidRequest("masks need mask_index [rows, S], which says what segment each confines")


def _check_values(q, text_k, text_v, text_page, text_lengths, images: ImageSegments | None):
    checks.integers_within("text_page", text_page, 0, text_k.shape[0], "text pages")
    if text_lengths is not None:
        checks.integers_within("text_lengths", text_lengths, 1, text_k.shape[1] + 1, "token counts of text pages")
    if images is None:
        return
    pages, tokens = images.k.shape[:2]
    checks.integers_within("image_page", images.page, -1, pages, "image pages (-1: none)")
    checks.integers_within("image_lengths", images.lengths, 1, tokens + 1, "token counts of image pages")
    if images.mask_index is not None:
        count = images.masks.shape[0] if images.masks is not None else 0
        checks.integers_within("mask_index", images.mask_index, -1, count, "masks (-1: everywhere)")


def _outputs(q, *others):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _torch(q, text_k, text_v, text_page, text_lengths, images: ImageSegments | None):
    """Compute with PyTorch's attention kernels, one call per combination of segments.

    Synchronises with the device if there are any.
    """
    out = _attend_text(q, text_k, text_v, text_page, text_lengths).contiguous()
    if images is None or images.page.shape[1] == 0 or q.numel() == 0:
        return out

    pages, strengths, groups = images.page.tolist(), images.strength.tolist(), images.group.tolist()
    # (segments that share a softmax, their token counts) -> rows
    calls: dict[tuple, list[int]] = {}
    lengths = images.lengths.tolist()
    for row, row_pages in enumerate(pages):
        active = [s for s, p in enumerate(row_pages) if p >= 0 and strengths[row][s] != 0.0]
        for number in dict.fromkeys(groups[row][s] for s in active):
            members = tuple((s, lengths[row_pages[s]]) for s in active if groups[row][s] == number)
            calls.setdefault(members, []).append(row)

    for members, rows in calls.items():
        index = torch.tensor(rows, device=q.device)
        query = q[index]
        gathered = [(images.k[images.page[index, s], :n], images.v[images.page[index, s], :n]) for s, n in members]
        gates = [_gate(images, index, s, q) for s, _ in members]  # [rows, tokens or 1, 1, 1]
        if len(members) == 1:
            keys, values = gathered[0]
            part = gates[0] * attend(query, keys, values)
        else:
            keys = torch.cat([k for k, _ in gathered], 1)
            exact = torch.promote_types(q.dtype, torch.float32)
            logits = torch.einsum("rqhd,rkhd->rhqk", query.to(exact), keys.to(exact)) / math.sqrt(q.shape[-1])
            weights = torch.softmax(logits, -1).to(q.dtype).split([n for _, n in members], -1)
            parts = (
                gate * torch.einsum("rhqk,rkhd->rqhd", weight, values)
                for gate, weight, (_, values) in zip(gates, weights, gathered, strict=True)
            )
            part = sum(parts, torch.zeros_like(query))
        out = out.index_add(0, index, part)
    return out


def _traceable(q, text_k, text_v, text_page, text_lengths, images: ImageSegments | None):
    """Compute without reading tensors on the host: every row carries every segment, masked out where unused."""
    out = _attend_text(q, text_k, text_v, text_page, text_lengths)
    if images is None or images.page.shape[1] == 0 or images.k.shape[0] == 0:
        return out.contiguous()
    exact = torch.promote_types(q.dtype, torch.float32)
    active = (images.page >= 0) & (images.strength != 0)  # [rows, S]
    page, group = images.page.clamp(min=0), images.group
    token = torch.arange(images.k.shape[1], device=q.device)
    there = active[:, :, None] & (token < images.lengths[page][:, :, None])  # [rows, S, image tokens]
    # zeros where masked: 0 * NaN would be NaN
    keys, values = (torch.where(there[..., None, None], x[page], 0).to(exact) for x in (images.k, images.v))
    logits = torch.einsum("rqhd,rskhd->rhqsk", q.to(exact), keys) / math.sqrt(q.shape[-1])
    total = out.to(exact)
    everywhere = torch.arange(q.shape[0], device=q.device)
    for s in range(page.shape[1]):
        members = there & (group == group[:, s, None])[:, :, None]
        # for an inactive segment nothing is masked, which avoids the NaN of a fully masked softmax
        seen = members | ~active[:, s, None, None]
        weights = torch.softmax(logits.masked_fill(~seen[:, None, None], -math.inf).flatten(3), -1)
        weights = weights.unflatten(3, logits.shape[3:])[:, :, :, s]  # [rows, heads, tokens, image tokens]
        part = torch.einsum("rhqk,rkhd->rqhd", weights, values[:, s])
        gate = _gate(images, everywhere, s, q)
        total = total + torch.where(active[:, s, None, None, None], gate * part, 0)
    return total.to(q.dtype).contiguous()


def _attend_text(q, text_k, text_v, text_page, text_lengths):
    keys, values, mask = text_k[text_page], text_v[text_page], None
    if text_lengths is not None:
        token = torch.arange(keys.shape[1], device=q.device)
        there = token < text_lengths[text_page][:, None]  # [rows, text tokens]
        keys, values = (torch.where(there[:, :, None, None], x, 0) for x in (keys, values))  # 0 * NaN would be NaN
        mask = there[:, None, None, :]
    return attend(q, keys, values, mask)


def _gate(images: ImageSegments, index, segment, q):
    gate, masks = images.strength[index, segment, None].to(q.dtype), images.masks  # [rows, 1]
    if images.mask_index is not None and masks is not None and masks.numel():
        chosen = images.mask_index[index, segment]
        everywhere = torch.ones_like(masks[:1]).expand(len(index), -1)
        picked = torch.where((chosen >= 0)[:, None], masks[chosen.clamp(min=0)], everywhere)
        gate = gate * picked.to(q.dtype)
    return gate[:, :, None, None]


def _weighted(query, keys, values, gates=None):
    """Return softmax(query keys^T / sqrt(d)) * gates @ values for one row: [tokens, heads, d]."""
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1]), -1)
    return torch.einsum("hqk,khd->qhd", weights if gates is None else weights * gates, values)


def _cpp(*arguments) -> None:
    *inputs, out = arguments
    require_extension().gated_cross_attention(*operation.flat(inputs), out)


operation = Operation(
    "gated_cross_attention",
    "(Tensor q, Tensor text_k, Tensor text_v, Tensor text_page, Tensor? text_lengths, Tensor? image_k, "
    "Tensor? image_v, Tensor? image_lengths, Tensor? image_page, Tensor? strength, Tensor? group, Tensor? masks, "
    "Tensor? mask_index) -> Tensor",
    groups=(ImageSegments,),
    outputs=_outputs,
    forms={"triton": "gated_cross_attention", "cpp": _cpp, "torch": _torch},
    refuse=refuse_head_size,
    values=_check_values,
    traceable=_traceable,
)
