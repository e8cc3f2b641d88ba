"""Calls of shared attention as its launchers take them, for any device."""

import math

import torch

from stylefast.kernels.gpu.shared_attention import shared_attention
from stylefast.kernels.shared_attention import (
    CONCAT,
    PLAIN,
    SWAP,
    Affine,
    Pool,
    References,
    shared_attention_ref,
)

# rows 0 to 3 are the batch, 4 and 5 the pool
MIXES = {
    "no references": ([[]] * 4, [PLAIN, CONCAT, SWAP, CONCAT]),
    "all rows plain": ([[-1]] * 4, [PLAIN, PLAIN, CONCAT, SWAP]),
    "concat, swap and plain rows of live references": ([[-1], [0], [0], [2]], [PLAIN, CONCAT, SWAP, PLAIN]),
    "rows read the pool, the batch and themselves": ([[4], [5], [0], [3]], [CONCAT, SWAP, CONCAT, CONCAT]),
    "two references, some missing": ([[-1, -1], [0, 5], [4, -1], [-1, 3]], [PLAIN, CONCAT, SWAP, CONCAT]),
}


def make_case(
    mix="rows read the pool, the batch and themselves",
    tokens=19,
    page_tokens=13,
    heads=2,
    width=32,
    dtype=torch.float32,
    affine=3,
    bias=False,
    fp8=False,
    device="cpu",
    seed=0,
):
    """Arguments by name; `affine` counts the tensors that AdaIN moves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    pages, modes = MIXES[mix]
    # drawn even where a mix has no pages, so that the mixes share their tensors
    q, k, v = draw(4, tokens, 3, heads, width).to(dtype).unbind(2)
    pool_k, pool_v = draw(2, page_tokens, 3, heads, width).to(dtype).unbind(2)[:2]
    page = torch.tensor(pages, dtype=torch.int64, device=device).reshape(4, -1)
    case = {"q": q, "k": k, "v": v, "page": page, "mode": torch.tensor(modes, device=device)}
    scale = torch.tensor([[1.0, 0.6, 0], [-1.3, 1, 0], [0, 2, 0], [0.8, 1, 0]], device=device)
    shift = torch.tensor([[0.0, 0.4, 0], [0.7, -1, 0], [0, 0.2, 0], [-0.5, 1, 0]], device=device)
    # columns of a wider table, as a plan holds them
    case |= {"scale": scale[:, : page.shape[1]], "shift": shift[:, : page.shape[1]]}
    case["gain"], case["offset"] = (draw(max(affine, 1), 4, heads, width) * 0.3 + one for one in (1, 0))
    if affine == 0:
        case["gain"] = case["offset"] = None
    case |= {"pool_k": pool_k, "pool_v": pool_v, "pool_k_scale": None, "pool_v_scale": None, "bias": None}
    if fp8:
        for name in ("pool_k", "pool_v"):
            scale = draw(2, heads, width).abs() * 0.02 + 0.005
            case[f"{name}_scale"] = scale
            case[name] = (case[name].float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    if bias:
        case["bias"] = draw(6, max(tokens, page_tokens))
    return case


def expected(case):
    """The literal reference in fp64."""
    wide = {name: x.double() if x is not None and x.is_floating_point() else x for name, x in case.items()}
    affine = None
    if case["gain"] is not None:
        # without a third tensor the values stay as they are
        gain, offset = (
            torch.cat([x, torch.full_like(x[:1], fill)])[:3] for x, fill in ((wide["gain"], 1.0), (wide["offset"], 0.0))
        )
        affine = Affine(gain, offset)
    names = ("q", "k", "v", "page", "mode", "scale", "shift")
    pool = ("pool_k", "pool_v", "bias", "pool_k_scale", "pool_v_scale")
    return shared_attention_ref(*(wide[name] for name in names), affine, *(wide[name] for name in pool))


def grouped(case):
    """The arguments as the launchers take them."""
    references = References(*(case[name] for name in ("page", "mode", "scale", "shift", "bias")))
    affine = None if case["gain"] is None else Affine(case["gain"], case["offset"])
    names = ("pool_k", "pool_v", "pool_k_scale", "pool_v_scale")
    pool = None if case["pool_k"] is None else Pool(*(case[name] for name in names))
    return case["q"], case["k"], case["v"], references, affine, pool


def run(case, config=None, out=None):
    """The launcher, into an `out` full of NaN."""
    if out is None:
        out = torch.empty(case["q"].shape, dtype=case["q"].dtype, device=case["q"].device)
    out.fill_(math.nan)
    shared_attention(*grouped(case), out, config=config)
    return out


def sdpa_error(case, exact):
    """The largest error of PyTorch's own path in the case's type: AdaIN, cat and scaled_dot_product_attention, a row
    at a time."""
    worst = 0.0
    dtype = case["q"].dtype
    for row in range(case["q"].shape[0]):
        q, k, v = (case[name][row] for name in ("q", "k", "v"))
        pages = [int(p) for p in case["page"][row] if p >= 0] if int(case["mode"][row]) != PLAIN else []
        if pages and case["gain"] is not None:
            parts = [q, k, v]
            for i in range(case["gain"].shape[0]):
                parts[i] = parts[i] * case["gain"][i, row].to(dtype) + case["offset"][i, row].to(dtype)
            q, k, v = parts
        keys, values, extra = [], [], []
        if not pages or int(case["mode"][row]) != SWAP:
            keys, values, extra = [k], [v], [torch.zeros(k.shape[0], device=k.device)]
        for r, p in enumerate(pages):
            live = p < case["q"].shape[0]
            page_k = case["k"][p] if live else case["pool_k"][p - case["q"].shape[0]]
            page_v = case["v"][p] if live else case["pool_v"][p - case["q"].shape[0]]
            keys.append(page_k * case["scale"][row, r].to(dtype))
            values.append(page_v)
            extra.append(torch.full((page_k.shape[0],), float(case["shift"][row, r]), device=k.device))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, torch.cat(keys), torch.cat(values)))
        mask = torch.cat(extra).to(dtype)[None, None, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
        worst = max(worst, (out.double() - exact[row]).abs().max().item())
    return worst
