"""Gated cross-attention in Triton, form "online": one softmax after another, for any number of keys and segments."""

import triton
import triton.language as tl

UNSEEN = tl.constexpr(-1e30)  # below every score, yet finite: subtracted from itself it gives no NaN

TABLES = [
    "tokens",
    "text_tokens",
    "text_pages",
    "image_tokens",
    "image_pages",
    "mask_count",
    "text_page_row",
    "text_length_page",
    "length_page",
    "image_page_row",
    "image_page_segment",
    "strength_row",
    "strength_segment",
    "group_row",
    "group_segment",
    "mask_row",
    "mask_token",
    "mask_index_row",
    "mask_index_segment",
]


@triton.jit
def text_length(page, text_lengths, text_length_page, text_tokens):
    """Return the number of tokens in use of a text page."""
    length = text_tokens
    if text_lengths is not None:
        length = tl.minimum(tl.load(text_lengths + page * text_length_page).to(tl.int32), text_tokens)
    return length


@triton.jit
def segment_state(
    row,
    segment,
    image_page,
    strength,
    group,
    image_page_row,
    image_page_segment,
    strength_row,
    strength_segment,
    group_row,
    group_segment,
):
    """Return the segment's page, whether it is in use, and the number of its softmax."""
    page = tl.load(image_page + row * image_page_row + segment * image_page_segment)
    amount = tl.load(strength + row * strength_row + segment * strength_segment)
    number = tl.load(group + row * group_row + segment * group_segment)
    return page, (page >= 0) & (amount != 0.0), number


@triton.jit
def segment_gate(
    row,
    segment,
    token,
    reads,
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
):
    """Return strength * mask of one segment for the tile's tokens, fp32; NaN if the mask's index is out of range."""
    amount = tl.load(strength + row * strength_row + segment * strength_segment, mask=reads, other=0.0)
    gate = tl.zeros_like(token).to(tl.float32) + amount
    if masks is not None:
        chosen = tl.load(mask_index + row * mask_index_row + segment * mask_index_segment, mask=reads, other=-1)
        known = reads & (chosen >= 0) & (chosen < mask_count)
        inside = token < tl.where(known, tokens, 0)
        values = tl.load(masks + chosen * mask_row + token * mask_token, mask=inside, other=1.0)
        gate = tl.where(chosen >= mask_count, float("nan"), gate * values)
    return gate


@triton.jit
def _attend(
    query,
    k,
    v,
    stride_k,
    stride_v,
    length,
    gate,
    scale,
    peak,
    total,
    gathered,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Add `length` tokens at k, v to a running softmax: its maximum, sum and gated values."""
    channel = tl.arange(0, D_PADDED)
    for start in range(0, length, KEYS):
        place = start + tl.arange(0, KEYS)
        inside = place < length
        keys = tl.load(
            k + place[None, :] * stride_k + channel[:, None], mask=inside[None, :] & (channel < D)[:, None], other=0.0
        )
        scores = tl.where(inside[None, :], tl.dot(query, keys, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        kept = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * kept + tl.sum(weights, 1)
        values = tl.load(
            v + place[:, None] * stride_v + channel[None, :], mask=inside[:, None] & (channel < D)[None, :], other=0.0
        )
        weights = (weights * gate[:, None]).to(values.dtype)
        gathered = tl.dot(weights, values, gathered * kept[:, None], input_precision="ieee")
        peak = higher
    return peak, total, gathered


@triton.jit(do_not_specialize=[*TABLES, "segments"])
def online(
    q,
    text_k,
    text_v,
    text_page,
    text_lengths,
    image_k,
    image_v,
    image_lengths,
    image_page,
    strength,
    group,
    masks,
    mask_index,
    out,
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
    segments,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Compute one softmax after another, for any number of keys and segments. Arguments as `_one_tile`."""
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, D_PADDED)
    query_mask = (token < tokens)[:, None] & (channel < D)[None, :]
    query = tl.load(
        q + row * q_row + head * q_head + token[:, None] * q_token + channel[None, :], mask=query_mask, other=0.0
    )
    unseen = tl.full([QUERIES], UNSEEN, tl.float32)
    nothing = tl.zeros([QUERIES], tl.float32)
    empty = tl.zeros([QUERIES, D_PADDED], tl.float32)

    page = tl.load(text_page + row * text_page_row)
    broken = (page < 0) | (page >= text_pages)
    page = tl.where(broken, 0, page)
    peak, total, gathered = _attend(
        query,
        text_k + page * text_k_page + head * text_k_head,
        text_v + page * text_v_page + head * text_v_head,
        text_k_token,
        text_v_token,
        tl.where(broken, 0, text_length(page, text_lengths, text_length_page, text_tokens)),
        nothing + 1.0,
        scale,
        unseen,
        nothing,
        empty,
        D,
        D_PADDED,
        KEYS,
    )
    result = gathered * (1.0 / tl.where(total > 0, total, 1.0))[:, None]

    if image_k is not None:
        for s in range(0, segments):
            page, leads, number = segment_state(
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
            for t in range(0, s):
                earlier, active, other = segment_state(
                    row,
                    t,
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
                leads = leads & ((active == 0) | (other != number))
            if leads:  # first of its softmax; the others are processed with it
                peak, total, gathered = unseen, nothing, empty
                for t in range(s, segments):
                    page, active, other = segment_state(
                        row,
                        t,
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
                    active = active & (other == number)
                    broken = broken | (active & (page >= image_pages))
                    active = active & (page < image_pages)
                    page = tl.where(active, page, 0)
                    length = tl.load(image_lengths + page * length_page, mask=active, other=0).to(tl.int32)
                    gate = segment_gate(
                        row,
                        t,
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
                    peak, total, gathered = _attend(
                        query,
                        image_k + page * image_k_page + head * image_k_head,
                        image_v + page * image_v_page + head * image_v_head,
                        image_k_token,
                        image_v_token,
                        tl.minimum(length, image_tokens),
                        gate,
                        scale,
                        peak,
                        total,
                        gathered,
                        D,
                        D_PADDED,
                        KEYS,
                    )
                result += gathered * (1.0 / tl.where(total > 0, total, 1.0))[:, None]

    result = tl.where(broken, float("nan"), result)
    target = out + row * out_row + head * out_head + token[:, None] * out_token + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=query_mask)
