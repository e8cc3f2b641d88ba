"""Shared self-attention: rows attend to their own tokens and to those of up to R reference pages.

For a row with queries Q, own keys and values K, V, and for each reference segment r the keys K_r, V_r of its page:

    q^ = Q * gain_q + offset_q      k^ = K * gain_k + offset_k      v^ = V * gain_v + offset_v          (AdaIN, affine)
    concat:  softmax([ q^ k^T / sqrt(d),  scale_r * q^ K_r^T / sqrt(d) + shift_r + bias_r, ... ]) [v^; V_r; ...]
    swap:    the same without the own segment
    plain:   softmax(Q K^T / sqrt(d)) V

(StyleAligned, arXiv 2312.02133, figure 4; swap is Visual Style Prompting, arXiv 2402.12974.) The reference's keys are
used raw: AdaIN of the reference with itself is the identity. A row without a page is plain.

A page index p < rows is row p of this batch (a live reference), p >= rows is page p - rows of the pool, -1 is none. A
segment with shift -inf is hidden: it is not read, but AdaIN still applies to the row. A row that sees no token gives 0.
"""

import math
from typing import NamedTuple

import torch

from stylefast.errors import InvalidRequest
from stylefast.kernels import checks
from stylefast.kernels.registry import Operation, require_extension
from stylefast.kernels.shared_attention_torch import CONCAT, FP8, PLAIN, SWAP, eager, traceable

HEAD_SIZES = (32, 40, 64, 80, 128)  # with a fused form; other sizes run in PyTorch


class References(NamedTuple):
    """References that each row reads besides itself; see `shared_attention`."""

    page: torch.Tensor  # [rows, R] int64
    mode: torch.Tensor  # [rows] int64
    scale: torch.Tensor  # [rows, R] fp32
    shift: torch.Tensor  # [rows, R] fp32
    bias: torch.Tensor | None = None  # [rows + pages, tokens] fp32


class Affine(NamedTuple):
    """AdaIN as x * gain + offset: two fp32 tensors [parts, rows, heads, d].

    The parts are queries, keys and values, or only queries and keys, which leaves the values unchanged.
    """

    gain: torch.Tensor
    offset: torch.Tensor


class Pool(NamedTuple):
    """Pages outside the batch: keys, values [pages, page tokens, heads, d]; for fp8 also scales [pages, heads, d]."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def shared_attention_ref(
    q: torch.Tensor,  # [rows, tokens, heads, d]
    k: torch.Tensor,  # [rows, tokens, heads, d]
    v: torch.Tensor,  # [rows, tokens, heads, d]
    page: torch.Tensor,  # [rows, R] int64
    mode: torch.Tensor,  # [rows] int64
    scale: torch.Tensor,  # [rows, R] fp32
    shift: torch.Tensor,  # [rows, R] fp32; -inf hides a segment
    affine: Affine | None = None,
    pool_k: torch.Tensor | None = None,  # [pages, page tokens, heads, d]
    pool_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,  # [rows + pages, tokens], added to the logits of a page's tokens
    pool_k_scale: torch.Tensor | None = None,  # [pages, heads, d] fp32, with fp8 pages
    pool_v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Evaluate the formula above row by row, all logits in memory, in fp32 or, for fp64 input, in fp64.

    Returns [rows, tokens, heads, d] in q's type.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows, _, heads, width = q.shape
    out = torch.zeros_like(q)
    for row in range(rows):
        query, own_k, own_v = (x[row].to(exact) for x in (q, k, v))
        used = [(r, int(p)) for r, p in enumerate(page[row]) if int(p) >= 0 and int(mode[row]) != PLAIN]
        if used and affine is not None:
            parts = [query, own_k, own_v]
            for i, (gain, offset) in enumerate(zip(*affine, strict=True)):
                parts[i] = parts[i] * gain[row] + offset[row]
            query, own_k, own_v = parts
        logits, values = [], []
        if not used or int(mode[row]) != SWAP:
            logits.append(torch.einsum("qhd,khd->hqk", query, own_k) / math.sqrt(width))
            values.append(own_v)
        for r, p in used:
            if float(shift[row, r]) == -math.inf:
                continue
            if p < rows:
                page_k, page_v = k[p].to(exact), v[p].to(exact)
            else:
                assert pool_k is not None and pool_v is not None
                page_k, page_v = pool_k[p - rows].to(exact), pool_v[p - rows].to(exact)
                if pool_k_scale is not None and pool_v_scale is not None:
                    page_k, page_v = page_k * pool_k_scale[p - rows], page_v * pool_v_scale[p - rows]
            score = torch.einsum("qhd,khd->hqk", query, page_k) / math.sqrt(width)
            score = score * scale[row, r] + shift[row, r]
            if bias is not None:
                score = score + bias[p, : page_k.shape[0]]
            logits.append(score)
            values.append(page_v)
        if logits:
            weights = torch.softmax(torch.cat(logits, -1), -1).nan_to_num(0.0)
            out[row] = torch.einsum("hqk,khd->qhd", weights, torch.cat(values)).to(q.dtype)
    return out


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    page: torch.Tensor | None = None,
    mode: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    affine: Affine | None = None,
    pool_k: torch.Tensor | None = None,
    pool_v: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    pool_k_scale: torch.Tensor | None = None,
    pool_v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute shared self-attention in one kernel, the custom op `torch.ops.stylefast.shared_attention`.

    q, k, v [rows, tokens, heads, d], with any strides but a contiguous last dimension; page [rows, R] int64, mode
    [rows] int64 (default: concat), scale and shift [rows, R] fp32 (default: 1 and 0); affine from `adain_affine`, of 3
    parts or of 2 (queries and keys); pool_k, pool_v [pages, page tokens, heads, d] in q's type, or in float8_e4m3fn
    with pool_k_scale, pool_v_scale [pages, heads, d] or [heads, d] fp32; bias
    [rows + pages, tokens of the longest page] fp32. Softmax runs in fp32; shift and bias are in natural-log units.
    Returns [rows, tokens, heads, d], contiguous.

    Raises InvalidRequest, a ValueError, for shapes, types and devices that don't fit, and on CPUs for a page or mode
    out of range. On CUDA a page out of range makes its row NaN, without a synchronisation, unless STYLEFAST_CHECKS=1 is
    set in the environment.
    """
    rows = q.shape[0] if q.ndim else 0
    if page is None:
        page = torch.empty(rows, 0, dtype=torch.int64, device=q.device)
    if mode is None:
        mode = torch.full((rows,), CONCAT, dtype=torch.int64, device=q.device)
    if scale is None:
        scale = torch.ones(page.shape, dtype=torch.float32, device=q.device)
    if shift is None:
        shift = torch.zeros(page.shape, dtype=torch.float32, device=q.device)
    if (pool_k is None) != (pool_v is None):
        raise InvalidRequest("pool_k and pool_v go together: give both or neither")
    scales = [_per_page(x, pool_k) for x in (pool_k_scale, pool_v_scale)]
    pool = Pool(pool_k, pool_v, *scales) if pool_k is not None and pool_v is not None else None
    references = References(page, mode, scale, shift, bias)
    _check(q, k, v, references, affine, pool, scales)
    return operation.call(q, k, v, references, affine, pool)


def _per_page(scale: torch.Tensor | None, pool: torch.Tensor | None) -> torch.Tensor | None:
    """Expand a scale shared by all pages, [heads, d], to one per page."""
    if scale is None or pool is None or scale.ndim != 2:
        return scale
    return scale.expand(pool.shape[0], *scale.shape).contiguous()


def _check(q, k, v, references: References, affine: Affine | None, pool: Pool | None, scales: list):
    checks.shape("q", q, rows=-1, tokens=-1, heads=-1, d=-1)
    checks.floating("q", q)
    rows, tokens, heads, width = q.shape
    for name, x in (("k", k), ("v", v)):
        checks.shape(name, x, rows=rows, tokens=tokens, heads=heads, d=width)
        checks.dtype(name, x, q.dtype)
    checks.dense_channels(q=q, k=k, v=v)
    _check_references(rows, references)
    if affine is not None:
        for name, x in affine._asdict().items():
            parts = 2 if x.ndim and affine.gain.shape[0] == 2 else 3
            checks.shape(f"affine.{name}", x, parts=parts, rows=rows, heads=heads, d=width)
            checks.dtype(f"affine.{name}", x, torch.float32)
    if pool is not None:
        _check_pool(q, pool)
    needs_scale = pool is not None and pool.k.dtype == FP8
    for name, x in zip(("pool_k_scale", "pool_v_scale"), scales):
        if (x is not None) != needs_scale:
            raise InvalidRequest(f"{name} [pages, heads, d] goes with pages in {FP8}, and only with those")
        if x is not None and pool is not None:
            checks.shape(name, x, pages=pool.k.shape[0], heads=heads, d=width)
            checks.dtype(name, x, torch.float32)
    if references.bias is not None:
        pages, page_tokens = pool.k.shape[:2] if pool is not None else (0, 0)
        longest = max(tokens, page_tokens)
        checks.shape("bias", references.bias, pages=rows + pages, tokens=-1)
        checks.dtype("bias", references.bias, torch.float32)
        if references.bias.shape[1] < longest:
            raise InvalidRequest(
                f"bias covers {references.bias.shape[1]} tokens a page, but the longest page has {longest}"
            )
    groups = {"": references, "affine.": affine, "pool_": pool}
    named = {prefix + name: x for prefix, group in groups.items() if group for name, x in group._asdict().items()}
    checks.together("q", q=q, k=k, v=v, **named)


def _check_references(rows: int, references: References):
    page, mode, scale, shift, _ = references
    checks.shape("page", page, rows=rows, R=-1)
    checks.dtype("page", page, torch.int64)
    checks.shape("mode", mode, rows=rows)
    checks.dtype("mode", mode, torch.int64)
    for name, x in (("scale", scale), ("shift", shift)):
        checks.shape(name, x, rows=rows, R=page.shape[1])
        checks.dtype(name, x, torch.float32)


def _check_pool(q, pool: Pool):
    heads, width = q.shape[2:]
    checks.shape("pool_k", pool.k, pages=-1, tokens=-1, heads=heads, d=width)
    checks.shape("pool_v", pool.v, pages=pool.k.shape[0], tokens=pool.k.shape[1], heads=heads, d=width)
    for name, x in (("pool_k", pool.k), ("pool_v", pool.v)):
        checks.dtype(name, x, q.dtype, FP8)
    if pool.k.dtype != pool.v.dtype:
        raise InvalidRequest(f"pool_k and pool_v must have one type, not {pool.k.dtype} and {pool.v.dtype}")
    checks.dense_channels(pool_k=pool.k, pool_v=pool.v)


def _check_values(q, k, v, references: References, affine, pool: Pool | None):
    rows, pages = q.shape[0], pool.k.shape[0] if pool is not None else 0
    checks.integers_within("page", references.page, -1, rows + pages, f"pages of {rows} rows and {pages} in the pool")
    checks.integers_within("mode", references.mode, PLAIN, SWAP + 1, "modes (0 plain, 1 concat, 2 swap)")


def refuse_head_size(form: str, arguments: tuple) -> str:
    """Return why a fused form can't take the head size of q, the first argument; "" if it can."""
    width = arguments[0].shape[-1]
    if form != "torch" and width not in HEAD_SIZES:
        return f"head size {width} is not one of {', '.join(map(str, HEAD_SIZES))}"
    return ""


def _outputs(q, *others) -> torch.Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _cpp(*arguments) -> None:
    *inputs, out = arguments
    require_extension().shared_attention(*operation.flat(inputs), out)


operation = Operation(
    "shared_attention",
    # named "modes" because functionalisation passes arguments by keyword and has a `mode` of its own
    "(Tensor q, Tensor k, Tensor v, Tensor page, Tensor modes, Tensor scale, Tensor shift, Tensor? bias, Tensor? gain, "
    "Tensor? offset, Tensor? pool_k, Tensor? pool_v, Tensor? pool_k_scale, Tensor? pool_v_scale) -> Tensor",
    groups=(References, Affine, Pool),
    outputs=_outputs,
    forms={"triton": "shared_attention", "cpp": _cpp, "torch": eager},
    refuse=refuse_head_size,
    values=_check_values,
    traceable=traceable,
)
