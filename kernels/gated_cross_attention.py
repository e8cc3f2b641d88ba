"""Gated cross-attention: text plus up to S image segments, each with its own softmax and its own strength.

    out = softmax(Q K_text^T / sqrt(d)) V_text + sum_s strength_s * mask_s * softmax(Q K_s^T / sqrt(d)) V_s

(IP-Adapter, arXiv 2308.06721, equation 5; InstantStyle, arXiv 2404.02733, sets the strength per attention module.)
Segments of a row that carry the same group number share one softmax; each keeps its strength and mask.
A strength of 0 leaves a segment out altogether: it costs nothing, and a NaN in its keys or values goes nowhere.
"""

import math

import torch
import torch.nn.functional as F


def gated_cross_attention_ref(
    q: torch.Tensor,  # [rows, tokens, heads, d]
    text_k: torch.Tensor,  # [text pages, text tokens, heads, d]
    text_v: torch.Tensor,
    text_page: torch.Tensor,  # [rows] int64
    image_k: torch.Tensor | None = None,  # [image pages, image tokens, heads, d], padded
    image_v: torch.Tensor | None = None,
    image_lengths: torch.Tensor | None = None,  # [image pages] int64: tokens in use
    image_page: torch.Tensor | None = None,  # [rows, S] int64; -1: none
    strength: torch.Tensor | None = None,  # [rows, S] fp32
    group: torch.Tensor | None = None,  # [rows, S] int64
    masks: torch.Tensor | None = None,  # [masks, tokens] fp32
    mask_index: torch.Tensor | None = None,  # [rows, S] int64; -1: everywhere
) -> torch.Tensor:
    """The formula above, one row at a time, fp32 inside. Returns [rows, tokens, heads, d]."""
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        query = q[row].float()
        page = int(text_page[row])
        total = _weighted(query, text_k[page].float(), text_v[page].float())
        segments = range(image_page.shape[1]) if image_page is not None else ()
        active = [s for s in segments if int(image_page[row, s]) >= 0 and float(strength[row, s]) != 0.0]
        for number in dict.fromkeys(int(group[row, s]) for s in active):
            members = [s for s in active if int(group[row, s]) == number]
            keys, values, gates = [], [], []
            for s in members:
                page = int(image_page[row, s])
                length = int(image_lengths[page])
                keys.append(image_k[page, :length].float())
                values.append(image_v[page, :length].float())
                gate = strength[row, s].float().expand(q.shape[1])
                if mask_index is not None and int(mask_index[row, s]) >= 0:
                    gate = gate * masks[int(mask_index[row, s])].float()
                gates.append(gate[:, None].expand(-1, length))  # [tokens, keys of the segment]
            total = total + _weighted(query, torch.cat(keys), torch.cat(values), torch.cat(gates, 1))
        out[row] = total.to(q.dtype)
    return out


def gated_cross_attention(
    q: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    text_page: torch.Tensor,
    image_k: torch.Tensor | None = None,
    image_v: torch.Tensor | None = None,
    image_lengths: torch.Tensor | None = None,
    image_page: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    mask_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gated cross-attention on PyTorch's own attention kernels; arguments and result as `gated_cross_attention_ref`.

    Every segment is one call over the rows that use it. Reads the small tables (pages, strengths, groups) on the host.
    """
    out = _attend(q, text_k[text_page], text_v[text_page])
    if image_page is None or image_page.shape[1] == 0:
        return out

    pages, strengths, groups = image_page.tolist(), strength.tolist(), group.tolist()
    # (segments that share a softmax, their token counts) -> rows
    calls: dict[tuple, list[int]] = {}
    lengths = image_lengths.tolist()
    for row, row_pages in enumerate(pages):
        active = [s for s, p in enumerate(row_pages) if p >= 0 and strengths[row][s] != 0.0]
        for number in dict.fromkeys(groups[row][s] for s in active):
            members = tuple((s, lengths[row_pages[s]]) for s in active if groups[row][s] == number)
            calls.setdefault(members, []).append(row)

    for members, rows in calls.items():
        index = torch.tensor(rows, device=q.device)
        query = q[index]
        gathered = [(image_k[image_page[index, s], :n], image_v[image_page[index, s], :n]) for s, n in members]
        gates = [_gate(strength, masks, mask_index, index, s, q) for s, _ in members]  # [rows, tokens or 1, 1, 1]
        if len(members) == 1:
            keys, values = gathered[0]
            part = gates[0] * _attend(query, keys, values)
        else:
            keys = torch.cat([k for k, _ in gathered], 1)
            logits = torch.einsum("rqhd,rkhd->rhqk", query, keys) / math.sqrt(q.shape[-1])
            weights = torch.softmax(logits.float(), -1).to(q.dtype).split([n for _, n in members], -1)
            part = sum(
                gate * torch.einsum("rhqk,rkhd->rqhd", weight, values)
                for gate, weight, (_, values) in zip(gates, weights, gathered, strict=True)
            )
        out = out.index_add(0, index, part)
    return out


def _gate(strength, masks, mask_index, index, segment, q):
    gate = strength[index, segment, None].to(q.dtype)  # [rows, 1]
    if mask_index is not None and masks is not None and masks.numel():
        chosen = mask_index[index, segment]
        everywhere = torch.ones_like(masks[:1]).expand(len(index), -1)
        picked = torch.where((chosen >= 0)[:, None], masks[chosen.clamp(min=0)], everywhere)
        gate = gate * picked.to(q.dtype)
    return gate[:, :, None, None]


def _attend(q, k, v):
    """[rows, tokens, heads, d] in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _weighted(query, keys, values, gates=None):
    """softmax(query keys^T / sqrt(d)) * gates @ values for one row: [tokens, heads, d]."""
    weights = torch.softmax(torch.einsum("qhd,khd->hqk", query, keys) / math.sqrt(query.shape[-1]), -1)
    return torch.einsum("hqk,khd->qhd", weights if gates is None else weights * gates, values)
