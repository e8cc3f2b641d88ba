"""Shared self-attention: rows attend to their own tokens and to those of 0..R reference pages.

For a row with queries Q, own keys and values K, V, and for each reference segment r the keys K_r, V_r of its page:

    q^ = Q * gain_q + offset_q      k^ = K * gain_k + offset_k      v^ = V * gain_v + offset_v          (AdaIN, affine)
    concat:  softmax([ q^ k^T / sqrt(d),  scale_r * q^ K_r^T / sqrt(d) + shift_r + bias_r, ... ]) [v^; V_r; ...]
    swap:    the same without the own segment
    plain:   softmax(Q K^T / sqrt(d)) V

(StyleAligned, arXiv 2312.02133, figure 4; swap is Visual Style Prompting, arXiv 2402.12974.) The reference's keys come
in raw: AdaIN of the reference with itself is the identity.

A page index p < rows is row p of this batch (a live reference), p >= rows is page p - rows of the pool, -1 is none.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

PLAIN, CONCAT, SWAP = 0, 1, 2


class Affine(NamedTuple):
    """AdaIN's gains and offsets for queries, keys and values, each [rows, heads, d] fp32."""

    q_gain: torch.Tensor
    q_offset: torch.Tensor
    k_gain: torch.Tensor
    k_offset: torch.Tensor
    v_gain: torch.Tensor
    v_offset: torch.Tensor


def shared_attention_ref(
    q: torch.Tensor,  # [rows, tokens, heads, d]
    k: torch.Tensor,  # [rows, tokens, heads, d]
    v: torch.Tensor,  # [rows, tokens, heads, d]
    page: torch.Tensor,  # [rows, R] int64
    mode: torch.Tensor,  # [rows] int64
    scale: torch.Tensor,  # [rows, R] fp32
    shift: torch.Tensor,  # [rows, R] fp32; -inf hides a segment
    affine: Affine | None = None,
    pool_k: torch.Tensor | None = None,  # [pages, reference tokens, heads, d]
    pool_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,  # [rows + pages, reference tokens], added to the logits of a page's tokens
) -> torch.Tensor:
    """The formula above, row by row, all logits in memory, fp32 inside. Returns [rows, tokens, heads, d]."""
    rows, _, _, width = q.shape
    out = torch.empty_like(q)
    for row in range(rows):
        query, own_k, own_v = q[row].float(), k[row].float(), v[row].float()
        segments = [int(p) for p in page[row]] if int(mode[row]) != PLAIN else []
        used = [(r, p) for r, p in enumerate(segments) if p >= 0]
        if used and affine is not None:
            query = query * affine.q_gain[row] + affine.q_offset[row]
            own_k = own_k * affine.k_gain[row] + affine.k_offset[row]
            own_v = own_v * affine.v_gain[row] + affine.v_offset[row]

        logits, values = [], []
        if not used or int(mode[row]) != SWAP:
            logits.append(torch.einsum("qhd,khd->hqk", query, own_k) / math.sqrt(width))
            values.append(own_v)
        for r, p in used:
            page_k, page_v = (k[p], v[p]) if p < rows else (pool_k[p - rows], pool_v[p - rows])
            score = torch.einsum("qhd,khd->hqk", query, page_k.float()) / math.sqrt(width)
            score = score * scale[row, r] + shift[row, r]
            if bias is not None:
                score = score + bias[p, : page_k.shape[0]]
            logits.append(score)
            values.append(page_v.float())
        weights = torch.softmax(torch.cat(logits, -1), -1)
        out[row] = torch.einsum("hqk,khd->qhd", weights, torch.cat(values)).to(q.dtype)
    return out


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    page: torch.Tensor,
    mode: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    affine: Affine | None = None,
    pool_k: torch.Tensor | None = None,
    pool_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Shared self-attention on PyTorch's own attention kernels; arguments and result as `shared_attention_ref`.

    Rows are gathered by what they attend to, one call per kind; a batch without references is one plain call.
    Reads `page` and `mode` on the host.
    """
    rows = q.shape[0]
    if page.shape[1] == 0:
        return _attend(q, k, v)

    kinds: dict[tuple, list[int]] = {}
    for row, (row_mode, pages) in enumerate(zip(mode.tolist(), page.tolist(), strict=True)):
        kinds.setdefault(_kind(row_mode, pages, rows), []).append(row)
    if list(kinds) == [(PLAIN,)]:
        return _attend(q, k, v)

    out = torch.empty_like(q)
    for (row_mode, *sources), members in kinds.items():
        index = torch.tensor(members, device=q.device)
        query, own_k, own_v = q[index], k[index], v[index]
        if row_mode == PLAIN:
            out[index] = _attend(query, own_k, own_v)
            continue
        if affine is not None:
            parts = [part[index, None].to(q.dtype) for part in affine]
            query, own_k, own_v = query * parts[0] + parts[1], own_k * parts[2] + parts[3], own_v * parts[4] + parts[5]

        keys, values, extra = [], [], []
        if row_mode != SWAP:
            keys, values = [own_k], [own_v]
            extra = [q.new_zeros(len(members), own_k.shape[1])]
        for r, source in sources:
            p = page[index, r]
            page_k, page_v = (k[p], v[p]) if source == "live" else (pool_k[p - rows], pool_v[p - rows])
            keys.append(page_k * scale[index, r, None, None, None].to(q.dtype))
            values.append(page_v)
            shifts = shift[index, r, None].expand(-1, page_k.shape[1])
            extra.append((shifts + bias[p, : page_k.shape[1]] if bias is not None else shifts).to(q.dtype))
        keyed = bias is not None or bool((shift[index] != 0).any())
        mask = torch.cat(extra, 1)[:, None, None] if keyed else None  # [members, 1, 1, keys]
        out[index] = _attend(query, torch.cat(keys, 1), torch.cat(values, 1), mask)
    return out


def _kind(mode: int, pages: list[int], rows: int) -> tuple:
    """What a row attends to beside itself: its mode and the source of every segment in use."""
    used = tuple((r, "live" if p < rows else "pool") for r, p in enumerate(pages) if p >= 0)
    return (mode, *used) if used and mode != PLAIN else (PLAIN,)


def _attend(q, k, v, mask=None):
    """[rows, tokens, heads, d] in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
