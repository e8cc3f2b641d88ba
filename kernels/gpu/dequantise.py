"""Dequantisation of fp8 in Triton: value times channel scale. Each byte is read once and written once.

The bits are decoded in software, which works on every chip and costs nothing in a memory-bound kernel.
"""

import torch
import triton
import triton.language as tl

from stylefast.kernels.gpu.ahead import Specialisation
from stylefast.kernels.gpu.launch import device_of, specialisation
from stylefast.kernels.gpu.shared_attention_pointers import decode_fp8

# a tile of 2048 numbers for 4 warps: each thread reads 16 bytes, and its scales once for all tokens of the tile
_TOKENS, _CHANNELS, _WARPS = 8, 256, 4


@triton.jit(do_not_specialize=["tokens"])
def dequantise_kernel(
    scale,  # [groups, channels], contiguous
    codes,  # [groups, tokens, channels] uint8, contiguous
    out,  # like codes
    tokens,
    channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tiles = tl.cdiv(tokens, TOKENS)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    factor = tl.load(scale + group * channels + channel, mask=channel < channels, other=0.0)
    place = (group * tokens + token)[:, None] * channels + channel[None, :]
    inside = (token < tokens)[:, None] & (channel < channels)[None, :]
    value = decode_fp8(tl.load(codes + place, mask=inside, other=0), tl.float32) * factor[None, :]
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def dequantise(scale: torch.Tensor, codes: torch.Tensor, out: torch.Tensor) -> None:
    """Fill out, contiguous, with codes (e4m3 bits) [groups, tokens, channels] times scale [groups, channels]."""
    if out.numel() == 0:
        return
    groups, tokens, channels = codes.shape
    grid = (groups * triton.cdiv(tokens, _TOKENS), triton.cdiv(channels, _CHANNELS))
    with device_of(scale):
        dequantise_kernel[grid](
            scale.contiguous(),
            codes.contiguous(),
            out,
            tokens,
            channels,
            TOKENS=_TOKENS,
            CHANNELS=_CHANNELS,
            num_warps=_WARPS,
        )


def specialisations(capability: int) -> list[Specialisation]:
    """List one compile per output type."""
    return [
        specialisation(
            f"dequantise to {kind}",
            dequantise_kernel,
            {"scale": "*fp32", "codes": "*u8", "out": f"*{kind}"},
            {"TOKENS": _TOKENS, "CHANNELS": _CHANNELS},
            divisible=("channels",),
            num_warps=_WARPS,
        )
        for kind in ("fp32", "bf16", "fp16")
    ]
