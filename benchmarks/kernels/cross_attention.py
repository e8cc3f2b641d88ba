"""gated_cross_attention: text and one image segment, against two SDPA calls and their weighted sum.

The peer's K and V are already gathered by row, and it skips masks and groups.
"""

import torch
from torch.nn.attention import SDPBackend

from benchmarks.kernels import plain
from benchmarks.kernels.attention import LAYERS, QUICK, WIDTH, with_backend
from benchmarks.kernels.cases import Case, Entrants, Versus, cache_bytes, input_sets, normal
from stylefast.kernels import gated_cross_attention

TEXT_TOKENS = 77
STRENGTH = 0.6
OURS, TWO_CALLS = "one call", "two SDPA calls and their sum"
TWO_CUDNN, TWO_FLASH = "two cuDNN SDPA calls and their sum", "two flash SDPA calls and their sum"
# peer -> its attention
SDPA = {
    TWO_CALLS: lambda: plain.attention,
    TWO_CUDNN: lambda: with_backend(SDPBackend.CUDNN_ATTENTION),
    TWO_FLASH: lambda: with_backend(SDPBackend.FLASH_ATTENTION),
}


def cpu_cases(quick: bool, features: list[str]) -> list[Case]:
    """Return cases of two rows, image segments of 4 and 16 tokens."""
    waived = "" if "avx512_bf16" in features else "this CPU has no AVX512-BF16"
    return [
        _case(tokens, heads, 2, image_tokens, dtype, "cpu", [Versus(OURS, TWO_CALLS, goal, why)])
        for dtype, goal, why in ((torch.float32, 1.2, ""), (torch.bfloat16, 1.5, waived))
        for tokens, heads in (QUICK if quick else LAYERS)
        for image_tokens in (4, 16)
    ]


def cuda_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Return cases of 2n rows, n = 1 and 4, bf16."""
    comparisons = [Versus(OURS, peer, 1.5) for peer in (TWO_CUDNN, TWO_FLASH)]
    return [
        _case(tokens, heads, 2 * targets, image_tokens, torch.bfloat16, device, comparisons, f"n={targets} ")
        for targets in ((1,) if quick else (1, 4))
        for tokens, heads in (QUICK if quick else LAYERS)
        for image_tokens in (4, 16)
    ]


def _case(tokens, heads, rows, image_tokens, dtype, device, comparisons, prefix="") -> Case:
    size = torch.empty(0, dtype=dtype).element_size()
    traffic = 2.0 * rows * tokens * heads * WIDTH * size

    def build() -> Entrants:
        count = input_sets(traffic, cache_bytes(device))
        sets = [_inputs(tokens, heads, rows, image_tokens, dtype, device, i) for i in range(count)]
        calls = {OURS: lambda i: gated_cross_attention(*sets[i])}
        for c in comparisons:
            sdpa = SDPA[c.peer]()
            calls[c.peer] = lambda i, sdpa=sdpa: plain.two_attentions(*_gathered(sets[i]), STRENGTH, sdpa)
        heads_seen, queries = [0, heads - 1], slice(None, None, max(1, tokens // 256))
        return Entrants(
            calls,
            sets=len(sets),
            exact=lambda: _exact(sets[0], heads_seen, queries),
            pick=lambda out: out[:, queries][:, :, heads_seen].double(),
        )

    shape = f"{prefix}{rows}x{tokens}x({TEXT_TOKENS}+{image_tokens})x{heads}x{WIDTH}"
    flop = 4.0 * rows * heads * tokens * (TEXT_TOKENS + image_tokens) * WIDTH
    return Case("gated_cross_attention", shape, dtype, comparisons, build, flop=flop, bytes=traffic)


def _inputs(tokens, heads, rows, image_tokens, dtype, device, seed):
    """Return the arguments of `gated_cross_attention`: one text page and one image page per row."""
    q, text_k, text_v, image_k, image_v = (
        normal(rows, count, heads, WIDTH, dtype=dtype, device=device, seed=5 * seed + i)
        for i, count in enumerate((tokens, TEXT_TOKENS, TEXT_TOKENS, image_tokens, image_tokens))
    )
    row = torch.arange(rows, device=device)
    return (
        q,
        text_k,
        text_v,
        row,
        None,
        image_k,
        image_v,
        torch.full((rows,), image_tokens, device=device),
        row[:, None],
        torch.full((rows, 1), STRENGTH, device=device),
        torch.zeros(rows, 1, dtype=torch.int64, device=device),
    )


def _gathered(s):
    # page i belongs to row i, so the peer can use the pages directly
    q, text_k, text_v, _, _, image_k, image_v, *_ = s
    return q, text_k, text_v, image_k, image_v


def _exact(s, heads, queries):
    q, *others = (x[:, :, heads].double() for x in _gathered(s))
    return plain.two_attentions(q[:, queries], *others, STRENGTH, attend=_fp64_attention)


def _fp64_attention(q, k, v):
    logits = torch.einsum("rqhd,rkhd->rhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("rhqk,rkhd->rqhd", torch.softmax(logits, -1), v)
