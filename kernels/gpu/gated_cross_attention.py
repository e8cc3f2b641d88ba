"""Gated cross-attention in Triton: text and S image segments in one pass over the queries.

    out = softmax(Q K_text^T / sqrt(d)) V_text + sum_s strength_s * mask_s * softmax(Q K_s^T / sqrt(d)) V_s

If the segments are few and all keys fit into one tile of up to 128 columns, `_one_tile` loads text and image tokens
side by side and computes one Q K^T, a maximum and a sum per softmax by column masks, and one P V with each column
scaled by its gate. Otherwise `online` loops over key tiles, one softmax after another. Grids order query tiles first,
then heads, then rows, so that concurrent programs share keys in the cache. A segment of strength 0 or page -1 is never
read.
"""

import math

import torch
import triton
import triton.language as tl

from stylefast.errors import InvalidRequest
from stylefast.kernels.configs import Config, configurations
from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.gated_cross_attention_online import (
    TABLES,
    UNSEEN,
    online,
    segment_gate,
    segment_state,
    text_length,
)
from stylefast.kernels.gpu.launch import compiler_options, device_of, power_of_two, settings, specialisation

LOG2_E = math.log2(math.e)


@triton.jit
def _shares(owner, segment, row, group, group_row, group_segment, SEGMENTS: tl.constexpr):
    """Return a mask of the columns in the softmax of `segment`: its own and those of segments with the same number."""
    number = tl.load(group + row * group_row + segment * group_segment)
    shares = owner == segment
    for s in tl.static_range(SEGMENTS):
        other = tl.load(group + row * group_row + s * group_segment)
        shares = shares | (owner == tl.where(other == number, s, -2))
    return shares[None, :]


@triton.jit(do_not_specialize=TABLES)
def _one_tile(
    q,  # [rows, tokens, heads, d]
    text_k,
    text_v,  # [text pages, text tokens, heads, d]
    text_page,  # [rows]
    text_lengths,  # [text pages], or None
    image_k,
    image_v,  # [image pages, image tokens, heads, d]
    image_lengths,  # [image pages]
    image_page,
    strength,
    group,  # [rows, segments]
    masks,  # [masks, tokens]
    mask_index,  # [rows, segments]
    out,  # [rows, tokens, heads, d]
    scale,
    tokens,
    text_tokens,
    text_pages,
    image_tokens,
    image_pages,
    mask_count,
    q_row,
    q_token,
    q_head,
    text_k_page,
    text_k_token,
    text_k_head,
    text_v_page,
    text_v_token,
    text_v_head,
    text_page_row,
    text_length_page,
    image_k_page,
    image_k_token,
    image_k_head,
    image_v_page,
    image_v_token,
    image_v_head,
    length_page,
    image_page_row,
    image_page_segment,
    strength_row,
    strength_segment,
    group_row,
    group_segment,
    mask_row,
    mask_token,
    mask_index_row,
    mask_index_segment,
    out_row,
    out_token,
    out_head,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_COLUMNS: tl.constexpr,
):
    """Compute all softmaxes in one tile.

    Columns: the text's tokens, then SEGMENT_COLUMNS for each segment. `scale` is log2(e) / sqrt(d).
    """
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D_PADDED)
    column = tl.arange(0, COLUMNS)
    query_mask = (token < tokens)[:, None] & (channel < D)[None, :]
    query = tl.load(
        q + row * q_row + head * q_head + token[:, None] * q_token + channel[None, :], mask=query_mask, other=0.0
    )

    page = tl.load(text_page + row * text_page_row)
    broken = (page < 0) | (page >= text_pages)
    page = tl.where(broken, 0, page)
    in_text = column < text_tokens
    length = text_length(page, text_lengths, text_length_page, text_tokens)
    live = column < tl.where(broken, 0, length)  # columns that are read
    in_d = channel < D
    key = text_k + page * text_k_page + head * text_k_head + column * text_k_token
    value = text_v + page * text_v_page + head * text_v_head + column * text_v_token
    keys = tl.load(key[None, :] + channel[:, None], mask=live[None, :] & in_d[:, None], other=0.0)
    values = tl.load(value[:, None] + channel[None, :], mask=live[:, None] & in_d[None, :], other=0.0)
    for s in tl.static_range(SEGMENTS):
        page, active, number = segment_state(
            row,
            s,
            image_page,
            strength,
            group,
            image_page_row,
            image_page_segment,
            strength_row,
            strength_segment,
            group_row,
            group_segment,
        )
        broken = broken | (active & (page >= image_pages))
        active = active & (page < image_pages)
        page = tl.where(active, page, 0)
        length = tl.load(image_lengths + page * length_page, mask=active, other=0).to(tl.int32)
        place = column - text_tokens - s * SEGMENT_COLUMNS
        mine = (place >= 0) & (place < SEGMENT_COLUMNS) & (place < tl.minimum(length, image_tokens))
        key = image_k + page * image_k_page + head * image_k_head + place * image_k_token
        value = image_v + page * image_v_page + head * image_v_head + place * image_v_token
        keys = tl.load(key[None, :] + channel[:, None], mask=mine[None, :] & in_d[:, None], other=keys)
        values = tl.load(value[:, None] + channel[None, :], mask=mine[:, None] & in_d[None, :], other=values)
        live = live | mine

    scores = tl.dot(query, keys, input_precision="ieee") * scale  # [queries, columns]
    scores = tl.where(live[None, :], scores, UNSEEN)

    # each column takes the maximum and sum of its own softmax; `owner` is its segment, or -1 for text
    owner = tl.where(in_text, -1, (column - text_tokens) // SEGMENT_COLUMNS)
    peaks = tl.max(tl.where(in_text[None, :], scores, UNSEEN), 1)[:, None]
    for s in tl.static_range(SEGMENTS):
        shares = _shares(owner, s, row, group, group_row, group_segment, SEGMENTS)
        peak = tl.max(tl.where(shares, scores, UNSEEN), 1)
        peaks = tl.where((owner == s)[None, :], peak[:, None], peaks)
    weights = tl.where(live[None, :], tl.exp2(scores - peaks), 0.0)

    total = tl.sum(tl.where(in_text[None, :], weights, 0.0), 1)
    factors = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    for s in tl.static_range(SEGMENTS):
        page, active, number = segment_state(
            row,
            s,
            image_page,
            strength,
            group,
            image_page_row,
            image_page_segment,
            strength_row,
            strength_segment,
            group_row,
            group_segment,
        )
        gate = segment_gate(
            row,
            s,
            token,
            active,
            tokens,
            strength,
            masks,
            mask_index,
            mask_count,
            strength_row,
            strength_segment,
            mask_row,
            mask_token,
            mask_index_row,
            mask_index_segment,
        )
        shares = _shares(owner, s, row, group, group_row, group_segment, SEGMENTS)
        total = tl.sum(tl.where(shares, weights, 0.0), 1)
        factors = tl.where((owner == s)[None, :], (gate / tl.where(total > 0, total, 1.0))[:, None], factors)

    result = tl.dot((weights * factors).to(values.dtype), values, input_precision="ieee")
    result = tl.where(broken, float("nan"), result)
    target = out + row * out_row + head * out_head + token[:, None] * out_token + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=query_mask)


def gated_cross_attention(
    q: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    text_page: torch.Tensor,
    text_lengths: torch.Tensor | None,
    images: ImageSegments | None,
    out: torch.Tensor,
    config: Config | None = None,
) -> None:
    """Write the gated cross-attention into `out`; arguments as the public operation's, already checked.

    A row with an index out of range becomes NaN, without out-of-bounds reads. Raises InvalidRequest for bf16 on the
    CPU, because Triton's interpreter would multiply its bits as integers.
    """
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise InvalidRequest("Triton's interpreter multiplies no bfloat16 matrices; use float16 or float32 on the CPU")
    rows, tokens, heads, d = q.shape
    if q.numel() == 0:
        return
    if images is not None and (images.page.shape[1] == 0 or images.k.numel() == 0):
        images = None
    if images is not None and (images.masks is None or images.mask_index is None):
        images = images._replace(masks=None, mask_index=None)
    config = settings("gated_cross_attention", q, config, d=d, bits=q.element_size() * 8)
    queries, text_tokens = config["queries"], text_k.shape[1]
    segments, image_pages, image_tokens = 0, 0, 0
    if images is not None:
        segments, (image_pages, image_tokens) = images.page.shape[1], images.k.shape[:2]
    columns, segment_columns = one_tile_columns(text_tokens, segments, image_tokens)
    tensors = images or (None,) * 8
    arguments = (
        q,
        text_k,
        text_v,
        text_page,
        text_lengths,
        *tensors,
        out,
        LOG2_E / math.sqrt(d),
        tokens,
        text_tokens,
        text_k.shape[0],
        image_tokens,
        image_pages,
        0 if images is None or images.masks is None else images.masks.shape[0],
        *q.stride()[:3],
        *text_k.stride()[:3],
        *text_v.stride()[:3],
        *text_page.stride(),
        *_strides(text_lengths, 1),
        *(stride for x, count in zip(tensors, (3, 3, 1, 2, 2, 2, 2, 2)) for stride in _strides(x, count)),
        *out.stride()[:3],
    )
    sizes = {"D": d, "D_PADDED": max(16, power_of_two(d)), "QUERIES": queries}
    grid = (triton.cdiv(tokens, queries), heads, rows)
    with device_of(q):
        if columns <= config["columns"] and segments <= config["segments"]:
            _one_tile[grid](
                *arguments,
                **sizes,
                COLUMNS=columns,
                SEGMENTS=segments,
                SEGMENT_COLUMNS=segment_columns,
                **compiler_options(config),
            )
        else:
            online[grid](
                *arguments,
                segments,
                **sizes,
                KEYS=config["keys"],
                **compiler_options(config),
            )


def specialisations(capability: int) -> list[Specialisation]:
    """List both forms of every committed configuration, with lengths, masks and the most segments per tile."""
    found = []
    for key, config in configurations("gated_cross_attention", capability):
        kind = "*bf16" if key["bits"] == 16 else "*fp32"
        sides = ("q", "text_k", "text_v", "image_k", "image_v", "out")
        pointers = {
            **dict.fromkeys(sides, kind),
            **dict.fromkeys(("strength", "masks"), "*fp32"),
            **dict.fromkeys(
                ("text_page", "text_lengths", "image_lengths", "image_page", "group", "mask_index"), "*i64"
            ),
        }
        sizes = {"D": key["d"], "D_PADDED": max(16, power_of_two(key["d"])), "QUERIES": config["queries"]}
        divisible = [f"{side}_{part}" for side in sides for part in ("row", "page", "token", "head")]
        if config["columns"]:
            tile = {**sizes, "COLUMNS": config["columns"], "SEGMENTS": config["segments"], "SEGMENT_COLUMNS": 16}
            found.append(
                specialisation(
                    f"gated_cross_attention one tile {key}",
                    _one_tile,
                    pointers,
                    tile,
                    divisible,
                    config["num_warps"],
                )
            )
        found.append(
            specialisation(
                f"gated_cross_attention online {key}",
                online,
                pointers,
                {**sizes, "KEYS": config["keys"]},
                divisible,
                config["num_warps"],
                config["num_stages"],
            )
        )
    return found


def one_tile_columns(text_tokens: int, segments: int, image_tokens: int) -> tuple[int, int]:
    """Return the columns of the tile that would hold everything (a power of two), and those of one segment."""
    segment_columns = power_of_two(image_tokens)
    return max(32, power_of_two(text_tokens + segments * segment_columns)), segment_columns


def _strides(tensor: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]
