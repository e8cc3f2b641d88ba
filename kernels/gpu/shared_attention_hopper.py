"""Shared self-attention, form "warp_specialised", for compute capability 9.0.

One warp group fetches keys and values by the tensor memory accelerator, two compute. The compiler splits only a single
loop without an `else`, so one loop runs over the tiles of the own tokens, then over those of one page. Both segments
must come from one descriptor, wherever they are in memory: its outermost dimension has two entries, and their distance
is its stride.

The differences between the two segments are selected per tile: the query copy (as a sum in which one term is 0, exact
and cheaper than a select), its factor, and the constant per query that AdaIN's offset of the keys adds. That constant
is a sum over channels, which the compiler can't split over warp groups, so a small kernel computes it first. The
values' gain is applied to the accumulator at the first tile of the page, their offset at the end.
"""

import contextvars
import math
from functools import partial

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config
from stylefast.kernels.gpu.exp2 import exp2, share
from stylefast.kernels.gpu.launch import compiler_options, device_of
from stylefast.kernels.gpu.strides import strides
from stylefast.kernels.shared_attention import Affine, Pool, References

STRIDE_LIMIT = 2**40  # bytes: limit of a tensor map's strides, one of which is the distance of the two segments

_FLOOR = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(math.log2(math.e))
_UNALIGNED = ["page", "mode", "scale", "shift"]
_RUNTIME = ["rows", "tokens", "heads", "pages", "page_tokens"]
_RUNTIME += ["page_row", "mode_row", "scale_row", "shift_row"]
_RUNTIME += [f"{x}_{dim}" for x in ("q", "k", "v", "out") for dim in ("row", "token", "head")]
_RUNTIME += [f"{x}_{dim}" for x in ("pool_k", "pool_v") for dim in ("page", "head")]


@triton.jit
def _both(own, other, other_tokens, fallback):
    """Return one descriptor's view of two segments of bf16 or fp16.

    That is the first element, the stride between the segments in units of 8 elements, and the indices of the own and of
    the other segment.
    """
    apart = tl.where(other_tokens > 0, (other.to(tl.int64) - own.to(tl.int64)) // 16, 0)
    first = tl.where(apart < 0, other, own)
    stride = tl.where(apart == 0, fallback.to(tl.int64), tl.abs(apart))
    return first, stride, tl.where(apart < 0, 1, 0), tl.where(apart > 0, 1, 0)


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def warp_specialised_kernel(
    q,  # [rows, tokens, heads, D]; strides of rows, tokens and heads in units of 8 elements, as for all tensors below
    k,
    v,
    out,
    constant,  # [rows, heads, tokens], from the offset of the own keys, in log2 units
    page,  # [rows, 1] int64
    mode,  # [rows] int64
    scale,  # [rows, 1]
    shift,
    gain,  # [TENSORS, rows, heads, D], contiguous
    offset,
    pool_k,  # [pages, page_tokens, heads, D], tokens as far apart as those of k
    pool_v,
    rows,
    tokens,
    heads,
    pages,
    page_tokens,
    q_row,
    q_token,
    q_head,
    k_row,
    k_token,
    k_head,
    v_row,
    v_token,
    v_head,
    out_row,
    out_token,
    out_head,
    page_row,
    mode_row,
    scale_row,
    shift_row,
    pool_k_page,
    pool_k_head,
    pool_v_page,
    pool_v_head,
    D: tl.constexpr,
    FACTOR: tl.constexpr,  # log2(e) / sqrt(D)
    HAS_PAGE: tl.constexpr,
    HAS_POOL: tl.constexpr,
    TENSORS: tl.constexpr,  # AdaIN: 0 none, 2 queries and keys, 3 also values
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXP2: tl.constexpr,
):
    # by head, then row, then tile: rows that share a page run concurrently and share its bytes in L2
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles % rows).to(tl.int64)
    head = (tl.program_id(0) // tiles // rows).to(tl.int64)

    k_first = k + (row * k_row + head * k_head) * 8
    v_first = v + (row * v_row + head * v_head) * 8
    k_apart, v_apart = k_token.to(tl.int64), v_token.to(tl.int64)
    k_own, k_other, v_own, v_other = 0, 0, 0, 0
    own_tiles = tokens // BLOCK_N
    other_tiles = 0
    used = False
    invalid = False
    if HAS_PAGE:
        p = tl.load(page + row * page_row)
        row_mode = tl.load(mode + row * mode_row)
        used = (p >= 0) & (row_mode != 0)
        invalid = (row_mode != 0) & ((p < -1) | (p >= rows + pages))
        moved = tl.load(shift + row * shift_row)
        size = tl.load(scale + row * scale_row)
        sign = tl.where(size < 0, -1.0, 1.0)
        other_factor = tl.abs(size) * FACTOR
        count = tokens
        k_page = k + (p * k_row + head * k_head) * 8
        v_page = v + (p * v_row + head * v_head) * 8
        if HAS_POOL:
            live = p < rows
            count = tl.where(live, tokens, page_tokens)
            k_page = tl.where(live, k_page, pool_k + ((p - rows) * pool_k_page + head * pool_k_head) * 8)
            v_page = tl.where(live, v_page, pool_v + ((p - rows) * pool_v_page + head * pool_v_head) * 8)
        other_tiles = tl.where(used & ~invalid & (moved != -float("inf")), count // BLOCK_N, 0)
        own_tiles = tl.where(invalid | (used & (row_mode == 2)), 0, own_tiles)
        k_first, k_apart, k_own, k_other = _both(k_first, k_page, other_tiles, k_token)
        v_first, v_apart, v_own, v_other = _both(v_first, v_page, other_tiles, v_token)

    longest = tl.maximum(tokens, page_tokens)
    key_tiles = tl.make_tensor_descriptor(
        k_first, [2, longest, D], [k_apart * 8, k_token.to(tl.int64) * 8, 1], [1, BLOCK_N, D]
    )
    value_tiles = tl.make_tensor_descriptor(
        v_first, [2, longest, D], [v_apart * 8, v_token.to(tl.int64) * 8, 1], [1, BLOCK_N, D]
    )
    query_tiles = tl.make_tensor_descriptor(
        q + (row * q_row + head * q_head) * 8, [tokens, D], [q_token.to(tl.int64) * 8, 1], [BLOCK_M, D]
    )
    query = query_tiles.load([tile * BLOCK_M, 0])
    if TENSORS > 0:
        affine = (row * heads + head) * D + tl.arange(0, D)
        next_tensor = rows.to(tl.int64) * heads * D
        changed = tl.arange(0, D) < tl.where(used, D, 0)
        normalised = query.to(tl.float32) * tl.load(gain + affine, mask=changed, other=1.0)[None, :]
        normalised += tl.load(offset + affine, mask=changed, other=0.0)[None, :]
        query_own = normalised * tl.load(gain + next_tensor + affine, mask=changed, other=1.0)[None, :]
        query_own = query_own.to(q.dtype.element_ty)
        query = normalised.to(q.dtype.element_ty)
        constants = tl.make_tensor_descriptor(constant + (row * heads + head) * tokens, [tokens], [1], [BLOCK_M])
        own_constant = constants.load([tile * BLOCK_M])
    if TENSORS == 3:
        value_gain = tl.load(gain + 2 * next_tensor + affine, mask=changed, other=1.0)
        own_total = tl.zeros([BLOCK_M], tl.float32)

    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], _FLOOR, tl.float32)
    for n in tl.range(0, own_tiles + other_tiles, warp_specialize=True):
        own = n < own_tiles
        start = tl.where(own, n, n - own_tiles) * BLOCK_N
        key = key_tiles.load([tl.where(own, k_own, k_other), start, 0]).reshape(BLOCK_N, D)
        value = value_tiles.load([tl.where(own, v_own, v_other), start, 0]).reshape(BLOCK_N, D)
        asked = query
        if HAS_PAGE:
            if TENSORS > 0:
                asked = query_own * tl.where(own, 1.0, 0.0).to(query.dtype)
                asked += query * tl.where(own, 0.0, sign).to(query.dtype)
            else:
                asked = query * tl.where(own, 1.0, sign).to(query.dtype)
        scores = tl.dot(asked, tl.trans(key))
        if HAS_PAGE:
            factor = tl.where(own, FACTOR, other_factor)
            if TENSORS > 0:
                added = tl.where(own, own_constant, moved * _LOG2_E)
            else:
                added = tl.where(own, 0.0, moved * _LOG2_E) + tl.zeros([BLOCK_M], tl.float32)
            highest = tl.maximum(peak, tl.max(scores, 1) * factor + added)
            weights = exp2(scores * factor - (highest - added)[:, None], EXP2)
        else:
            highest = tl.maximum(peak, tl.max(scores, 1) * FACTOR)
            weights = exp2(scores * FACTOR - highest[:, None], EXP2)
        fading = tl.exp2(peak - highest)
        weight = tl.sum(weights, 1)
        total = total * fading + weight
        if TENSORS == 3:
            own_total = own_total * fading + tl.where(own, weight, 0.0)
            acc = acc * tl.where(n == own_tiles, value_gain, 1.0)[None, :]
        acc = tl.dot(weights.to(value.dtype), value, acc * fading[:, None])
        peak = highest

    if TENSORS == 3:
        value_offset = tl.load(offset + 2 * next_tensor + affine, mask=changed, other=0.0)
        acc = acc * tl.where(other_tiles == 0, value_gain, 1.0)[None, :] + own_total[:, None] * value_offset[None, :]
    # a row that saw no token gives 0
    saw = peak > 0.5 * _FLOOR
    inverse = tl.where(saw, 1.0 / tl.where(saw, total, 1.0), 0.0)
    if HAS_PAGE:
        inverse = tl.where(invalid, float("nan"), inverse)
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    out_tile = out + (row * out_row + head * out_head) * 8 + token.to(tl.int64)[:, None] * (out_token * 8)
    acc = (acc * inverse[:, None]).to(out.dtype.element_ty)
    tl.store(out_tile + tl.arange(0, D)[None, :], acc, mask=(token < tokens)[:, None])


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def query_constant_kernel(
    q,  # [rows, tokens, heads, D]; strides in units of 8 elements
    page,
    mode,
    gain,  # [2 or 3, rows, heads, D], contiguous
    offset,
    constant,  # [rows, heads, tokens]
    rows,
    tokens,
    heads,
    q_row,
    q_token,
    q_head,
    page_row,
    mode_row,
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Compute what the own keys' offset adds to each score of a query: (q gain + offset).offset_k log2(e) / sqrt(D)."""
    row = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    used = (tl.load(mode + row * mode_row) != 0) & (tl.load(page + row * page_row) >= 0)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.arange(0, D)
    affine = (row * heads + head) * D + channel
    next_tensor = rows.to(tl.int64) * heads * D
    place = q + (row * q_row + head * q_head) * 8 + token.to(tl.int64)[:, None] * (q_token * 8) + channel[None, :]
    changed = channel < tl.where(used, D, 0)
    query = tl.load(place, mask=(token < tokens)[:, None] & changed[None, :], other=0).to(tl.float32)
    query = query * tl.load(gain + affine, mask=changed, other=1.0)[None, :]
    query += tl.load(offset + affine, mask=changed, other=0.0)[None, :]
    key_offset = tl.load(offset + next_tensor + affine, mask=changed, other=0.0)
    total = tl.sum(query * key_offset[None, :], 1) * FACTOR
    tl.store(constant + (row * heads + head) * tokens + token, total, mask=token < tokens)


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    references: References,
    affine: Affine | None,
    pool: Pool | None,
    out: torch.Tensor,
    config: Config,
) -> None:
    """Fill `out`. The caller checks by `form_for` (shared_attention.py) that the arguments fit this form."""
    # Triton's allocator is a context variable; run in a copied context to leave the application's own in place
    fill = partial(_fill, q, k, v, references, affine, pool, out, config)
    if not q.is_cuda:
        fill()
        return
    context = contextvars.copy_context()
    context.run(triton.set_allocator, _scratch)  # descriptors made on the device need scratch memory
    context.run(fill)


def _fill(q, k, v, references: References, affine: Affine | None, pool: Pool | None, out, config: Config) -> None:
    rows, tokens, heads, d = q.shape
    page, mode, scale, shift, _ = references
    has_page = page.shape[1] == 1
    tensors = 0 if affine is None or not has_page else affine.gain.shape[0]
    pages, page_tokens = pool.k.shape[:2] if pool is not None else (0, 0)
    pool_strides = [0] * 4 if pool is None else [strides(x)[i] // 8 for x in (pool.k, pool.v) for i in (0, 2)]
    factor = math.log2(math.e) / math.sqrt(d)
    block_m = config["block_m"]
    page_row, scale_row, shift_row = (x.stride(0) for x in (page, scale, shift))
    with device_of(q):
        constant = gain = offset = None
        if affine is not None:
            gain, offset = affine.gain.contiguous(), affine.offset.contiguous()
        if tensors:
            constant = torch.empty((rows, heads, tokens), dtype=torch.float32, device=q.device)
            query_constant_kernel[(triton.cdiv(tokens, 64), rows * heads)](
                q,
                page,
                mode,
                gain,
                offset,
                constant,
                rows,
                tokens,
                heads,
                *(s // 8 for s in strides(q)),
                page_row,
                *mode.stride(),
                D=d,
                FACTOR=factor,
                BLOCK_M=64,
                num_warps=4,
                enable_fp_fusion=True,
            )
        warp_specialised_kernel[(triton.cdiv(tokens, block_m) * rows * heads,)](
            q,
            k,
            v,
            out,
            constant,
            page,
            mode,
            scale,
            shift,
            gain,
            offset,
            *(pool or (None, None))[:2],
            rows,
            tokens,
            heads,
            pages,
            page_tokens,
            *(s // 8 for x in (q, k, v, out) for s in strides(x)),
            page_row,
            *mode.stride(),
            scale_row,
            shift_row,
            *pool_strides,
            D=d,
            FACTOR=factor,
            HAS_PAGE=has_page,
            HAS_POOL=pool is not None,
            TENSORS=tensors,
            BLOCK_M=block_m,
            BLOCK_N=config["block_n"],
            EXP2=share(config["exp2"]),
            **compiler_options(config),
        )


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
