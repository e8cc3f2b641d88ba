"""Shared self-attention, form "pointers", with the arguments of a TensorRT plugin.

An ahead-of-time plugin passes only inputs, then integers, then outputs to a kernel: every tensor is contiguous, strides
follow from sizes, and all other parameters are constants of the kernel. Pages and modes are int32, so that a program
reads each in one instruction.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from stylefast.kernels.configs import Config
from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.exp2 import share
from stylefast.kernels.gpu.launch import compiler_options, device_of, specialisation
from stylefast.kernels.gpu.shared_attention_pointers import masked_block, padded, pointers_kernel
from stylefast.kernels.gpu.strides import ALIGN

SIZES = ("rows", "tokens", "heads", "references", "pages", "page_tokens")
# read in 16-byte vectors from the start of a tensor; the tables may start at any address
_LINES = ("q", "k", "v", "gain", "offset", "pool_k", "pool_v", "out")


@triton.jit(do_not_specialize=list(SIZES))
def shared_attention_plugin(
    q,  # [rows, tokens, heads, D]
    k,
    v,
    page,  # [rows, references] int32
    mode,  # [rows] int32
    scale,  # [rows, references]
    shift,
    gain,  # [TENSORS, rows, heads, D]
    offset,
    pool_k,  # [pages, page_tokens, heads, D], or None
    pool_v,
    rows,
    tokens,
    heads,
    references,
    pages,
    page_tokens,
    out,  # [rows, tokens, heads, D]
    D: tl.constexpr,
    FACTOR: tl.constexpr,
    TENSORS: tl.constexpr,
    POOL: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXP2: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # in units of ALIGN
    head: tl.constexpr = D // ALIGN
    token = heads * head
    row = tokens * token
    pool_page = page_tokens * token
    pointers_kernel(
        q,
        k,
        v,
        out,
        page,
        mode,
        scale,
        shift,
        gain,
        offset,
        pool_k,
        pool_v,
        None,
        None,
        None,
        rows,
        tokens,
        heads,
        references,
        pages,
        page_tokens,
        row,
        token,
        head,
        row,
        token,
        head,
        row,
        token,
        head,
        row,
        token,
        head,
        references,
        1,
        1,
        references,
        1,
        references,
        1,
        pool_page,
        token,
        head,
        pool_page,
        token,
        head,
        0,
        0,
        D,
        FACTOR,
        TENSORS,
        POOL,
        False,
        EVEN,
        ALIGN,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        EXP2,
        PRECISION,
    )


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    page: torch.Tensor,
    mode: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    gain: torch.Tensor,
    offset: torch.Tensor,
    pool_k: torch.Tensor | None,
    pool_v: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
) -> None:
    """Fill `out` as the plugin does, from contiguous tensors of the plugin's types.

    page and mode are int32, scale, shift, gain and offset fp32, all others of one type.
    """
    rows, tokens, heads, d = q.shape
    pages, page_tokens = (0, 0) if pool_k is None else pool_k.shape[:2]
    even = is_even(config, tokens, page_tokens)
    with device_of(q):
        shared_attention_plugin[(triton.cdiv(tokens, config["block_m"]) * rows * heads,)](
            q,
            k,
            v,
            page,
            mode,
            scale,
            shift,
            gain,
            offset,
            pool_k,
            pool_v,
            rows,
            tokens,
            heads,
            page.shape[1],
            pages,
            page_tokens,
            out,
            **constants(d, q.dtype, gain.shape[0], pool_k is not None, even, config),
            **compiler_options(config),
        )


def is_even(config: Config, *counts: int) -> bool:
    """Return whether these token counts are multiples of the key tile, so that no tile needs a mask."""
    return all(count % config["block_n"] == 0 for count in counts)


def constants(d: int, dtype: torch.dtype, parts: int, banked: bool, even: bool, config: Config) -> dict[str, Any]:
    """Return the kernel's constants: d channels per head, AdaIN of `parts` of q, k and v, bank pages or none."""
    return {
        "D": d,
        "FACTOR": math.log2(math.e) / math.sqrt(d),
        "TENSORS": parts,
        "POOL": "native" if banked else "none",
        "EVEN": even,
        "ALIGN": ALIGN,
        "BLOCK_M": config["block_m"],
        "BLOCK_N": config["block_n"] if even else masked_block(config["block_n"]),
        "BLOCK_D": padded(d),
        "EXP2": share(config["exp2"]),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def specialise(d: int, dtype: torch.dtype, parts: int, banked: bool, even: bool, config: Config) -> Specialisation:
    """Return the specialisation for an ahead-of-time compile of the kernel; arguments as `constants`."""
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{short}") | {"page": "*i32", "mode": "*i32"}
    types |= dict.fromkeys(("scale", "shift", "gain", "offset"), "*fp32")
    types |= dict.fromkeys(("pool_k", "pool_v"), f"*{short}" if banked else "none")
    fixed = constants(d, dtype, parts, banked, even, config)
    if not banked:
        fixed |= {"pages": 0, "page_tokens": 0}
    kind = f"{'banked' if banked else 'live'}{' masked' * (not even)}"
    made = specialisation(
        f"shared_attention plugin {short} d={d} adain={parts} {kind}",
        shared_attention_plugin,
        types,
        fixed,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    lines = {(i,) for i, name in enumerate(shared_attention_plugin.arg_names) if name in _LINES}
    return made._replace(attrs={index: found for index, found in made.attrs.items() if index in lines})
