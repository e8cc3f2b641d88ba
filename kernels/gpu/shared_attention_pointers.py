"""Shared self-attention, form "pointers": every chip, every stride, every mix of rows.

A program holds one tile of one row's queries and loops over that row's segments, its own tokens first, then its pages,
with one running softmax. Differences between segments are folded in without cost per score:

    AdaIN of the queries     where the tile is loaded, again for every segment
    AdaIN of the own keys    q.(g k + o) = (q g).k + q.o: a factor on the query tile and a constant per query
    AdaIN of the own values  sum p (g v + o) = g (sum p v) + o (sum p): on the accumulator, after the segment
    scale of a page          its sign on the query tile, its magnitude in the factor 1 / sqrt(d), applied anyway
    shift of a page          a constant per segment
    scale of fp8 keys        a factor on the query tile
    scale of fp8 values      on the accumulator, around the segment

A constant shifts the running maximum instead of each score. A hidden or absent segment is skipped, so a row in plain
mode costs as much as plain attention.
"""

import math

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config
from stylefast.kernels.gpu.exp2 import exp2, share
from stylefast.kernels.gpu.launch import compiler_options, device_of, power_of_two
from stylefast.kernels.gpu.strides import ALIGN, aligned, aligned_like, is_aligned, strides
from stylefast.kernels.shared_attention import FP8, Affine, Pool, References

# below every score, yet finite: in a tile of only hidden tokens, -inf minus it is no NaN
_FLOOR = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(math.log2(math.e))
# replaces an fp8 scale of 0, so that its channel comes out below 1e-11 instead of 0 / 0
_TINY = tl.constexpr(2.0**-60)
# sizes and strides vary from call to call and must not cause recompilation
_RUNTIME = ["rows", "tokens", "heads", "references", "pages", "page_tokens", "bias_page", "bias_token"]
_RUNTIME += ["page_row", "page_reference", "mode_row", "scale_row", "scale_reference", "shift_row", "shift_reference"]
_RUNTIME += [f"{x}_{dim}" for x in ("q", "k", "v", "out") for dim in ("row", "token", "head")]
_RUNTIME += [f"{x}_{dim}" for x in ("pool_k", "pool_v") for dim in ("page", "token", "head")]
_UNALIGNED = ["page", "mode", "scale", "shift", "bias"]


@triton.jit
def decode_fp8(code, dtype: tl.constexpr):
    """Decode float8_e4m3fn bits in uint8 to dtype, for chips without the conversion."""
    bits = code.to(tl.int32)
    magnitude = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * (2.0**120)
    magnitude = tl.where((bits & 0x7F) == 0x7F, float("nan"), magnitude)
    return tl.where(bits >= 128, -magnitude, magnitude).to(dtype)


@triton.jit
def _unit(scales, mask):
    """Return the scale of fp8 values, 1 where the mask is off. [block_d]"""
    unit = tl.load(scales, mask=mask, other=1.0)
    return tl.where(tl.abs(unit) < _TINY, _TINY, unit)


@triton.jit
def _attend(
    acc,  # [block_m, block_d] sum of weights times values
    total,  # [block_m] sum of weights
    peak,  # [block_m] running maximum, less this segment's constant, in log2 units
    query,  # [block_m, block_d]
    k,  # first key of the segment and head
    v,
    k_stride,  # of a token
    v_stride,
    tokens,  # 0: the segment is not read
    factor,  # of the products, >= 0, in log2 units
    bias,  # of the segment's first token
    bias_stride,
    biased,  # whether this segment has a bias
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DECODE: tl.constexpr,
    EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one segment to the online softmax."""
    channel = tl.arange(0, BLOCK_D)
    token = tl.arange(0, BLOCK_N)
    k_offsets = token[:, None] * k_stride + channel[None, :]
    v_offsets = token[:, None] * v_stride + channel[None, :]
    reach = tl.where(biased, tokens, 0)
    for start in range(0, tokens, BLOCK_N):
        inside = start + token < tokens
        k_tile = k + start * k_stride.to(tl.int64) + k_offsets
        v_tile = v + start * v_stride.to(tl.int64) + v_offsets
        if EVEN and D == BLOCK_D:
            key = tl.load(k_tile)
            value = tl.load(v_tile)
        else:
            mask = inside[:, None] & (channel < D)[None, :]
            key = tl.load(k_tile, mask=mask, other=0 if DECODE else 0.0)
            value = tl.load(v_tile, mask=mask, other=0 if DECODE else 0.0)
        if DECODE:
            key = decode_fp8(key, query.dtype)
            value = decode_fp8(value, query.dtype)

        scores = tl.dot(query, tl.trans(key.to(query.dtype)), input_precision=PRECISION)  # [block_m, block_n]
        if HAS_BIAS:
            extra = tl.load(bias + (start + token) * bias_stride, mask=start + token < reach, other=0.0) * _LOG2_E
        else:
            extra = tl.zeros([BLOCK_N], tl.float32)
        if HAS_BIAS or not EVEN:
            extra = tl.where(inside, extra, -float("inf"))
            scores = scores * factor + extra[None, :]
            highest = tl.maximum(peak, tl.max(scores, 1))
            weights = exp2(scores - highest[:, None], EXP2)
        else:
            highest = tl.maximum(peak, tl.max(scores, 1) * factor)
            weights = exp2(scores * factor - highest[:, None], EXP2)
        fading = tl.exp2(peak - highest)
        total = total * fading + tl.sum(weights, 1)
        acc = tl.dot(weights.to(query.dtype), value.to(query.dtype), acc * fading[:, None], input_precision=PRECISION)
        peak = highest
    return acc, total, peak


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def pointers_kernel(
    q,  # [rows, tokens, heads, D]; strides of rows, tokens and heads in units of ALIGN
    k,
    v,
    out,
    page,  # [rows, references] int64
    mode,  # [rows] int64
    scale,  # [rows, references]
    shift,
    gain,  # [TENSORS, rows, heads, D], contiguous
    offset,
    pool_k,  # [pages, page_tokens, heads, D]; strides in units of ALIGN
    pool_v,
    pool_k_scale,  # [pages, heads, D], contiguous
    pool_v_scale,
    bias,  # [rows + pages, >= tokens of a page]
    rows,
    tokens,
    heads,
    references,
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
    page_reference,
    mode_row,
    scale_row,
    scale_reference,
    shift_row,
    shift_reference,
    pool_k_page,
    pool_k_token,
    pool_k_head,
    pool_v_page,
    pool_v_token,
    pool_v_head,
    bias_page,
    bias_token,
    D: tl.constexpr,
    FACTOR: tl.constexpr,  # log2(e) / sqrt(D)
    TENSORS: tl.constexpr,  # AdaIN: 0 none, 2 queries and keys, 3 also values
    POOL: tl.constexpr,  # "none", "native", "fp8", or "codes": fp8 as uint8, decoded by `decode_fp8`
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_N divides tokens and page_tokens
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # by head, then row, then tile: rows that share a page run concurrently and share its bytes in L2
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles % rows).to(tl.int64)
    head = (tl.program_id(0) // tiles // rows).to(tl.int64)

    used = False
    invalid = False
    if tl.load(mode + row * mode_row) != 0:
        for r in range(references):
            p = tl.load(page + row * page_row + r * page_reference)
            used = used | (p >= 0)
            invalid = invalid | (p < -1) | (p >= rows + pages)
    swap = used & (tl.load(mode + row * mode_row) == 2)

    channel = tl.arange(0, BLOCK_D)
    within = channel < D
    token = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    stored = (token < tokens)[:, None] & within[None, :]
    q_tile = q + (row * q_row + head * q_head) * ALIGN + token.to(tl.int64)[:, None] * (q_token * ALIGN)
    q_tile += channel[None, :]
    affine = (row * heads + head) * D + channel  # offset into gain and offset
    next_tensor = rows.to(tl.int64) * heads * D

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], _FLOOR, tl.float32)

    # without LICM: keeping addresses across segments costs more registers than it saves
    for segment in tl.range(0, references + 1, disable_licm=True):
        # segment 0 is the row's own tokens, handled like a page of raw keys, with AdaIN in addition
        own = segment == 0
        reference = used & (segment > 0)
        r = tl.maximum(segment - 1, 0)
        p = tl.load(page + row * page_row + r * page_reference, mask=reference, other=-1)
        moved = tl.load(shift + row * shift_row + r * shift_reference, mask=reference, other=0.0)
        size = tl.load(scale + row * scale_row + r * scale_reference, mask=reference, other=1.0)
        p = tl.where(own, row, p)
        seen = tl.where(own, ~swap, (p >= 0) & (moved != -float("inf"))) & ~invalid
        if seen:
            live = p < rows
            query = tl.load(q_tile, mask=stored, other=0).to(tl.float32)
            turn = tl.where(size < 0, -1.0, 1.0) + tl.zeros([BLOCK_D], tl.float32)
            constant = moved * _LOG2_E + tl.zeros([BLOCK_M], tl.float32)
            if TENSORS > 0:
                changed = channel < tl.where(used, D, 0)
                changed_own = channel < tl.where(used & own, D, 0)
                query = query * tl.load(gain + affine, mask=changed, other=1.0)[None, :]
                query += tl.load(offset + affine, mask=changed, other=0.0)[None, :]
                turn *= tl.load(gain + next_tensor + affine, mask=changed_own, other=1.0)
                o = tl.load(offset + next_tensor + affine, mask=changed_own, other=0.0)
                constant += tl.sum(query * o[None, :], 1) * FACTOR
            if POOL == "fp8" or POOL == "codes":
                scales = ((p - rows) * heads + head) * D + channel
                stored_fp8 = channel < tl.where(live, 0, D)
                turn *= tl.load(pool_k_scale + scales, mask=stored_fp8, other=1.0)
                acc = acc * (1.0 / _unit(pool_v_scale + scales, stored_fp8))[None, :]
            query = (query * turn[None, :]).to(q.dtype.element_ty)
            factor = tl.abs(size) * FACTOR
            page_bias = bias
            if HAS_BIAS:
                page_bias = bias + p * bias_page

            k_segment = k + (p * k_row + head * k_head) * ALIGN
            v_segment = v + (p * v_row + head * v_head) * ALIGN
            k_stride = k_token * ALIGN
            v_stride = v_token * ALIGN
            count = tokens
            if POOL != "none":
                pool_k_segment = pool_k + ((p - rows) * pool_k_page + head * pool_k_head) * ALIGN
                pool_v_segment = pool_v + ((p - rows) * pool_v_page + head * pool_v_head) * ALIGN
                if POOL == "native":
                    k_segment = tl.where(live, k_segment, pool_k_segment)
                    v_segment = tl.where(live, v_segment, pool_v_segment)
                    k_stride = tl.where(live, k_stride, pool_k_token * ALIGN)
                    v_stride = tl.where(live, v_stride, pool_v_token * ALIGN)
                    count = tl.where(live, tokens, page_tokens)
                else:
                    count = tl.where(live, tokens, 0)

            peak -= constant
            acc, total, peak = _attend(
                acc,
                total,
                peak,
                query,
                k_segment,
                v_segment,
                k_stride,
                v_stride,
                count,
                factor,
                page_bias,
                bias_token,
                ~own,
                D,
                BLOCK_D,
                BLOCK_N,
                EVEN,
                HAS_BIAS,
                False,
                EXP2,
                PRECISION,
            )
            if POOL == "fp8" or POOL == "codes":
                acc, total, peak = _attend(
                    acc,
                    total,
                    peak,
                    query,
                    pool_k_segment,
                    pool_v_segment,
                    pool_k_token * ALIGN,
                    pool_v_token * ALIGN,
                    tl.where(live, 0, page_tokens),
                    factor,
                    page_bias,
                    bias_token,
                    True,
                    D,
                    BLOCK_D,
                    BLOCK_N,
                    EVEN,
                    HAS_BIAS,
                    POOL == "codes",
                    EXP2,
                    PRECISION,
                )
                acc = acc * _unit(pool_v_scale + scales, stored_fp8)[None, :]
            peak += constant
            if TENSORS == 3:
                gain_v = tl.load(gain + 2 * next_tensor + affine, mask=changed_own, other=1.0)
                offset_v = tl.load(offset + 2 * next_tensor + affine, mask=changed_own, other=0.0)
                acc = acc * gain_v[None, :] + total[:, None] * offset_v[None, :]

    # a row that saw no token gives 0; detected by the maximum, because weights from the cubic never reach 0
    saw = peak > 0.5 * _FLOOR
    inverse = tl.where(saw, 1.0 / tl.where(saw, total, 1.0), 0.0)
    acc = acc * inverse[:, None]
    acc = tl.where(invalid, float("nan"), acc)
    out_tile = out + (row * out_row + head * out_head) * ALIGN + token.to(tl.int64)[:, None] * (out_token * ALIGN)
    tl.store(out_tile + channel[None, :], acc.to(out.dtype.element_ty), mask=stored)


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
    """Fill `out`; this form takes every call. Tensors that are not `aligned` are copied first."""
    rows, tokens, heads, d = q.shape
    page, mode, scale, shift, bias = references
    q, k, v = (aligned(x) for x in (q, k, v))
    target = out if is_aligned(out) else aligned_like(out)
    block_m, block_n = config["block_m"], config["block_n"]
    even = bias is None and tokens % block_n == 0 and (pool is None or pool.k.shape[1] % block_n == 0)
    block_n = block_n if even else masked_block(block_n)
    stored, pages, page_tokens, pool_strides = "none", 0, 0, [0] * 6
    if pool is not None:
        pages, page_tokens = pool.k.shape[:2]
        pool = pool._replace(k=aligned(pool.k), v=aligned(pool.v))
        pool_strides = [s // ALIGN for x in (pool.k, pool.v) for s in strides(x)]
        stored = "native"
        if pool.k.dtype == FP8:
            stored = "codes" if config.get("decode", False) else "fp8"
            views = (x.view(torch.uint8) if stored == "codes" else x for x in (pool.k, pool.v))
            pool = Pool(*views, pool.k_scale.contiguous(), pool.v_scale.contiguous())
    if affine is not None:
        affine = Affine(affine.gain.contiguous(), affine.offset.contiguous())

    with device_of(q):
        pointers_kernel[(triton.cdiv(tokens, block_m) * rows * heads,)](
            q,
            k,
            v,
            target,
            page,
            mode,
            scale,
            shift,
            *(affine or (None, None)),
            *(pool or (None,) * 4),
            bias,
            rows,
            tokens,
            heads,
            page.shape[1],
            pages,
            page_tokens,
            *(s // ALIGN for x in (q, k, v, target) for s in strides(x)),
            *page.stride(),
            *mode.stride(),
            *scale.stride(),
            *shift.stride(),
            *pool_strides,
            *((0, 0) if bias is None else bias.stride()),
            D=d,
            FACTOR=math.log2(math.e) / math.sqrt(d),
            TENSORS=0 if affine is None else affine.gain.shape[0],
            POOL=stored,
            HAS_BIAS=bias is not None,
            EVEN=even,
            ALIGN=ALIGN,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=padded(d),
            EXP2=share(config["exp2"]),
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
            **compiler_options(config),
        )
        if target is not out:
            out.copy_(target)


def masked_block(block_n: int) -> int:
    """Return the keys per tile for masked or biased calls: half as many, because each adds a value to hold."""
    return max(16, block_n // 2)


def padded(d: int) -> int:
    """Return the channels of a tile that holds d."""
    return max(16, power_of_two(d))
