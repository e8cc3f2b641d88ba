"""PyTorch's two forms of shared attention: one that reads the row table on the host, and one that compilers can trace.

The operation itself, its formula and its reference are in `shared_attention.py`.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from stylefast.kernels.shared_attention import Affine, Pool, References

PLAIN, CONCAT, SWAP = 0, 1, 2  # modes of a row
FP8 = torch.float8_e4m3fn


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    references: "References",
    affine: "Affine | None",
    pool: "Pool | None",
) -> torch.Tensor:
    """Compute with PyTorch's attention kernels, one call per `_kind` of row. Synchronises with the device."""
    rows, (page, mode, scale, shift, bias) = q.shape[0], references
    if page.shape[1] == 0 or q.numel() == 0:
        return attend(q, k, v).contiguous()

    kinds: dict[tuple, list[int]] = {}
    for row, columns in enumerate(zip(mode.tolist(), page.tolist(), shift.tolist(), strict=True)):
        kinds.setdefault(_kind(*columns, rows), []).append(row)
    if list(kinds) == [(PLAIN,)]:
        return attend(q, k, v).contiguous()

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for (row_mode, *sources), members in kinds.items():
        index = torch.tensor(members, device=q.device)
        query, own_k, own_v = q[index], k[index], v[index]
        if row_mode == PLAIN:
            out[index] = attend(query, own_k, own_v)
            continue
        if affine is not None:
            parts = [query, own_k, own_v]
            for i, (gain, offset) in enumerate(zip(*affine)):
                parts[i] = _moved(parts[i], gain[index], offset[index])
            query, own_k, own_v = parts
        keys, values, extra = [], [], []
        if row_mode != SWAP:
            keys, values = [own_k], [own_v]
            extra = [shift.new_zeros(len(members), own_k.shape[1])]
        for r, source in sources:
            p = page[index, r]
            page_k, page_v = (k[p], v[p]) if source == "live" else _pages(pool, p - rows, q.dtype)
            keys.append(_scaled(page_k, scale[index, r]) if bool((scale[index, r] != 1).any()) else page_k)
            values.append(page_v)
            shifts = shift[index, r, None].expand(-1, page_k.shape[1])
            extra.append(shifts + bias[p, : page_k.shape[1]] if bias is not None else shifts)
        if not keys:
            out[index] = 0
            continue
        mask = None  # [members, 1, 1, keys]
        if bias is not None or bool((shift[index] != 0).any()):
            mask = torch.cat(extra, 1)[:, None, None].to(_exact(q.dtype))
        part = attend(query, torch.cat(keys, 1), torch.cat(values, 1), mask)
        if bias is not None and mask is not None:
            part = part.masked_fill(torch.isneginf(mask).all(-1)[..., None], 0)
        out[index] = part
    return out


def _kind(mode: int, pages: list[int], shifts: list[float], rows: int) -> tuple:
    """Return a row's mode and the source of each segment it sees, or (PLAIN,) for a row without pages."""
    if mode == PLAIN or all(p < 0 for p in pages):
        return (PLAIN,)
    seen = [(r, p) for r, (p, shift) in enumerate(zip(pages, shifts)) if p >= 0 and shift != -math.inf]
    return (mode, *((r, "live" if p < rows else "pool") for r, p in seen))


def _pages(pool: "Pool | tuple | None", index: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys and values of some pages in the model's type."""
    assert pool is not None  # as a row reads it
    pool_k, pool_v, k_scale, v_scale = pool
    if k_scale is None or v_scale is None:
        return pool_k[index], pool_v[index]
    # gathered as bytes: not every device can index float8
    k, v = (x.view(torch.uint8)[index].view(FP8).float() for x in (pool_k, pool_v))
    return (k * k_scale[index, None]).to(dtype), (v * v_scale[index, None]).to(dtype)


def traceable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    references: "References",
    affine: "Affine | None",
    pool: "Pool | None",
) -> torch.Tensor:
    """Compute without reading tensors on the host: every row carries every segment, masked out where unused."""
    (rows, tokens), (page, mode, scale, shift, bias) = q.shape[:2], references
    if page.shape[1] == 0:
        return attend(q, k, v).contiguous()
    used = (mode != PLAIN)[:, None] & (page >= 0)  # [rows, R]
    styled = used.any(1)
    parts = [q, k, v]
    if affine is not None:
        for i in range(affine.gain.shape[0]):
            moved = _moved(parts[i], affine.gain[i], affine.offset[i])
            parts[i] = torch.where(styled[:, None, None, None], moved, parts[i])
    query, own_k, own_v = parts

    hidden = torch.full((), -math.inf, dtype=_exact(q.dtype), device=q.device)
    own = torch.where((styled & (mode == SWAP))[:, None], hidden, hidden.new_zeros(()))
    keys, values, extra = [own_k], [own_v], [own.expand(-1, tokens)]
    for r in range(page.shape[1]):
        p = page[:, r]
        sources: list[tuple] = [(p.clamp(0, rows - 1), p < rows, (k, v, None, None))]
        if pool is not None and pool.k.shape[0]:
            sources.append(((p - rows).clamp(0, pool.k.shape[0] - 1), p >= rows, pool))
        for index, here, source in sources:
            seen = used[:, r] & here & (shift[:, r] != -math.inf)
            # zeros where masked: 0 * NaN would be NaN
            page_k, page_v = (torch.where(seen[:, None, None, None], x, 0) for x in _pages(source, index, q.dtype))
            keys.append(_scaled(page_k, scale[:, r]))
            values.append(page_v)
            shifts = shift[:, r, None].expand(-1, page_k.shape[1])
            if bias is not None:
                shifts = shifts + bias[p.clamp(min=0), : page_k.shape[1]]
            extra.append(torch.where(seen[:, None], shifts.to(hidden.dtype), hidden))
    mask = torch.cat(extra, 1)  # [rows, keys]
    blind = torch.isneginf(mask).all(1, keepdim=True)
    out = attend(query, torch.cat(keys, 1), torch.cat(values, 1), torch.where(blind, 0, mask)[:, None, None])
    return torch.where(blind[:, :, None, None], 0, out).contiguous()


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _moved(x: torch.Tensor, gain: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Apply AdaIN's gain and offset [rows, heads, d] to x [rows, tokens, heads, d], rounding once."""
    return (x.to(_exact(x.dtype)) * gain[:, None] + offset[:, None]).to(x.dtype)


def _scaled(page_k: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (page_k.to(_exact(page_k.dtype)) * scale[:, None, None, None]).to(page_k.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Run PyTorch's own attention, [rows, tokens, heads, d] in and out."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
