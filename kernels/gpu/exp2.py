"""2 ** x for a softmax, partly on the FMA pipe.

At 64 channels per head, a softmax's exponentials take as long as its matrix products, because the special function unit
makes 16 a clock. A cubic after Cody and Waite computes some of them on the much wider FMA pipe: with x = n + f, n an
integer and f in [-0.5, 0.5], 2**f is the minimax cubic below (relative error 7.5e-5, 1/26 of the error of rounding to
bf16), and n is added to its exponent bits.
"""

import struct

import triton
import triton.language as tl

CUBIC = (0.05517149, 0.24261094, 0.69326099, 0.99992808)  # highest power first
# adding it rounds to the nearest integer and leaves that integer in the low mantissa bits
ROUND = 1.5 * 2**23
LOWEST = -126.0  # 2 ** LOWEST is the smallest normal fp32 number


def _packed(lanes: int) -> str:
    """Return PTX for `lanes` values: the last by the cubic, the others by the special function unit.

    Results stay in scratch registers until every operand is read, so an output may share a register with an input.
    """
    c3, c2, c1, c0, magic, lowest = ("0f" + struct.pack(">f", value).hex() for value in (*CUBIC, ROUND, LOWEST))
    special = "".join(f"ex2.approx.ftz.f32 s{i}, ${lanes + i};" for i in range(lanes - 1))
    scratch = ", ".join(f"s{i}" for i in range(lanes - 1))
    results = "".join(f"mov.b32 ${i}, s{i};" for i in range(lanes - 1))
    return f"""{{
    .reg .f32 x, t, n, p, {scratch};
    .reg .b32 e, r;
    max.NaN.f32 x, ${2 * lanes - 1}, {lowest};
    add.rn.f32 t, x, {magic};
    sub.rn.f32 n, t, {magic};
    sub.rn.f32 x, x, n;
    fma.rn.f32 p, x, {c3}, {c2};
    fma.rn.f32 p, p, x, {c1};
    fma.rn.f32 p, p, x, {c0};
    {special}
    mov.b32 e, t;
    shl.b32 e, e, 23;
    mov.b32 r, p;
    add.s32 r, r, e;
    {results}
    mov.b32 ${lanes - 1}, r;
    }}"""


_QUARTER_ASM = tl.constexpr(_packed(4))
_QUARTER_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 4))
_EIGHTH_ASM = tl.constexpr(_packed(8))
_EIGHTH_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))
_C3, _C2, _C1, _C0 = (tl.constexpr(value) for value in CUBIC)
_ROUND = tl.constexpr(ROUND)
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def cubic_exp2(x):
    """Compute 2 ** x for x <= 0, any shape, fp32; results are clamped to at least 2 ** -126 instead of reaching 0."""
    x = tl.maximum(x, _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    t = x + _ROUND
    f = x - (t - _ROUND)
    p = ((_C3 * f + _C2) * f + _C1) * f + _C0
    return (p.to(tl.int32, bitcast=True) + (t.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def exp2(x, SHARE: tl.constexpr):
    """Compute 2 ** x for x <= 0, -inf allowed, any shape, fp32.

    SHARE 0: all by the special function unit; 4 or 8: every fourth or eighth value by the cubic; 1: all by the cubic,
    the only cubic form that the interpreter can run.
    """
    if SHARE == 4:
        return tl.inline_asm_elementwise(
            _QUARTER_ASM, _QUARTER_CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=4
        )
    elif SHARE == 8:
        return tl.inline_asm_elementwise(_EIGHTH_ASM, _EIGHTH_CONSTRAINTS, [x], dtype=tl.float32, is_pure=True, pack=8)
    elif SHARE == 1:
        return cubic_exp2(x)
    else:
        return tl.exp2(x)


def share(configured: int) -> int:
    """Return the SHARE of `exp2` for a configured value; the interpreter can't run PTX and always uses the cubic."""
    return 1 if configured and triton.knobs.runtime.interpret else configured
